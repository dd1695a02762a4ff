"""Read from a Trainer what callbacks and mixins need, for both namespaces of Lightning."""

import importlib
import inspect
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.datasets import Served
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.batch_hooks import forgotten
from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.glue.samplers import drawn_by
from lightning_transfer.naming import a_class, nesting
from lightning_transfer.progress import Progress, Step, no_progress, rich_progress, tqdm_progress
from lightning_transfer.schedules import Schedule
from lightning_transfer.tracing import evaluating

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
REFUSED_STRATEGIES = ("DeepSpeedStrategy",)  # a DDPStrategy by inheritance, but it shards the optimizer


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


def say(trainer: Any, message: str) -> None:
    """Log a line with the Trainer's own logger, once for all ranks."""
    if trainer.is_global_zero:
        logging.getLogger(f"{namespace_of(trainer)}.trainer.trainer").info(message)


def progress_of(trainer: Any) -> Progress:
    """Return bars of the kind that the Trainer shows; a Trainer that received SIGTERM stops at their next step."""
    bar = trainer.progress_bar_callback
    is_seen = bar is not None and trainer.is_global_zero
    make = no_progress if not is_seen else rich_progress if named([bar], {"RichProgressBar"}) else tqdm_progress

    @contextmanager
    def progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
        with make(name, total, unit) as step:

            def advance(more: int, note: str = "") -> None:
                step(more, note)
                if trainer.received_sigterm:
                    raise importlib.import_module(f"{namespace_of(trainer)}.utilities.exceptions").SIGTERMException

            yield advance

    return progress


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


def to_device(trainer: Any, batch: Any, *, hooks: bool, were_set: dict[str, Any] | None = None) -> Any:
    """Convert and move a batch as the training loop does.

    Args:
        trainer: the Trainer.
        batch: as the loader returned it.
        hooks: whether it passes the user's batch-transfer hooks; `forgotten` restores what these set.
        were_set: filled with the attributes that hooks have set.
    """
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    if not hooks:
        device = trainer.strategy.root_device
        is_async = device.type == "cuda"  # as in Lightning's own transfer; on "mps" it was not safe
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=is_async), batch)
    # the same three steps as the loop: 64-true and bf16-true convert the input, the selector finds DataModule hooks
    with forgotten(trainer) as found:
        try:
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        except Exception as error:
            error.add_note(
                f"This happened while a batch, {nesting(batch)}, went through the batch-transfer hooks. If it is a "
                "source batch, let the source dataset return samples like the target's, and extract images and labels "
                "with SourceTask(adapt=lambda batch: (images, labels)). SourceTask(batch_hooks=False) skips the hooks, "
                "and everything that they do, such as normalising."
            )
            raise
    if were_set is not None:
        were_set |= found
    return batch


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """Set the Trainer's state to validating, so that hooks that augment training images do not."""
    stage, trainer.validating = trainer.state.stage, True
    try:
        yield
    finally:
        trainer.state.stage = stage


def as_validated(trainer: Any, batch: Any, *, hooks: bool = True) -> Any:
    """Convert and move a batch as validation does: hooks that augment training images do not."""
    with validating(trainer), evaluating(trainer.lightning_module):  # a hook may ask for either
        return to_device(trainer, batch, hooks=hooks)


@contextmanager
def as_in_steps(trainer: Any, *modules: nn.Module) -> Iterator[None]:
    """Run modules in eval mode and without gradients, in the precision of the Trainer's steps."""
    try:
        with evaluating(*modules), trainer.precision_plugin.forward_context():
            yield
    finally:
        torch.clear_autocast_cache()  # of weights that were cast without gradients, which the step would use


def is_log_due(trainer: Any) -> bool:
    """Return whether values of this step are logged, or may be monitored after it."""
    return _is_at_interval(trainer) or _is_monitored(trainer)


