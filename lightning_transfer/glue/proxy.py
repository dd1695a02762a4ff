"""Short trainings beside somebody's own, to try something out: in one process, silent, and without a trace."""

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import AnyCallback
from lightning_transfer.glue.trainer import to_device

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
LOGGERS = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
ACCELERATORS = {"cuda": "gpu"}  # a device's name, where Lightning's is another


def trainer_class(owner: Any) -> type:
    """Lightning's own Trainer, of the namespace that a Trainer or a module comes from.

    Raises:
        TransferConfigError: it comes from neither.
    """
    for cls in type(owner).__mro__:
        for namespace in NAMESPACES:
            if cls.__module__.startswith(f"{namespace}."):
                return importlib.import_module(namespace).Trainer  # type: ignore[no-any-return]
    raise TransferConfigError(f"{type(owner).__name__} is no LightningModule.")


def options_like(trainer: Any) -> dict[str, Any]:
    """What makes a Trainer step as another does, on its device alone."""
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


def train_loader(trainer: Any) -> Any:
    """The user's train loader, before the fit loop has asked for it."""
    return trainer.fit_loop._data_source.dataloader()  # private: loaders given, a DataModule's or the module's own


def loader_of(data: Any) -> Any:
    """The train loader of a DataModule; what is none is taken for the loader itself."""
    if not hasattr(data, "train_dataloader"):
        return data
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def check_loader(loader: Any) -> None:
    """Refuse a train loader that cannot be split.

    Raises:
        TransferConfigError: saying what there is.
    """
    dataset = getattr(loader, "dataset", None)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not isinstance(loader, DataLoader) or not sized or loader.batch_size is None:
        raise TransferConfigError(
            f"A part of the training images is to be held out, and the train loader, a {type(loader).__name__} of "
            f"{type(dataset).__name__}, cannot be split. Give a DataLoader with batch_size= of a dataset with a length."
        )
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler):
        warnings.warn(
            f"Trials are trained on images drawn evenly, not by the loader's {type(loader.sampler).__name__}.",
            stacklevel=2,
        )


def part_of(loader: Any, indices: Sequence[int], *, dataset: Any = None) -> DataLoader[Any]:
    """A loader of some of the images; of those of another dataset, in order, where one is given."""
    leaves_one = len(indices) % loader.batch_size == 1  # which BatchNorm cannot train on, and no fault of the user's
    return DataLoader(
        Subset(loader.dataset if dataset is None else dataset, indices),
        batch_size=loader.batch_size,
        shuffle=dataset is None and not isinstance(loader.sampler, SequentialSampler),
        drop_last=dataset is None and (loader.drop_last or leaves_one) and len(indices) >= loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )


class Scoring(AnyCallback):
    """Remembers the best accuracy, over epochs, of a network on images that were held out.

    Args:
        loader: the images.
        score: tells, of a module and a batch, which images are right.
    """

    def __init__(self, loader: DataLoader[Any], score: Any) -> None:
        self.loader = loader
        self.score = score
        self.best = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """A rate that waits for the user's validation, which is not run, stays."""
        for config in trainer.lr_scheduler_configs:
            config.strict = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Count what it has right."""
        right = total = 0
        with trainer.precision_plugin.forward_context():
            for batch in self.loader:
                correct = self.score(pl_module, to_device(trainer, batch, hooks=True))
                right, total = right + int(correct.sum()), total + len(correct)
        torch.clear_autocast_cache()
        self.best = max(self.best, right / total)


def train(make: type, options: dict[str, Any], module: Any, loader: Any, callbacks: Sequence[Any], epochs: int) -> None:
    """Fit a module for some epochs; its own callbacks, its validation and every log are left out."""
    module.configure_callbacks = list
    with silent():
        environments = importlib.import_module(
            f"{make.__module__.removesuffix('.trainer.trainer')}.plugins.environments"
        )
        trainer = make(
            **{
                "max_epochs": epochs,
                "callbacks": list(callbacks),
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "plugins": [environments.LightningEnvironment()],  # whatever has started this process
                **options,
            }
        )
        trainer.fit(module, loader)


@contextmanager
def silent() -> Iterator[None]:
    """Lightning's lines and hints are about a training that nobody asked for."""
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
