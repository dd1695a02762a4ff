"""Read from a Trainer what callbacks and mixins need, for both namespaces of Lightning."""

import importlib
import weakref
from collections.abc import Iterable
from typing import Any

from torch.optim.swa_utils import AveragedModel

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.schedules import Schedule

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
REFUSED_STRATEGIES = ("DeepSpeedStrategy",)  # a DDPStrategy by inheritance, but it shards the optimizer
ACCELERATORS = {"cuda": "gpu"}  # devices for which Lightning has another name


class Weakly:
    """Remembers a Trainer or a module without keeping it alive; a copy, pickled or deep, remembers nothing."""

    def __init__(self, thing: Any = None) -> None:
        self._reference = None if thing is None else weakref.ref(thing)

    def get(self) -> Any:
        """Return what is remembered, or None."""
        return None if self._reference is None else self._reference()

    def is_of(self, thing: Any) -> bool:
        """Return whether this is the remembered object."""
        return self._reference is not None and self._reference() is thing

    def __reduce__(self) -> tuple[type["Weakly"], tuple[()]]:
        return (Weakly, ())


def named(things: Iterable[Any], names: set[str]) -> list[str]:
    """Return the class names of things, such as callbacks, that are, or inherit from, one of these classes."""
    return [type(one).__name__ for one in things if names & {cls.__name__ for cls in type(one).__mro__}]


def is_running(trainer: Any) -> bool:
    """Return whether a Trainer is in the middle of fit, validate, test or predict."""
    return bool(trainer.state.status == "running")


def is_run_by(trainer: Any, module: Any) -> bool:
    """Return whether this Trainer runs the module now, and not another one in the middle of its run.

    Lightning leaves `module.trainer` at the last Trainer, also after that one has finished.
    """
    last = getattr(module, "_trainer", None)  # private: the property raises if there is none
    return last is trainer or last is None or not is_running(last)


def averages_of(trainer: Any) -> list[Any]:
    """Return the copies of the module whose weights Lightning's `WeightAveraging` averages in this fit."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # private: no other way
    return [average.module for average in found if isinstance(average, AveragedModel)]


def check_supported(trainer: Any) -> None:
    """Refuse strategies with which this package is not tested.

    Raises:
        TransferConfigError: the strategy shards parameters or is unknown.
    """
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if names.isdisjoint(SUPPORTED_STRATEGIES) or not names.isdisjoint(REFUSED_STRATEGIES):
        raise TransferConfigError(
            f"{type(trainer.strategy).__name__} is not supported: this package is tested on one device and with DDP. "
            "Use strategy='ddp' or one device."
        )


def check_launcher(trainer: Any, name: str) -> None:
    """Refuse to change layers in a process that returns only weights to the script's unchanged module.

    Raises:
        TransferConfigError: processes are spawned or forked from the script's process.
    """
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise TransferConfigError(
            f"{name} changes layers, which spawned or forked processes cannot return to your script. Use "
            "strategy='ddp', or torchrun."
        )


def known_steps(trainer: Any) -> float | None:
    """Return the number of optimizer steps of this training; None if it has no end, or Lightning does not know it.

    Lightning gives -1 for a train loader without a length, does not estimate the steps of a manual optimization, and
    takes the accumulation of the current epoch for that of all epochs.
    """
    num_steps: float = trainer.estimated_stepping_batches
    accumulating = (one for one in trainer.callbacks if named([one], {"GradientAccumulationScheduler"}))
    changes = trainer.max_epochs != -1 and any(len({*one.scheduling.values()}) > 1 for one in accumulating)
    is_known = 0 < num_steps < float("inf") and trainer.lightning_module.automatic_optimization and not changes
    return num_steps if is_known else None


def schedule_length(schedule: Schedule, trainer: Any) -> float | None:
    """Return the length of a schedule in steps if the Trainer decides it, otherwise None.

    Raises:
        TransferConfigError: the length of training is needed and not known, or the schedule ends after training.
    """
    if schedule.is_constant:
        return None
    if schedule.until_steps is None and not trainer.lightning_module.automatic_optimization:
        raise TransferConfigError(
            "In manual optimization the number of training steps is not known: pass Schedule(until_steps=...), counted "
            "like trainer.global_step, over all optimizers."
        )
    num_steps = known_steps(trainer)
    if schedule.until_steps is None:
        if num_steps is not None:
            return num_steps
        raise TransferConfigError(
            "The length of training is not known (no max_steps, and no max_epochs, no length of the train loader, or a "
            "GradientAccumulationScheduler whose factor changes), so a schedule over a share of it is not possible. "
            "Pass Trainer(max_steps=...) without max_epochs, or weight=lt.Schedule(until_steps=1000)."
        )
    if num_steps is not None and num_steps < schedule.until_steps and not is_dry_run(trainer):
        raise TransferConfigError(
            f"until_steps={schedule.until_steps} is after the end of training, at {num_steps:.0f} steps. "
            f"Pass until_steps<={num_steps:.0f}."
        )
    return None


def is_dry_run(trainer: Any) -> bool:
    """Return whether this run is too short for any schedule: a dry run, or the learning-rate finder's."""
    return bool(trainer.fast_dev_run or named(trainer.callbacks, {"_LRCallback"}))


def trainer_class(owner: Any) -> type:
    """Return Lightning's Trainer of the namespace that a Trainer or a module comes from.

    Raises:
        TransferConfigError: it comes from no namespace of Lightning.
    """
    if isinstance(owner, type):
        raise TransferConfigError(f"{owner.__name__} is a class; pass an instance: {owner.__name__}(...).")
    if (namespace := namespace_of(owner)) is not None:
        return importlib.import_module(namespace).Trainer  # type: ignore[no-any-return]
    raise TransferConfigError(f"{type(owner).__name__} is neither a LightningModule nor a LightningDataModule.")


def options_like(trainer: Any) -> dict[str, Any]:
    """Return the options that make a Trainer step like another one, on that one's device."""
    device = trainer.strategy.root_device
    return {
        "accelerator": ACCELERATORS.get(device.type, device.type),
        "devices": 1 if device.index is None else [device.index],
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "limit_train_batches": trainer.limit_train_batches,
    }
