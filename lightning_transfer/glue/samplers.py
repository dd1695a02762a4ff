"""Find out which images of its dataset a loader draws, if its sampler shows it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_transfer import ranks
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class


def drawn_by(loader: DataLoader[Any]) -> list[int] | None:
    """Return the indices that a loader draws over its epochs, each once; None for all of its dataset.

    Raises:
        TransferConfigError: the loader has the user's own sampler or batch sampler, which may leave images out.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None  # it has no sampler; callers that need random access refuse it
    indices = list(dict.fromkeys(_drawn(_sampler_of(loader))))
    return None if indices == list(range(len(loader.dataset))) else indices  # type: ignore[arg-type]


def importance_of(loader: DataLoader[Any]) -> Tensor | None:
    """Return how often a loader draws each image of its dataset, relative to the others; None if all alike."""
    sampler = _users(_sampler_of(loader))
    while isinstance(sampler, BatchSampler):
        sampler = _users(sampler.sampler)
    if isinstance(sampler, WeightedRandomSampler) and sampler.replacement:
        return sampler.weights
    number = len(loader.dataset)  # type: ignore[arg-type]
    counts = torch.tensor([index % number for index in _drawn(sampler)]).bincount(minlength=number)
    return counts.double() if counts.max() > 1 else None  # indices may be repeated, as for oversampling


def _sampler_of(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _users(sampler: Any) -> Any:
    """Return the user's own sampler, without Lightning's wrapper for DDP."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # private: no other way


def _drawn(sampler: Any) -> Iterable[int]:
    sampler = _users(sampler)
    if isinstance(sampler, Sequence | Tensor | np.ndarray):
        return (int(index) for batch in sampler for index in np.atleast_1d(batch))  # or single indices
    for kind, drawn in KINDS.items():
        if isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__:  # a subclass may draw differently
            return drawn(sampler)
    raise TransferConfigError(
        f"The train loader draws by {a_class(sampler)}, which does not show the images that it draws. If the "
        "callback has target=, pass it: the target's training images without augmentation. Or give the loader "
        "Subset(dataset, indices) and one of torch's samplers."
    )


def _shared_out(sampler: Any) -> Iterable[int]:
    if sampler.num_replicas != ranks.world_size():
        raise TransferConfigError(
            f"The train loader draws by {a_class(sampler)} that divides images among {sampler.num_replicas} "
            f"processes, but there are {ranks.world_size()}, so some images are never drawn. Leave num_replicas= and "
            "rank= out."
        )
    return range(len(sampler.dataset))


KINDS: dict[Any, Callable[[Any], Iterable[int]]] = {
    BatchSampler: lambda sampler: _drawn(sampler.sampler),
    SubsetRandomSampler: lambda sampler: _drawn(sampler.indices),
    SequentialSampler: lambda sampler: range(len(sampler.data_source)),
    RandomSampler: lambda sampler: range(len(sampler.data_source)),
    WeightedRandomSampler: lambda sampler: sampler.weights.nonzero()[:, 0].tolist(),
    DistributedSampler: _shared_out,
}
