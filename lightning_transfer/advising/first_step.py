"""Compare what the first step of a trial trains on with what the trial is scored by."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.batches import class_numbers, labels_in
from lightning_transfer.criteria import CriterionCall, Listening
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.entering import IN_STEP, Entering, images_in
from lightning_transfer.glue.hearing import Hearing

SHOWN = 8  # labels in a message
REPEATED = 3  # images, at least, of a class that has another image: if each class has one, nothing shows (ours)


class FirstStep:
    """Looks at the first training step of a copy of the user's module.

    Args:
        module: the copy, whose training_step is wrapped.
        hearing: runs the images that are scored.
        adapt: turns a batch into images and labels; None if it is both.
    """

    def __init__(self, module: Any, hearing: Hearing, adapt: Callable[[Any], tuple[Tensor, Tensor]] | None) -> None:
        self.hearing, self.adapt = hearing, adapt
        self.calls: list[CriterionCall] = []
        self.scores: list[Tensor] = []  # that the head gave
        self.entering = Entering()
        step = module.training_step

        @functools.wraps(step)  # Lightning reads its arguments
        def heard(*args: Any, **kwargs: Any) -> Any:
            module.training_step = step
            self.entering.listen(*hearing.first)
            with Listening(self.calls), hearing.head.module.register_forward_hook(self._keep):
                return step(*args, **kwargs)

        module.training_step = heard

    def _keep(self, head: nn.Module, args: Any, given: Any) -> None:
        if isinstance(given, Tensor):
            self.scores.append(given.detach())

    def check(self, batch: Any) -> None:
        """Refuse a step that changes images or labels: others would be scored."""
        taken = self.entering.taken
        self.entering.end()
        entry = self.hearing.entry
        if entry is not None and entry.is_other(images_in(batch), taken):
            raise TransferConfigError(
                f"{IN_STEP}, and images are scored as the module's forward takes them. Do it there or in "
                "on_after_batch_transfer, or pass a function that does it too: advise(..., forward=lambda module, "
                "images: ...)."
            )
        given = labels_in(batch) if self.adapt is None else self.adapt(batch)[1]
        labels = class_numbers(given) if isinstance(given, Tensor) else None
        of_head = [call for call in self.calls if any(torch.equal(call.scores, scores) for scores in self.scores)]
        trained = [numbers for call in of_head if (numbers := class_numbers(call.target)) is not None]
        if labels is not None and trained and all(_are_renamed(numbers, labels) for numbers in trained):
            raise TransferConfigError(
                f"training_step trains on the labels {trained[0][:SHOWN].tolist()}, ..., and the batch has "
                f"{labels[:SHOWN].tolist()}, ..., by which images are scored. Change labels in the dataset; or pass "
                "advise(..., adapt=...), a function that turns a batch into images and the labels that are trained on."
            )


def _are_renamed(numbers: Tensor, labels: Tensor) -> bool:
    """Return whether classes have new numbers: one each, and most images have another number than before.

    With the labels of MixUp's partners, or of a teacher, a class has several numbers.
    """
    if numbers.shape != labels.shape or 2 * int((numbers == labels).sum()) >= len(labels):
        return False
    pairs = {*zip(labels.tolist(), numbers.tolist(), strict=True)}
    classes = {label for label, _ in pairs}
    return len(pairs) == len(classes) <= len(labels) - REPEATED
