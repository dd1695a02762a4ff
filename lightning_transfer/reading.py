"""Read samples of any dataset outside of training, in a given order, a batch at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.datasets import ControlFlowError, load
from lightning_transfer.errors import TransferConfigError

Samples = list[tuple[int, Any]]  # each with its index


def in_order(dataset: Dataset[Any], indices: Sequence[int], *, size: int, workers: Mapping[str, Any]) -> Iterator[Any]:
    """Yield samples in the order of their indices, a batch at a time.

    Args:
        dataset: of the samples.
        indices: which of them.
        size: of a batch.
        workers: options of a DataLoader that say who reads, and what becomes of a list of samples.
    """
    generator = torch.Generator()  # without one, opening a loader draws from the program's random state
    options: dict[str, Any] = {"collate_fn": list, "generator": generator, **workers}
    yield from DataLoader(dataset, batch_size=size, sampler=indices, **options)


def readable(
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    of: str,
    size: int,
    workers: Mapping[str, Any],
    forgives: bool = False,
) -> Iterator[Samples]:
    """Yield uncollated samples, each with its index.

    Args:
        dataset: of the samples.
        indices: which of them.
        of: "target" or "source", for messages.
        size: of a batch.
        workers: options of a DataLoader that say who reads.
        forgives: whether unreadable samples are skipped.

    Raises:
        TransferConfigError: none could be read.
    """
    reasons: list[str] = []
    for tried in in_order(_Tried(dataset, of, forgives), indices, size=size, workers=workers):
        reasons += [why for _, _, why in tried if why]
        if samples := [(index, sample) for index, sample, why in tried if not why]:
            yield samples
    if reasons and len(reasons) == len(indices):
        raise TransferConfigError(f"No {of} image can be read: {reasons[0]}")


class _Tried(Dataset[tuple[int, Any, str]]):
    """Samples with their indices; if errors are forgiven, the reason why a sample could not be read."""

    def __init__(self, dataset: Dataset[Any], of: str, forgives: bool) -> None:
        self.dataset, self.of, self.forgives = dataset, of, forgives

    def __getitem__(self, index: int) -> tuple[int, Any, str]:
        try:
            return index, load(self.dataset, index, of=self.of), ""
        except Exception as error:
            if not self.forgives or isinstance(error, ControlFlowError):
                raise
            return index, None, f"{type(error).__name__}: {error}"
