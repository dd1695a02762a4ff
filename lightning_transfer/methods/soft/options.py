"""Check the options of soft fine-tuning, for the callback and the mixin."""

from typing import get_args

from lightning_transfer.errors import TransferConfigError, check_choice
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.loss import Mix


def check_soft_options(weight: Schedule, mix: str) -> None:
    """Raise unless the options describe a source loss that is annealed away.

    Raises:
        TransferConfigError: an option is not valid; the message names it.
    """
    check_choice("mix", mix, get_args(Mix))
    if weight.end > weight.start:
        raise TransferConfigError(
            f"The source weight would rise from {weight.start:g} to {weight.end:g}; soft fine-tuning anneals it away. "
            "Pass Schedule(start, end) with start >= end."
        )
    if mix == "convex" and weight.start > 1:
        raise TransferConfigError(f"mix='convex' takes weights up to 1, not {weight.start:g}. Use mix='add'.")
    if mix == "convex" and weight.end == 1:
        raise TransferConfigError(
            "mix='convex' with a weight of 1 throughout would leave your own loss out. Pass a smaller weight=, a "
            "Schedule, or mix='add'."
        )
