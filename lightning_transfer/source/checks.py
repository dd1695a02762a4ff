"""Check the arguments that all methods with a source task share."""

from typing import Any, Literal, TypeAlias

from lightning_transfer.errors import TransferConfigError, check_number
from lightning_transfer.naming import a_class
from lightning_transfer.options import made
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.task import SourceTask

Weight: TypeAlias = Schedule | float | Literal["auto"]
USUAL, ALWAYS = Schedule(), Schedule(1.0, 1.0)  # what "auto" follows near the source: of all of it, of what is borrowed


def as_weight(weight: Weight) -> Schedule | Literal["auto"]:
    """Return a weight as a `Schedule` or "auto": a number is constant, a mapping has a schedule's arguments.

    Raises:
        TransferConfigError: it is something else.
    """
    found = made(Schedule, weight, argument="weight")
    if isinstance(found, int | float) and not isinstance(found, bool):
        check_number("weight", found)
        found = Schedule(found, found)
    if isinstance(found, Schedule):
        return found
    if isinstance(found, str) and found == "auto":
        return "auto"
    line = f"shape={found!r}" if isinstance(found, str) else "1.0, 0.0, shape=..."
    raise TransferConfigError(f'weight={found!r} is not a weight; write lt.Schedule({line}), a number, or "auto".')


def as_schedule(weight: Schedule | Literal["auto"], usual: Schedule) -> tuple[Schedule, bool]:
    """Return the schedule of a weight, and whether a measured domain gap decides if the schedule is used."""
    return (weight, False) if isinstance(weight, Schedule) else (usual, True)


def as_source(source: Any) -> SourceTask:
    """Return a source task, also one that is given as a mapping of its arguments, or of those of `from_timm`.

    Raises:
        TransferConfigError: it is something else.
    """
    source = made(SourceTask, source, argument="source", others={"from_timm": _from_timm})
    if not isinstance(source, SourceTask):
        raise TransferConfigError(
            f"source is {'None' if source is None else a_class(source)}; wrap the dataset: "
            "lt.SourceTask.from_timm(network, dataset), before the network's classifier is replaced, or "
            "lt.SourceTask(dataset, head=pretrained_classifier). Without source images: "
            "lt.SoftFinetuning(lt.SourceKnowledge(network))."
        )
    return source


def _from_timm(from_timm: Any, dataset: Any, **options: Any) -> SourceTask:
    if "head" in options:
        raise TransferConfigError("source has head and from_timm, which keeps its own head. Pass one of them.")
    return SourceTask.from_timm(from_timm, dataset, **options)


def check_hyperparameters(module: Any) -> None:
    """Refuse hyperparameters of the user's that hold a source task."""
    saved = [name for name, value in getattr(module, "hparams", {}).items() if isinstance(value, SourceTask)]
    if saved:
        raise TransferConfigError(
            f"save_hyperparameters would put all source images into every checkpoint. Write "
            f"self.save_hyperparameters(ignore={saved})."
        )
