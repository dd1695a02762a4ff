"""Write lines, values, options and progress bars with a Trainer's own loggers, for both namespaces of Lightning."""

import importlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.glue.trainer import named
from lightning_transfer.progress import Progress, Step, no_progress, rich_progress, tqdm_progress


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
