"""Find the nearest source descriptors of every target descriptor in float32, in one pass over the source.

Blocks of the source are read, compared by one matrix product, and dropped: the source need not fit into memory.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.methods.selective.distances import logs

BLOCK = 2**22  # numbers of a block of the source that are held at once, so that they fit into the processor's cache
SEVERAL = 8  # rows of a call at least, so that its overhead is small
LEAST = 256  # rows of a block at least, so that a matrix product is efficient
CACHED = 2**16  # numbers in one step if memory is slower than arithmetic
SAMPLE = 256  # rows whose mean is subtracted
SLACK = 32  # how many more than k are kept, because float32 may confuse the order
CPU = torch.device("cpu")


class Rows(Protocol):
    """Gives flat histograms, from memory or from disk."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of filters, and of bins of each."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop, (rows, filters * bins)."""

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows, in rising order."""


@dataclass(frozen=True)
class InMemory:
    """Gives the rows of a tensor."""

    histograms: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.histograms)

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self.histograms[start:stop]

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows."""
        return self.histograms[rows]


def searched_on(device: torch.device) -> torch.device:
    """Return where histograms of a device are compared: there with CUDA, otherwise on the CPU."""
    return device if device.type == "cuda" else CPU


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Compute without gradients and in float32, in a training of any precision."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def full_products() -> Iterator[None]:
    """Multiply matrices of float32 in float32, whatever `torch.set_float32_matmul_precision` allows.

    The bounds of a pruned search hold for the rounding of float32, not for that of TF32 or bfloat16.
    """
    backends: Any = torch.backends
    with ExitStack() as undo:
        if hasattr(backends, "fp32_precision"):
            shared = backends.fp32_precision  # also what a kind returns that has no precision of its own
            for kind in (backends.cuda.matmul, backends.mkldnn.matmul):
                before = "none" if kind.fp32_precision == shared else kind.fp32_precision
                undo.callback(setattr, kind, "fp32_precision", before)
                kind.fp32_precision = "ieee"
        else:  # torch before 2.9
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def kept_for(k: int, num_rows: int) -> int:
    """Return how many rows to keep to find k."""
    return min(k + max(SLACK, k // 8), num_rows)


class Nearest:
    """Keeps the k best scores of every query, from scores that come block by block.

    Only scores above a query's current k-th are used, which soon are very few. They wait until there are enough of them
    for a merge. On another device every block is merged, because to count these scores the CPU would wait for it.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device = CPU) -> None:
        self.scores = torch.full((num_queries, k), -torch.inf, device=device)
        self.indices = torch.full((num_queries, k), -1, device=device)
        self.is_on_cpu = device == CPU
        self.below = torch.full((num_queries,), torch.inf)  # every row nearer than this was compared
        self.k = k
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, first: int) -> None:
        """Merge (queries, block) scores of source rows from `first` on."""
        if self.is_on_cpu and bool(((least := self.scores.amin(1, keepdim=True)) > -torch.inf).all()):
            query, place = places_of(scores > least)
            self.add_pairs(query, place + first, scores[query, place])
        else:
            best, places = scores.topk(min(self.k, scores.shape[1]), sorted=False)
            self._merge(best, places + first)

    def add_pairs(self, query: Tensor, index: Tensor, score: Tensor) -> None:
        """Add single scores, sorted by query; they wait until there are enough for a merge."""
        if len(query):
            number = numbered(query, len(self.scores))
            scores = torch.full((len(self.scores), int(number.max()) + 1), -torch.inf)
            indices = torch.full(scores.shape, -1)
            scores[query, number], indices[query, number] = score, index
            self._waiting.append((scores, indices))
            if sum(scores.shape[1] for scores, _ in self._waiting) > self.k:
                self.settle()

    def settle(self) -> None:
        """Merge the waiting scores."""
        if self._waiting:
            scores, indices = zip(*self._waiting, strict=True)
            self._waiting = []
            self._merge(torch.cat(scores, 1), torch.cat(indices, 1))

    def _merge(self, scores: Tensor, indices: Tensor) -> None:
        scores, indices = torch.cat([self.scores, scores], 1), torch.cat([self.indices, indices], 1)
        self.scores, order = scores.topk(self.k, sorted=False)
        self.indices = indices.gather(1, order)


