"""Read samples of any dataset outside of training, in a given order, a batch at a time."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_transfer.datasets import ControlFlowError, labels_in_parts, load
from lightning_transfer.errors import TransferConfigError

Samples = list[tuple[int, Any]]  # each with its index
Found = TypeVar("Found")
PATIENCE = 120  # seconds, then a process is taken to hang


def apart(read: Callable[[], Found], num_workers: int | None) -> Found:
    """Return what `read` returns, called in a process of its own if a dataset that it reads may get workers later.

    A file that a dataset opens with its first sample would otherwise be open in this process, and workers forked from
    it would share one position in the file: each would get bytes of another's sample, without an error.

    Args:
        read: the function; its result can be pickled.
        num_workers: that the dataset may get; None if this is not known.
    """
    (found,) = each_apart(lambda: [read()], num_workers)
    return found


def each_apart(read: Callable[[], Iterable[Found]], num_workers: int | None) -> list[Found]:
    """Return all that `read` yields, called as in `apart`; if that process fails or hangs, warn and read here."""
    if num_workers == 0 or sys.platform != "linux" or get_worker_info():  # elsewhere none is forked, nor by a worker
        return [*read()]
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": PATIENCE}
    options |= {"batch_size": None, "collate_fn": lambda found: found, "generator": torch.Generator()}
    try:
        return [*DataLoader(_Yielded(read), **options)]
    except Exception as error:  # such a process has no GPU, for example
        reason = _reason(error)
    found = [*read()]  # outside of the handler: an error of its own is not shown as a consequence
    warnings.warn(
        f"Images were read in the program's own process, because another one could not ({reason}). If the dataset "
        "opens a file with its first image, its workers now share that file and read wrong images: open it in each "
        "worker, or pass num_workers=0 to your loader.",
        stacklevel=2,
    )
    return found


def _reason(error: Exception) -> str:
    """Return the line that says what went wrong; a worker's error holds its traceback before it, and notes after it."""
    lines = str(error).splitlines() or [type(error).__name__]
    after = max((number for number, line in enumerate(lines) if line.startswith("  ")), default=-1) + 1
    return lines[min(after, len(lines) - 1)]


class _Yielded(IterableDataset[Any]):
    """Gives the values that a function yields."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read())


def labels_of(
    dataset: Dataset[Any], read: Callable[[Any], Any] | None = None, *, num_workers: int | None = 0
) -> list[int]:
    """Return the class of every image.

    Args:
        dataset: the images.
        read: as in `labels_in_parts`.
        num_workers: as in `apart`.

    Raises:
        TransferConfigError: an image has no class number.
    """
    parts = each_apart(lambda: labels_in_parts(dataset, read), num_workers)
    return [label for part in parts for label in part]


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
    forgives: bool,
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
    """Gives samples with their indices; if errors are forgiven, the reason why a sample could not be read."""

    def __init__(self, dataset: Dataset[Any], of: str, forgives: bool) -> None:
        self.dataset, self.of, self.forgives = dataset, of, forgives

    def __getitem__(self, index: int) -> tuple[int, Any, str]:
        try:
            return index, load(self.dataset, index, of=self.of), ""
        except Exception as error:
            if not self.forgives or isinstance(error, ControlFlowError):
                raise
            return index, None, f"{type(error).__name__}: {error}"
