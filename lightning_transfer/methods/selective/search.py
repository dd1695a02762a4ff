"""What float32 takes for the nearest source descriptors of every target descriptor, from one pass over the source.

Blocks of the source are read, compared by one matrix product, and forgotten: the source need not fit into memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.methods.selective.distances import logs

BLOCK = 2**22  # numbers of a block of the source that are held at once: more would leave the processor's cache
SEVERAL = 8  # rows at least, for a call to be worth its while
LEAST = 256  # rows of a block, for a matrix product to be worth its name
CACHED = 2**16  # numbers that are worked on at once where arithmetic is cheaper than memory
SAMPLE = 256  # rows whose mean is taken out
SLACK = 32  # how many more than k are kept, for what float32 may have confused


class Rows(Protocol):
    """Flat histograms, wherever they lie."""

    def __len__(self) -> int:
        """How many there are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Filters, and bins of each."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, (rows, filters * bins)."""

    def take(self, rows: Tensor) -> Tensor:
        """Chosen rows, in rising order."""


@dataclass(frozen=True)
class InMemory:
    """Rows of a tensor."""

    histograms: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.histograms)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop."""
        return self.histograms[start:stop]

    def take(self, rows: Tensor) -> Tensor:
        """Chosen rows."""
        return self.histograms[rows]


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No gradients, and float32 whatever precision the training around it has."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def kept_for(k: int, num_rows: int) -> int:
    """How many are kept where k are sought."""
    return min(k + max(SLACK, k // 8), num_rows)


class Nearest:
    """The running k best of every query, under scores that come block by block.

    Kept by threshold: of a block only what beats a query's k-th so far is looked at, which soon is next to nothing.
    What a block has left waits to be merged with that of others.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.scores = torch.full((num_queries, k), -torch.inf)
        self.indices = torch.full((num_queries, k), -1)
        self.below = torch.full((num_queries,), torch.inf)  # what is nearer was not passed over unseen
        self.k = k
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, first: int) -> None:
        """Merge (queries, block) scores of source rows from `first` on."""
        least = self.scores.amin(1, keepdim=True)
        if bool((least == -torch.inf).any()):
            best, places = scores.topk(min(self.k, scores.shape[1]), sorted=False)
            self._merge(best, places + first)
        else:
            query, place = places_of(scores > least)
            self.add_pairs(query, place + first, scores[query, place])

    def add_pairs(self, query: Tensor, index: Tensor, score: Tensor) -> None:
        """Let single scores wait, given by rising query, until there are enough of them to be worth a merge."""
        if len(query):
            number = numbered(query, len(self.scores))
            scores = torch.full((len(self.scores), int(number.max()) + 1), -torch.inf)
            indices = torch.full(scores.shape, -1)
            scores[query, number], indices[query, number] = score, index
            self._waiting.append((scores, indices))
            if sum(scores.shape[1] for scores, _ in self._waiting) > self.k:
                self.settle()

    def settle(self) -> None:
        """Merge what waits."""
        if self._waiting:
            scores, indices = zip(*self._waiting, strict=True)
            self._waiting = []
            self._merge(torch.cat(scores, 1), torch.cat(indices, 1))

    def _merge(self, scores: Tensor, indices: Tensor) -> None:
        scores, indices = torch.cat([self.scores, scores], 1), torch.cat([self.indices, indices], 1)
        self.scores, order = scores.topk(self.k, sorted=False)
        self.indices = indices.gather(1, order)


def places_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is chosen, by row: numpy finds few among many several times as fast as torch."""
    flat = torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return flat // chosen.shape[1], flat % chosen.shape[1]


def numbered(groups: Tensor, num_groups: int) -> Tensor:
    """The place of each element in its own group, from (n,) rising groups.

    >>> numbered(torch.tensor([0, 0, 2, 2, 2]), 3)
    tensor([0, 1, 0, 1, 2])
    """
    counts = groups.bincount(minlength=num_groups)
    return torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups]


class Packed:
    """Queries and source rows as the two sides of an inner product, centred so that float32 errs less."""

    def __init__(self, queries: Tensor, source: Rows, root: Tensor) -> None:
        self.root, self.weights = root, root.square().float()
        sample = source.read(0, min(len(source), SAMPLE))
        self._middle, self._log_middle = sample.mean(0), logs(sample).mean(0)
        self._buffer = torch.empty(0)
        numbers = queries.shape[1]
        self.queries = torch.empty(len(queries), 2 * numbers)
        self.own = self._pack(queries, self.queries[:, numbers:], self.queries[:, :numbers])
        self.queries.mul_(self.weights.repeat(2))  # on one side is enough

    def rows(self, histograms: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 2 * numbers) to multiply with `queries`, and (rows,) each row's own part; until the next call."""
        num_rows, numbers = histograms.shape
        if num_rows > len(self._buffer):  # used again and again: fresh memory costs as much as the arithmetic
            self._buffer = torch.empty(num_rows, 2 * numbers)
        packed = self._buffer[:num_rows]
        return packed, self._pack(histograms, packed[:, :numbers], packed[:, numbers:])

    def _pack(self, histograms: Tensor, log_side: Tensor, side: Tensor) -> Tensor:
        """Write the logarithms and the histograms, both centred; (rows,) each row's own part."""
        own = torch.empty(len(histograms))
        for some in cached(*histograms.shape):
            p, log_p = histograms[some], logs(histograms[some])  # in their own precision; float32 once centred
            torch.sub(log_p, self._log_middle, out=log_side[some])
            torch.sub(p, self._middle, out=side[some])
            own[some] = (log_side[some] * side[some]) @ self.weights
        return own

    def distances(self, scores: Tensor) -> Tensor:
        """Distances from (queries, ...) scores: inner products, less what the row is to itself."""
        return (self.own[:, None] - scores) / 2


def scan(packed: Packed, source: Rows, k: int) -> Nearest:
    """What float32 takes for the nearest, from one pass over the source: k, and a few more."""
    nearest = Nearest(len(packed.queries), kept_for(k, len(source)))
    for start, stop in blocks(source, 2 * math.prod(source.shape), least=LEAST):
        rows, own = packed.rows(source.read(start, stop))
        nearest.add(torch.addmm(own, packed.queries, rows.T, beta=-1), start)
    nearest.settle()
    return nearest


def cached(num_rows: int, numbers: int) -> Iterator[slice]:
    """All rows, so few at once that several arrays of them stay in the processor's cache."""
    step = max(SEVERAL, CACHED // numbers)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def blocks(source: Rows, numbers: int, *, least: int = 1) -> list[tuple[int, int]]:
    """First and last row of the blocks of a source that are held at once, at so many numbers a row.

    Not more than `BLOCK` where `least` rows are fewer: beyond 32 MB the C library fetches fresh memory every time.
    """
    step = max(least, BLOCK // numbers)
    return [(start, min(start + step, len(source))) for start in range(0, len(source), step)]
