"""What the callback and the mixin of soft fine-tuning both refuse."""

from typing import Any

from lightning_transfer.errors import TransferConfigError, check_choice
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.task import SourceTask


def check_soft_options(source: SourceTask, weight: Schedule, mix: str) -> None:
    """Raise unless the options describe a source loss that is annealed away.

    Raises:
        TransferConfigError: naming the option.
    """
    if not isinstance(source, SourceTask):
        raise TransferConfigError(
            f"source is a {type(source).__name__}; wrap the data: SourceTask(dataset, head=pretrained_classifier)."
        )
    if not isinstance(weight, Schedule):
        line = f"Schedule({weight}, {weight})" if isinstance(weight, int | float) else "Schedule(start, end, shape=...)"
        raise TransferConfigError(f"weight={weight!r} is no Schedule; write {line}.")
    check_choice("mix", mix, ("add", "convex"))
    if weight.end > weight.start:
        raise TransferConfigError(
            f"The source weight would rise from {weight.start:g} to {weight.end:g}; soft fine-tuning anneals it away. "
            "Pass Schedule(start, end) with start >= end."
        )
    if mix == "convex" and weight.start > 1:
        raise TransferConfigError(f"mix='convex' takes weights up to 1, not {weight.start:g}. Use mix='add'.")


def check_hyperparameters(module: Any) -> None:
    """Raise where the user's hyperparameters hold a source task.

    Raises:
        TransferConfigError: naming the line to write.
    """
    saved = [name for name, value in getattr(module, "hparams", {}).items() if isinstance(value, SourceTask)]
    if saved:
        raise TransferConfigError(
            f"save_hyperparameters would put all source images into every checkpoint. Write "
            f"self.save_hyperparameters(ignore={saved})."
        )