def _is_monitored(trainer: Any) -> bool:
    """Return whether an epoch's end or a validation comes after this step."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch  # infinite, or None, if not counted in batches
    number = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return trainer.is_last_batch or bool(every and (number + 1) % every == 0)


def _is_at_interval(trainer: Any) -> bool:
    """Return whether the Trainer logs this step."""
    # private: the Trainer counts batches with a step here, not the steps of all optimizers
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def log(trainer: Any, values: dict[str, Tensor]) -> None:
    """Pass values to callbacks that monitor them and, at the Trainer's interval and in a validation, to the loggers.

    `module.log` would do the same, but takes as long as a small network's step and slows down every later step.
    """
    trainer.callback_metrics.update(values)
    if not trainer.training or _is_at_interval(trainer):
        trainer._logger_connector.log_metrics(values)  # private: all loggers, at the Trainer's own step number


def log_options(trainer: Any, options: dict[str, Any]) -> None:
    """Pass options to the loggers, together with the module's hyperparameters, if the Trainer logs those."""
    if not trainer.is_global_zero or not getattr(trainer, "enable_autolog_hparams", True):
        return
    for logger in trainer.loggers:
        # without metrics TensorBoard does not write a second hp_metric or replace the module's summary
        takes_metrics = "metrics" in inspect.signature(logger.log_hyperparams).parameters
        logger.log_hyperparams(options, **({"metrics": {}} if takes_metrics else {}))


def served(loader: DataLoader[Any], dataset: Any = None) -> Any:
    """Return the subset of a loader's dataset that its sampler draws; if `dataset` is given, the same subset of it.

    The images that the sampler does not draw may be the user's validation images.

    Raises:
        TransferConfigError: the sampler does not show what it draws, or `dataset` has another length.
    """
    own: Any = loader.dataset
    found = own if dataset is None else dataset
    indices = drawn_by(loader)
    if dataset is not None and len(found) != len(own):
        raise TransferConfigError(
            f"unaugmented has {len(found)} images, the train loader's dataset {len(own)}; pass the same images in the "
            "same order."
        )
    return found if indices is None else Served(found, indices)


def target_dataset(given: Dataset[Any] | None, trainer: Any) -> Dataset[Any]:
    """Return the target's training images.

    Raises:
        TransferConfigError: the train loader does not show its dataset.
    """
    if given is not None:
        return given
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise TransferConfigError(
            f"The train loader, {a_class(loader)}, does not show its dataset. Train with one DataLoader, or, "
            "if the callback has target=, pass it: the training images without augmentation."
        )
    dataset: Dataset[Any] = served(loader)
    return dataset


def averages_of(trainer: Any) -> list[Any]:
    """Return the copies of the module whose weights Lightning's `WeightAveraging` averages in this fit."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # private: no other way
    return [average.module for average in found if isinstance(average, AveragedModel)]


def source_workers(given: int | None, trainer: Any) -> dict[str, Any]:
    """Return a DataLoader's options for the processes that read source images: as many as given, or the train loader's.

    Args:
        given: how many, or None.
        trainer: the Trainer with the train loader.
    """
    loader = trainer.train_dataloader
    if given is not None or not isinstance(loader, DataLoader):  # another kind may count its threads by this name
        return {"num_workers": given or 0}
    return {"num_workers": loader.num_workers, "multiprocessing_context": loader.multiprocessing_context}


def target_workers(given: int | None, trainer: Any) -> dict[str, Any]:
    """Return a DataLoader's options for the processes that read target images outside of training.

    If 0 are given, there are as many as the train loader has: its workers, forked later, would share a file that a
    dataset opens in this process.
    """
    return source_workers(given or None, trainer)


def train_batch_size(trainer: Any) -> int:
    """Return the batch size of the user's train loader.

    Raises:
        TransferConfigError: the loader does not report it.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        raise TransferConfigError(
            f"The train loader, {a_class(loader)}, does not report a batch size. Pass SourceTask(batch_size=...)."
        )
    return size