def places_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the chosen elements, by row; with numpy, which is several times as fast as torch."""
    flat = torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return flat // chosen.shape[1], flat % chosen.shape[1]


def numbered(groups: Tensor, num_groups: int) -> Tensor:
    """Return the position of each element in its group, from (n,) rising groups.

    >>> numbered(torch.tensor([0, 0, 2, 2, 2]), 3)
    tensor([0, 1, 0, 1, 2])
    """
    counts = groups.bincount(minlength=num_groups)
    return torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups]


class Packed:
    """Turns queries and source rows into two sides of an inner product, centred to reduce the error of float32."""

    def __init__(self, queries: Tensor, source: Rows, root: Tensor) -> None:
        self.root, self.weights = root, root.square().float()
        sample = source.read(0, min(len(source), SAMPLE))
        self._middle, self._log_middle = sample.mean(0), logs(sample).mean(0)
        self._buffer = torch.empty(0)
        numbers = queries.shape[1]
        self.queries = torch.empty(len(queries), 2 * numbers)
        self.own = self._pack(queries, self.queries[:, numbers:], self.queries[:, :numbers])
        self.queries.mul_(self.weights.repeat(2))  # weights on one side are enough

    def rows(self, histograms: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rows, 2 * numbers) to multiply with `queries`, and each row's own part; valid until the next call."""
        num_rows, numbers = histograms.shape
        if num_rows > len(self._buffer):  # reused: allocating memory takes as long as the arithmetic
            self._buffer = torch.empty(num_rows, 2 * numbers)
        packed = self._buffer[:num_rows]
        return packed, self._pack(histograms, packed[:, :numbers], packed[:, numbers:])

    def _pack(self, histograms: Tensor, log_side: Tensor, side: Tensor) -> Tensor:
        """Write the centred logarithms and histograms, and return (rows,) each row's own part."""
        own = torch.empty(len(histograms))
        for some in cached(*histograms.shape):
            p, log_p = histograms[some], logs(histograms[some])  # in their own precision; float32 once centred
            torch.sub(log_p, self._log_middle, out=log_side[some])
            torch.sub(p, self._middle, out=side[some])
            own[some] = (log_side[some] * side[some]) @ self.weights
        return own

    def distances(self, scores: Tensor) -> Tensor:
        """Return distances from (queries, ...) scores, which are inner products minus each row's own part."""
        return (self.own[:, None] - scores) / 2


def scan(packed: Packed, source: Rows, k: int, device: torch.device = CPU) -> Nearest:
    """Return the k nearest rows in float32, and a few more, from one pass over the source; the result is on the CPU."""
    nearest, queries = Nearest(len(packed.queries), kept_for(k, len(source)), device), packed.queries.to(device)
    for start, stop in blocks(source, 2 * math.prod(source.shape), least=LEAST):
        rows, own = packed.rows(source.read(start, stop))
        nearest.add(torch.addmm(own.to(device), queries, rows.to(device).T, beta=-1), start)
    nearest.settle()
    nearest.scores, nearest.indices = nearest.scores.to("cpu"), nearest.indices.to("cpu")
    return nearest


def cached(num_rows: int, numbers: int) -> Iterator[slice]:
    """Return slices of all rows, so small that several arrays of them fit into the processor's cache."""
    step = max(SEVERAL, CACHED // numbers)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def blocks(source: Rows, numbers: int, *, least: int = 1) -> list[tuple[int, int]]:
    """Return the first and last row of the blocks of a source, with `numbers` in each row.

    A block has at most `BLOCK` numbers, but at least `least` rows: above 32 MB the C library allocates memory anew each
    time.
    """
    step = max(least, BLOCK // numbers)
    return [(start, min(start + step, len(source))) for start in range(0, len(source), step)]
