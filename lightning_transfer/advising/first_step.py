"""Compare what the first step of a trial trains on with what the trial is scored by."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.batches import class_numbers, labels_in
from lightning_transfer.criteria import CriterionCall, Listening
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.entering import IN_STEP, Entering, images_in
from lightning_transfer.glue.hearing import Hearing

SHOWN = 8  # labels in a message


class FirstStep:
    """Looks at the first training step of a copy of the user's module.

    Args:
        module: the copy, whose training_step is wrapped.
        adapt: turns a batch into images and labels; None if it is both.
    """

    def __init__(self, module: Any, adapt: Callable[[Any], tuple[Tensor, Tensor]] | None) -> None:
        self.adapt = adapt
        self.calls: list[CriterionCall] = []
        self.entering = Entering()
        step = module.training_step

        @functools.wraps(step)  # Lightning reads its arguments
        def heard(*args: Any, **kwargs: Any) -> Any:
            with Listening(self.calls):
                given = step(*args, **kwargs)
            module.training_step = step
            return given

        module.training_step = heard

    def check(self, batch: Any, hearing: Hearing) -> None:
        """Refuse a step that changes images or labels: scores would be of other ones.

        Args:
            batch: of the step.
            hearing: that runs the images that are scored.
        """
        taken = self.entering.taken
        self.entering.end()
        if hearing.entry is not None and hearing.entry.is_other(images_in(batch), taken):
            raise TransferConfigError(
                f"{IN_STEP}, and images are scored as the module's forward takes them. Do it there or in "
                "on_after_batch_transfer, or pass a function that does it too: advise(..., forward=lambda module, "
                "images: ...)."
            )
        given = labels_in(batch) if self.adapt is None else self.adapt(batch)[1]
        labels = class_numbers(given) if isinstance(given, Tensor) else None
        trained = [numbers for call in self.calls if (numbers := class_numbers(call.target)) is not None]
        if labels is not None and trained and all(_are_others(numbers, labels) for numbers in trained):
            raise TransferConfigError(
                f"training_step trains on the labels {trained[0][:SHOWN].tolist()}, ..., and the batch has "
                f"{labels[:SHOWN].tolist()}, ..., by which images are scored. Change labels in the dataset; or pass "
                "advise(..., adapt=...), a function that turns a batch into images and the labels that are trained on."
            )


def _are_others(numbers: Tensor, labels: Tensor) -> bool:
    """Return whether class numbers are other ones for the same images; those of mixed images have another order."""
    if numbers.shape != labels.shape or torch.equal(numbers.sort().values, labels.sort().values):
        return False
    return 2 * int((numbers == labels).sum()) < len(labels)
