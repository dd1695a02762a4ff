"""What everybody who takes a source task refuses."""

from typing import Any, Literal, TypeAlias

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.task import SourceTask

Weight: TypeAlias = Schedule | Literal["auto"]


def as_schedule(weight: Weight, usual: Schedule) -> tuple[Schedule, bool]:
    """The schedule that a weight stands for, and whether a domain gap decides if it is followed."""
    return (usual, True) if isinstance(weight, str) and weight == "auto" else (weight, False)


def check_source(source: SourceTask, weight: Schedule) -> None:
    """Raise unless they are a source task and a schedule.

    Raises:
        TransferConfigError: naming the option.
    """
    if not isinstance(source, SourceTask):
        raise TransferConfigError(
            f"source is a {type(source).__name__}; wrap the dataset: lt.SourceTask.from_timm(network, dataset), before "
            "the network's classifier is replaced, or lt.SourceTask(dataset, head=pretrained_classifier)."
        )
    if not isinstance(weight, Schedule):
        known = {int: f"{weight}, {weight}", float: f"{weight}, {weight}", str: f"shape={weight!r}"}
        line = f"lt.Schedule({known.get(type(weight), '1.0, 0.0, shape=...')})"
        raise TransferConfigError(f'weight={weight!r} is no Schedule; write {line}, or "auto".')


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
