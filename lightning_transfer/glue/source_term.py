"""The source loss as a term of somebody's training step: on which images, how much, and from where after a resume."""

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.checkpoints import check_options, check_stamp, stamp, sum_of_zeros
from lightning_transfer.glue.trainer import (
    check_ends_within,
    current_value,
    is_log_due,
    log,
    say,
    to_device,
    train_batch_size,
)
from lightning_transfer.methods.soft.functional import joint_loss
from lightning_transfer.roles import find_head, out_width
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.passes import SourcePass
from lightning_transfer.source.stream import SourceStream, load, seeded
from lightning_transfer.source.task import SourceTask, structure

UNTRAINED = 0.9  # of the loss of guessing: a kept head that starts above does not know these labels
UNNORMALISED = 32.0  # pixel values beyond any normalisation's


class SourceTerm(nn.Module):
    """One run's source task: its head, its stream, and the loss that it adds to a step.

    Args:
        source: the task.
        module: the user's module.
        weight: of the source loss.
        mix: how the losses are joined.
        head: where the target head sits, or "auto".
    """

    is_transfer_part = True

    def __init__(
        self, source: SourceTask, module: Any, *, weight: Schedule, mix: Literal["add", "convex"], head: str = "auto"
    ) -> None:
        super().__init__()
        self.source = source
        self.weight = weight
        self.mix = mix
        target_head = find_head(module, head, probe=lambda: self._probe(module))
        self.head_path = target_head.path
        self.head = source.make_head(target_head.module, target_head.path)
        self.num_classes = out_width(self.head)
        self.batch_size = source.batch_size
        self._stream: SourceStream | None = None
        self._position = 0
        self._pass: SourcePass | None = None
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        self._is_over = False  # whether the weight has reached 0 for the rest of this fit
        if not weight.is_constant or weight.start:
            self._check_labels()

    def _example(self) -> Any:
        with seeded(self.source.seed, 0):
            return default_collate([load(self.source.dataset, 0)])

    def _probe(self, module: Any) -> None:
        images, _ = self.source.unpack(self._example())
        self.source.forward(module, images) if callable(self.source.forward) else module(images)

    def _check_labels(self) -> None:
        self.source.check_all_labels(self.num_classes)
        if self.source.has_class_labels and not self.source.batch_hooks:
            _, labels = self.source.unpack(self._example())
            self.source.check_labels(labels, self.num_classes, torch.zeros(len(labels), dtype=torch.int64))

    def attach(self, module: Any) -> None:
        """Listen at the head of the user's module."""
        self._is_over = False
        self._pass = SourcePass(self.source, module, find_head(module, self.head_path))

    def detach(self) -> None:
        """Let go of the user's module and of loader workers."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = None
        self._drawn = None
        self._close_stream()

    def check_effect(self, trainer: Any, module: Any) -> None:
        """Warn when no parameter that both tasks share is trained."""
        heads = {id(param) for part in (self.head, module.get_submodule(self.head_path)) for param in part.parameters()}
        if not optimizers.trains_any(trainer, (param for param in module.parameters() if id(param) not in heads)):
            warnings.warn(
                "No parameter in front of the head is trained, so the source task changes nothing of the target's. "
                "In configure_optimizers give the optimizer self.parameters().",
                NoEffectWarning,
                stacklevel=2,
            )

    def check_length(self, trainer: Any) -> None:
        """Raise at the start of training when the schedule cannot follow it."""
        check_ends_within(self.weight, trainer)
        current_value(self.weight, trainer)

    def begin(self, module: Any) -> None:
        """In front of the user's step: let a joint pass take source images along."""
        if self.source.forward == "joint" and self._weight(module.trainer):
            self._source_pass.arm(lambda: self._draw(module))

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """The step's loss with the source loss in it; at weight 0 exactly the step's own."""
        trainer = module.trainer
        weight = self._weight(trainer)
        source_loss = self._loss(module) if weight else None
        if is_log_due(trainer):
            values = {"transfer/target_loss": loss.detach(), "transfer/source_weight": torch.tensor(weight)}
            log(trainer, values if source_loss is None else {**values, "transfer/source_loss": source_loss.detach()})
        if source_loss is not None:
            return joint_loss(loss, source_loss, weight=weight, mix=self.mix)
        return loss + sum_of_zeros(self.head) if trainer.world_size > 1 else loss

    def _weight(self, trainer: Any) -> float:
        """The step's weight; at 0 no pass is run, which would still move BatchNorm and the random state."""
        if self._is_over:
            return 0.0
        weight = current_value(self.weight, trainer)
        if weight == self.weight.end == 0:
            self._is_over = True
            self._close_stream()
        return weight

    def _loss(self, module: Any) -> Tensor:
        if self.source.forward == "joint":
            features = self._source_pass.take()
            if features is None:
                raise TransferConfigError(
                    f"forward='joint': the step never ran the network that holds the head {self.head_path!r}. "
                    "Use forward='separate'; in a mixin, call super().on_train_batch_start()."
                )
        else:
            features = self._source_pass.separate(module, self._draw(module))
        assert self._drawn is not None
        images, labels, indices = self._drawn
        self._drawn = None
        loss = self.source.loss(self.head(features), labels)
        if loss.ndim:
            raise TransferConfigError(
                f"The source loss has shape {tuple(loss.shape)}; expected a scalar, the mean over its images. "
                "Pass SourceTask(loss=) that reduces."
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(_non_finite(loss, images, indices, module.trainer.global_step))
        if self._stream is not None and self._stream.position == self._stream.batch_size * self._stream.num_ranks:
            self._introduce(module.trainer, float(loss.detach()), images)
        return loss

    def _draw(self, module: Any) -> Tensor:
        """Draw a source batch, onto the device, and give its images; labels wait until the pass is done."""
        trainer = module.trainer
        if self.batch_size is None:
            self.batch_size = train_batch_size(trainer)
        if self._stream is None:
            optimizers.check_held(trainer, self)
            self._stream = SourceStream(
                self.source, batch_size=self.batch_size, rank=trainer.global_rank, num_ranks=trainer.world_size
            )
            self._stream.seek(self._position)
        indices, samples = self._stream.next_batch()
        try:
            moved = to_device(trainer, samples, hooks=self.source.batch_hooks)
        except Exception as error:
            error.add_note(
                f"This happened while a source batch, {structure(samples)}, went through the batch-transfer hooks. "
                "If they are not meant for it: SourceTask(batch_hooks=False)."
            )
            raise
        images, labels = self.source.unpack(moved)
        if self.source.has_class_labels:
            self.source.check_labels(labels, self.num_classes, indices)
        self._drawn = images, labels, indices
        return images

    def _introduce(self, trainer: Any, loss: float, images: Tensor) -> None:
        """One line on the first source batch, and warnings on what looks wrong with it."""
        chance = math.log(self.num_classes)
        say(
            trainer,
            f"Source loss at step {trainer.global_step}: {loss:.3f}; guessing: ln({self.num_classes}) = {chance:.3f}.",
        )
        if self.source.head is not None and self.source.has_class_labels and loss > UNTRAINED * chance:
            warnings.warn(
                f"The kept source head starts at a loss of {loss:.2f}, guessing has {chance:.2f}: it does not know "
                "these labels. Give them in the order of its own training; a head of other labels wrecks the features.",
                stacklevel=2,
            )
        largest = float(images.detach().abs().max())
        if largest > UNNORMALISED:
            warnings.warn(
                f"Source images reach {largest:.0f}; networks take normalised pixels. Give the source dataset the "
                "transform that the network was pretrained with.",
                stacklevel=2,
            )

    @property
    def _source_pass(self) -> SourcePass:
        if self._pass is None:
            raise TransferConfigError("The source task is not attached to a module. Run it in Trainer.fit.")
        return self._pass

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def describe(self) -> dict[str, str]:
        """Every option that decides what the run computes."""
        shape = self.weight.shape
        return {
            **self.source.describe(),
            "source classes": str(self.num_classes),
            "mix": self.mix,
            "weight": f"{self.weight.start:g} to {self.weight.end:g}",
            "weight shape": shape if isinstance(shape, str) else getattr(shape, "__qualname__", type(shape).__name__),
            "weight until": f"step {self.weight.until_steps}" if self.weight.until_steps else f"{self.weight.until:g}",
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the head's weights."""
        position = self._position if self._stream is None else self._stream.position
        return {**stamp(), "position": position, "batch_size": self.batch_size, "options": self.describe()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a run was left.

        Raises:
            TransferConfigError: it was another version's run, or ran under other options.
        """
        check_stamp(state)
        check_options("The source task", state["options"], self.describe())
        self.batch_size = state["batch_size"]
        self._position = state["position"]
        self._is_over = False
        if self._stream is not None:
            self._stream.seek(self._position)


def _non_finite(loss: Tensor, images: Tensor, indices: Tensor, step: int) -> str:
    bad = ~torch.isfinite(images.detach()).flatten(1).all(1)
    if bad.any():
        cause = f"pixels of source samples {indices[bad.cpu()].tolist()} are not finite"
    else:
        cause = f"source samples {indices.tolist()} have finite pixels; the learning rate may be too high"
    return f"The source loss is {loss.item()} in step {step}: {cause}. Stopped before the optimizer's step."
