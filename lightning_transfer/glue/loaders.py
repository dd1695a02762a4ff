"""Read a Trainer's and a DataModule's loaders: the images that they serve, their workers, parts of them."""

import copy
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_transfer.datasets import Loaded, Served
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.glue.quiet import silent, trainer_of
from lightning_transfer.glue.samplers import drawn_by
from lightning_transfer.naming import a_class
from lightning_transfer.randomness import next_numbers, restored

EVEN = (RandomSampler, SequentialSampler, SubsetRandomSampler, DistributedSampler)


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


def train_loader(trainer: Any) -> Any:
    """Return the user's train loader before the fit loop has set it up."""
    return trainer.fit_loop._data_source.dataloader()  # private: finds the given loader, the DataModule's, the module's


def loader_of(data: Any, make: type, options: Mapping[str, Any]) -> Any:
    """Return the train loader of a DataModule, set up with the random state that the next fit will have."""
    if not hasattr(data, "train_dataloader"):
        return data
    numbers, seed = next_numbers(), torch.initial_seed()
    with restored(), attached(data, make, options):
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        is_drawn = next_numbers() != numbers and torch.initial_seed() == seed  # else it seeds by itself
    if is_drawn:
        warnings.warn(
            f"{type(data).__name__} draws random numbers in setup. If it splits its images at random, a later fit "
            "splits them in another way, and validates on images that were used here. Call L.seed_everything(0) right "
            "before both, or give random_split a generator.",
            stacklevel=4,
        )
    return loader


def first_batches(loader: Any, make: type) -> list[Any]:
    """Return the first batch of a train loader, or of several together, as Lightning's fit gives it; [] without one.

    Args:
        loader: of which a copy is read.
        make: Lightning's Trainer.

    Raises:
        TransferConfigError: it cannot be copied.
    """
    try:
        twin = copy.deepcopy(loader)
    except Exception as error:  # whatever the objects in it raise
        raise TransferConfigError(
            f"The train loader, {a_class(loader)}, cannot be copied ({error}), and its own batches would be taken from "
            "the training. Open files in __iter__ of its dataset, not in __init__."
        ) from error
    combined = importlib.import_module(f"{namespace_of(make)}.utilities.combined_loader").CombinedLoader
    together = twin if isinstance(twin, combined) else combined(twin, "max_size_cycle")
    return [batch for batch, *_ in islice(together, 1)]


@contextmanager
def attached(data: Any, make: type, options: Mapping[str, Any]) -> Iterator[None]:
    """Attach a Trainer to a DataModule inside this context."""
    before = getattr(data, "trainer" if "trainer" in vars(data) else "_trainer", None)  # a module's own raises
    with silent():
        data.trainer = trainer_of(make, options)
        try:
            yield
        finally:
            data.trainer = before


def check_loader(loader: Any) -> None:
    """Refuse a train loader that cannot be split.

    Raises:
        TransferConfigError: the message names the loader that was found.
    """
    dataset = getattr(loader, "dataset", None)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not isinstance(loader, DataLoader) or not sized or loader.batch_size is None:
        found = type(loader).__name__ if dataset is None else f"{type(loader).__name__} of {type(dataset).__name__}"
        raise TransferConfigError(
            f"A part of the training images is held out, but the train loader, a {found}, cannot be split. Pass a "
            "DataLoader with batch_size= of a dataset with a length."
        )
    if not isinstance(loader.sampler, EVEN):
        warnings.warn(
            f"Trials draw all images equally often and do not use the loader's {type(loader.sampler).__name__}.",
            stacklevel=2,
        )


def part_of(loader: Any, indices: Sequence[int], *, dataset: Any = None) -> DataLoader[Any]:
    """Return a loader of some of the images; if `dataset` is given, of that dataset's images, in order."""
    leaves_one = len(indices) % loader.batch_size == 1  # BatchNorm cannot train on one image
    return DataLoader(
        Subset(Loaded(served(loader) if dataset is None else dataset), indices),
        batch_size=loader.batch_size,
        shuffle=dataset is None and not isinstance(loader.sampler, SequentialSampler),
        drop_last=dataset is None and (loader.drop_last or leaves_one) and len(indices) >= loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
