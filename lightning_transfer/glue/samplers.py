"""Which images of its dataset a loader serves, as far as its sampler shows it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_transfer import ranks
from lightning_transfer.errors import TransferConfigError


def drawn_by(loader: DataLoader[Any]) -> list[int] | None:
    """Return the indices that a loader draws in the course of its epochs, each once; None for all of its dataset.

    Raises:
        TransferConfigError: it draws by a sampler or a batch sampler of the user's own, which may leave images out.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None  # no sampler; who needs its images one by one refuses it
    drawn = _drawn(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    indices = list(dict.fromkeys(drawn))
    return None if indices == list(range(len(loader.dataset))) else indices  # type: ignore[arg-type]


def importance_of(loader: DataLoader[Any]) -> Tensor | None:
    """Return the weights by which a loader draws the images of its dataset; None if it has none."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # private: shared out by Lightning
    while isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    return sampler.weights if isinstance(sampler, WeightedRandomSampler) and sampler.replacement else None


def _drawn(sampler: Any) -> Iterable[int]:
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # private: shared out by Lightning
    indices = getattr(sampler, "indices", sampler)
    if isinstance(indices, Sequence | Tensor | np.ndarray):
        return (int(index) for batch in indices for index in np.atleast_1d(batch))  # or single indices
    for kind, drawn in KINDS.items():
        if isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__:  # else it draws in a way of its own
            return drawn(sampler)
    raise TransferConfigError(
        f"The train loader draws by a {type(sampler).__name__}, which does not show the images that it draws. Pass "
        "target=, where the callback takes it: the target's training images without augmentation. Or give the loader "
        "Subset(dataset, indices) and a sampler of torch's."
    )


def _shared_out(sampler: Any) -> Iterable[int]:
    if sampler.num_replicas != ranks.world_size():
        raise TransferConfigError(
            f"The train loader draws by a {type(sampler).__name__} that shares images out among "
            f"{sampler.num_replicas} processes, and there are {ranks.world_size()}, so a part is never drawn. Leave "
            "num_replicas= and rank= out."
        )
    return range(len(sampler.dataset))


KINDS: dict[Any, Callable[[Any], Iterable[int]]] = {
    BatchSampler: lambda sampler: _drawn(sampler.sampler),
    SequentialSampler: lambda sampler: range(len(sampler.data_source)),
    RandomSampler: lambda sampler: range(len(sampler.data_source)),
    WeightedRandomSampler: lambda sampler: sampler.weights.nonzero()[:, 0].tolist(),
    DistributedSampler: _shared_out,
}
