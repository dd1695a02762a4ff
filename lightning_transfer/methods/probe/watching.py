"""Watch the first steps after a head was set: whether they change images, and whether their loss is above chance."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.glue.entering import IN_STEP, Entering, images_in
from lightning_transfer.glue.hearing import Hearing
from lightning_transfer.glue.logs import is_log_due

WATCHED = 10  # optimizer steps
STEEP = 10.0  # how many times as high as chance the loss may be (ours)
# The same for the first step, if no BatchNorm uses the statistics of a batch (ours). With an ImageNet network, on six
# targets, the first loss is at most 0.5 of chance, 0.95 with MixUp, and 1.5 to 2.7 times chance with swapped labels.
AT_FIRST = 1.5


class FirstSteps:
    """Warns if training does not start from the probe.

    Args:
        trainer: of the run.
        num_classes: of the head; the loss of chance is its logarithm.
        device: of the module.
        hearing: that computed the probe's features; None if another process did.
        is_exact: whether training computes the probe's features, apart from augmentation and dropout.
    """

    def __init__(
        self, trainer: Any, num_classes: int, device: torch.device, hearing: Hearing | None, *, is_exact: bool
    ) -> None:
        self.last = trainer.global_step + WATCHED
        self.chance = math.log(num_classes)
        self.hearing = hearing
        self.is_exact = is_exact
        self.entering = Entering()
        self.images: list[Tensor] = []  # of the first batch
        self.has_warned = False  # of images, which explains a high loss
        self.at_first: Tensor | None = None  # loss of the first batch
        self.worst = torch.zeros((), device=device)

    def begin(self, batch: Any) -> None:
        """Listen to the first batch."""
        if self.hearing is not None:
            self.images = images_in(batch)
            self.entering.listen(*self.hearing.first)

    def stepped(self, trainer: Any, module: Any, outputs: Any) -> bool:
        """Keep the loss on the device, and return whether to read it: the steps are over, and this one logs."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if trainer.global_step <= self.last and isinstance(loss, Tensor):
            mean = loss.detach().float().mean()  # in manual optimization it may be a loss for each image
            parts = trainer.accumulate_grad_batches if module.automatic_optimization else 1
            mean = mean * parts  # Lightning has divided it
            if self.at_first is None:
                self.at_first = mean
            self.worst = torch.maximum(self.worst, mean)
        self.end()
        return bool(trainer.global_step >= self.last and is_log_due(trainer))

    def compare(self) -> None:
        """Warn if the step has changed the images of the first batch, and listen no more."""
        hearing, self.hearing = self.hearing, None
        entry = None if hearing is None else hearing.entry
        if entry is not None and entry.is_other(self.images, self.entering.taken):
            self.has_warned = True
            warnings.warn(
                f"ProbeStart: {IN_STEP}, and the probe was fitted to images as they are. Do it in the module's forward "
                "or in on_after_batch_transfer, or pass ProbeStart(forward=lambda module, images: ...).",
                stacklevel=2,
            )

    def end(self) -> None:
        """Forget the batch."""
        self.entering.end()
        self.images = []

    def read(self) -> None:
        """Warn if the loss was too high, and nothing has shown why."""
        if self.has_warned:
            return
        begun, worst = 0.0 if self.at_first is None else float(self.at_first), float(self.worst)
        if not worst < STEEP * self.chance:  # also if it is not a number
            warnings.warn(
                f"After ProbeStart the loss rose to {worst:.3g} within {WATCHED} steps; chance is {self.chance:.2g}. "
                "Possible reasons: the features differ between training mode and eval mode (a network that is not "
                "pretrained), training_step changes images or labels first, the labels 0 and 1 are the numbers of a "
                "regression and not classes, or the learning rate is too high for the probe's large weights. Lower "
                "the learning rate, or leave ProbeStart out.",
                stacklevel=2,
            )
        elif self.is_exact and begun > AT_FIRST * self.chance:
            warnings.warn(
                f"After ProbeStart the first loss is {begun:.3g}; chance is {self.chance:.2g}. Possible reasons: "
                "training_step changes images or labels first, or the loss is not the mean cross-entropy alone. In "
                "the second case ignore this; otherwise change them in the dataset.",
                stacklevel=2,
            )
