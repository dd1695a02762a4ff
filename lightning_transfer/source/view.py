"""Compute features and logits of a run's network outside of training, and leave no trace in it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_transfer.glue.moving import as_in_steps
from lightning_transfer.roles import is_pooling
from lightning_transfer.source.passes import SourcePass
from lightning_transfer.source.task import SourceTask


@dataclass(frozen=True)
class NetworkView:
    """Runs images through a run's network in eval mode and without gradients, and leaves it unchanged.

    Attributes:
        trainer: whose fit it is.
        module: the user's.
        source: the task, which decides how images run.
        run: computes the features that the head takes.
        head_path: of the target's head.
        batch_size: images that run at once.
    """

    trainer: Any
    module: Any
    source: SourceTask
    run: SourcePass
    head_path: str
    batch_size: int

    def features(self, images: Tensor) -> Tensor:
        """Return the features that the head takes."""
        return self.logits(images, nn.AdaptiveAvgPool2d(1) if is_pooling(self._head) else nn.Identity())

    def target_logits(self, images: Tensor) -> Tensor:
        """Return the logits of target images."""
        logits = self.logits(images, self._head)
        return logits.flatten(1) if logits.shape[1:].numel() == logits.shape[1] else logits

    def logits(self, images: Tensor, head: nn.Module) -> Tensor:
        """Return the output of a head on the features of images."""
        with as_in_steps(self.trainer, self.module, head):
            given: Tensor = head(self.run.separate(self.module, images))
        return given.detach()  # a forward of the user's may enable gradients

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.module.get_submodule(self.head_path)
        return head
