"""Stream source batches without end, in an order and with augmentation that a resumed run repeats exactly."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.datasets import collate, load
from lightning_transfer.randomness import seed_of, seeded
from lightning_transfer.source.task import SourceTask

Key = tuple[int, list[int]]  # of a batch: its first position in the endless order, its indices in the dataset


class SourceBatch(NamedTuple):
    """Holds the source samples of one step.

    Attributes:
        indices: (batch,) of the samples in the dataset.
        samples: the collated samples.
    """

    indices: Tensor
    samples: Any


Order = Callable[[range], list[int]]  # the dataset's indices at positions of an endless order


class SourceStream:
    """Draws source batches without end, divided among ranks; by default every pass over the data is a new permutation.

    The order depends only on (seed, position). `position` counts the images that all ranks together have drawn, so a
    run that resumes from it, even with another number of ranks or workers, continues exactly there. Random augmentation
    by torch (on the CPU), numpy or random is seeded with the same seed and position, and does not change the program's
    own random state.

    Args:
        source: the task whose images are drawn.
        batch_size: images in each batch of a rank.
        rank: number of this process.
        num_ranks: how many processes share the stream.
        order: returns the samples at positions; by default one permutation after the other.
        workers: options of a DataLoader that say which processes read; by default this one.
        pin_memory: whether batches are put where an accelerator can copy them from while it computes.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
        >>> stream = SourceStream(SourceTask(data, num_classes=4), batch_size=3)
        >>> len(stream.next_batch().indices), stream.position
        (3, 3)
    """

    def __init__(
        self,
        source: SourceTask,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        order: Order | None = None,
        workers: Mapping[str, Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.source = source
        self.order = order or Shuffled(source.num_images, source.seed)
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.options = {**(workers or {}), "pin_memory": pin_memory}
        self.position = 0
        self._batches: Iterator[SourceBatch] | None = None

    def next_batch(self) -> SourceBatch:
        """Draw the next batch of this rank."""
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self.position += self.batch_size * self.num_ranks
        return batch

    def seek(self, position: int) -> None:
        """Continue from a position as if everything before it had been drawn."""
        self.close()
        self.position = position

    def close(self) -> None:
        """Close the loader and its workers; the position is kept."""
        self._batches = None

    def _open(self) -> Iterator[SourceBatch]:
        loader = DataLoader(
            _Reproducible(self.source),
            batch_sampler=self._keys(),
            collate_fn=_collate,
            generator=torch.Generator(),  # without it a new loader draws from the program's random state
            **self.options,
        )
        try:
            return iter(loader)
        except Exception as error:  # some systems pickle the dataset for each worker
            error.add_note("To read source images in this process, without workers: SourceTask(num_workers=0).")
            raise

    def _keys(self) -> Iterator[list[Key]]:
        """Yield the key of each of this rank's batches, from the position on."""
        start = self.position + self.rank * self.batch_size
        while True:
            yield [(start, self.order(range(start, start + self.batch_size)))]
            start += self.batch_size * self.num_ranks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}


class Shuffled:
    """Orders samples so that every turn has each of them once, in a new permutation.

    Args:
        num_samples: of the dataset.
        seed: of the order.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed

    def __call__(self, positions: range) -> list[int]:
        """Return the samples at positions."""
        found: list[int] = []
        for turn, part in in_turns(positions, self.num_samples):
            found += permutation(self.num_samples, self.seed, turn)[part].tolist()
        return found


def in_turns(positions: range, length: int) -> Iterator[tuple[int, slice]]:
    """Yield the turns that positions of an endless order are in, each with its part.

    >>> [*in_turns(range(3, 9), 4)]
    [(0, slice(3, 4, None)), (1, slice(0, 4, None)), (2, slice(0, 1, None))]
    """
    position = positions.start
    while position < positions.stop:
        turn, offset = divmod(position, length)
        end = min(length, offset + positions.stop - position)
        yield turn, slice(offset, end)
        position += end - offset


@lru_cache(maxsize=4)
def permutation(num: int, seed: int, turn: int) -> Tensor:
    """Return (num,) sample numbers in the order of a turn."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed_of(seed, turn)))


class _Reproducible(Dataset[SourceBatch]):
    """Reads the user's dataset a batch at a time, with the random state of the batch's position in the stream."""

    def __init__(self, source: SourceTask) -> None:
        self.dataset, self.seed = source.dataset, source.seed  # only what a worker process needs

    def __getitems__(self, keys: list[Key]) -> list[tuple[int, Any]]:
        ((position, indices),) = keys
        with seeded(self.seed, position):
            return [(index, load(self.dataset, index, of="source")) for index in indices]


def _collate(samples: list[tuple[int, Any]]) -> SourceBatch:
    return SourceBatch(torch.tensor([index for index, _ in samples]), collate(samples, of="source"))
