"""Make a Trainer without output that runs in this process only."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.naming import a_class

LOGGERS = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")


def trainer_of(make: type, options: Mapping[str, Any]) -> Any:
    """Make a quiet Trainer; refuse one that cannot be made, or that would start or join other processes."""
    namespace = namespace_of(make)
    environments = importlib.import_module(f"{namespace}.plugins.environments")
    given = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": _unheard(namespace, options.get("default_root_dir", os.getcwd())),
        "plugins": [environments.LightningEnvironment()],  # one process, even if a cluster has started this one
        **options,
    }
    try:
        with silent():
            trainer = make(**given)
    except Exception as error:
        raise TransferConfigError(f"No Trainer can be made of trainer= and the callbacks: {error}") from error
    if not isinstance(trainer.strategy, importlib.import_module(f"{namespace}.strategies").SingleDeviceStrategy):
        raise TransferConfigError(
            f"trainer= makes {a_class(trainer.strategy)}: trials run on one device, in one process. Leave "
            "strategy= and num_nodes= out."
        )
    return trainer


def _unheard(namespace: str | None, folder: Any) -> Any:
    """Return Lightning's logger that does nothing, whichever of its methods the user's steps call."""
    logger = importlib.import_module(f"{namespace}.loggers.logger").DummyLogger
    return type("Unheard", (logger,), {"save_dir": folder, "log_dir": folder})()


@contextmanager
def silent() -> Iterator[None]:
    """Silence Lightning during trial trainings."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
