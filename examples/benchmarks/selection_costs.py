"""Measure what selecting neighbors costs: searches against the matrix product that they need, descriptors against PIL.

The rows are part of costs.py's table.
"""

import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from measuring import Row, Run, Settings
from selection_data import POSITIONS, QUERIES, SOURCE, Shape, Shares, decoder, in_memory, independent, natural, on_disk
from torch import Tensor

from lightning_transfer.functional import symmetric_kl_neighbors
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.descriptors import Binning
from lightning_transfer.methods.selective.distances import EPS
from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.pictures import Picture
from lightning_transfer.methods.selective.search import BLOCK, InMemory, Rows
from lightning_transfer.methods.selective.store import Store, Stored

GABOR, CONVOLUTIONAL, WIDE = (48, 20), (64, 64), (352, 100)  # filters and bins of banks
CACHED = 2**16  # numbers that numpy processes at once
ASKED_SLOWLY = 4  # queries in the slow searches
TOGETHER = {224: 10, 32: 64}  # by pixels: images that a describer gets at once
AT_ONCE = {224: 40, 32: 640}  # by pixels: images between two readings of the clock


def timed(call: Callable[[], object], *, parts: float = 1, times: int = 1) -> Run:
    """Return a run that times a call, in seconds of one of its parts."""

    def run() -> float:
        start = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - start) / (parts * times)

    return run


def sized(settings: Settings, num_queries: int, num_rows: int) -> tuple[int, int]:
    """Return the numbers of queries and source rows for the scale of the settings; queries are reduced less."""
    return max(2, round(num_queries * min(1, 4 * settings.scale))), round(num_rows * settings.scale)


@dataclass
class Search:
    """An exact search, and its last result."""

    queries: InMemory
    source: Rows
    k: int
    prune: bool | None
    found: Tensor | None = None

    def __call__(self) -> float:
        """Return the seconds."""
        filters, bins = self.source.shape
        root = torch.full((filters * bins,), filters**-0.5, dtype=torch.float64)
        start = time.process_time()
        _, self.found = exact_neighbors(self.queries, self.source, k=self.k, root=root, prune=self.prune)
        return time.process_time() - start


@dataclass
class MatrixProduct:
    """The arithmetic that a search needs, 4 * numbers * queries * rows operations, with rows in blocks."""

    num_queries: int
    num_rows: int
    numbers: int

    def __call__(self) -> float:
        """Return the seconds."""
        step = BLOCK // (2 * self.numbers)
        queries, rows = torch.rand(self.num_queries, 2 * self.numbers), torch.rand(step, 2 * self.numbers)
        products = torch.empty(self.num_queries, step)
        start = time.process_time()
        for first in range(0, self.num_rows, step):
            some = rows[: self.num_rows - first]
            torch.mm(queries, some.T, out=products[:, : len(some)])
        return time.process_time() - start


@lru_cache(1)
def plain_neighbors(settings: Settings, shape: Shape) -> tuple[InMemory, InMemory, Tensor, Tensor]:
    """Return queries, source, random weights, and the source sorted by the distance's definition in float64."""
    num_queries, num_rows = sized(settings, 512, 20_000)
    queries, source = in_memory(num_queries, shape, seed=QUERIES), in_memory(num_rows, shape, seed=SOURCE)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (rows.histograms.double().numpy() for rows in (queries, source))
    log_p, log_q = np.log(p + EPS), np.log(q + EPS)  # the only step that differs from the definition
    weight = weights.repeat_interleave(shape[1]).numpy() / 2
    distances, step = np.empty((num_queries, num_rows)), max(1, CACHED // len(weight))
    for start in range(0, num_rows, step):
        some, log_some = q[start : start + step], log_q[start : start + step]
        for number in range(num_queries):
            distances[number, start : start + step] = ((p[number] - some) * (log_p[number] - log_some)) @ weight
    return queries, source, weights, torch.from_numpy(distances.argsort(1, kind="stable"))


def agreeing(settings: Settings, shape: Shape, k: int) -> tuple[Run, Run]:
    """Count the queries whose neighbors are those of a plain search in float64, in the same order; and all queries."""
    queries, source, weights, order = plain_neighbors(settings, shape)
    k = min(k, len(source))

    def agree() -> float:
        target, rows = queries.histograms.view(-1, *shape), source.histograms.view(-1, *shape)
        _, found = symmetric_kl_neighbors(target, rows, k=k, filter_weights=weights)
        return float((found == order[:, :k]).all(1).sum())

    return agree, lambda: float(len(queries))


for shape, k in ((GABOR, 50), (GABOR, 500), (CONVOLUTIONAL, 50), (CONVOLUTIONAL, 500)):
    name = f"Neighbors as in float64 and in the same order, D={shape[0] * shape[1]:,}, k={k}"
    Row(name, least=100.0, unit="%", most=1, is_slow=shape != GABOR)(partial(agreeing, shape=shape, k=k))


@Row("Full scan from disk / matrix product, D=960, k=100", bar=1.20, most=5, size="full")
def scan_100(settings: Settings) -> tuple[Run, Run]:
    """Measure reading, scaling, logarithms, keeping the best and measuring again, beside the product."""
    return full_scan(settings, 100)


@Row("Full scan from disk / matrix product, D=960, k=500", bar=1.30, most=5, size="full")
def scan_500(settings: Settings) -> tuple[Run, Run]:
    """Measure the same with more to keep."""
    return full_scan(settings, 500)


def full_scan(settings: Settings, k: int) -> tuple[Run, Run]:
    """Return a search without pruning, and the product."""
    _, full = searches(settings, GABOR, (1024, 60_000), k)
    return full, MatrixProduct(len(full.queries), len(full.source), 960)


def searches(
    settings: Settings, shape: Shape, size: tuple[int, int], k: int, shares: Shares = natural
) -> tuple[Search, Search]:
    """Return a search that decides for itself whether to prune, and one without pruning."""
    num_queries, num_rows = sized(settings, *size)
    queries = in_memory(num_queries, shape, seed=QUERIES, shares=shares)
    source = on_disk(settings.folder, num_rows, shape, shares)
    k = min(k, num_rows)
    return Search(queries, source, k, prune=None), Search(queries, source, k, prune=False)


def pruning(
    settings: Settings, shape: Shape, size: tuple[int, int], k: int, shares: Shares = natural
) -> tuple[Run, Run]:
    """Return both searches; the second checks that both find the same."""
    automatic, full = searches(settings, shape, size, k, shares)

    def checked() -> float:
        seconds = full()
        if automatic.found is None or full.found is None or not torch.equal(automatic.found, full.found):
            raise RuntimeError("Pruning changed what is found.")
        return seconds

    return automatic, checked


@Row("Pruned scan / full scan, D=960, k=50", bar=0.50, most=5, size="full")
def pruned(settings: Settings) -> tuple[Run, Run]:
    """Measure pruning on the Gabor bank's descriptors."""
    return pruning(settings, GABOR, (1024, 60_000), 50)


@Row("Pruned scan / full scan, D=35,200, k=20", bar=0.10, most=3, size="wide")
def pruned_wide(settings: Settings) -> tuple[Run, Run]:
    """Measure pruning on a convolutional bank's, several layers of a hundred bins."""
    return pruning(settings, WIDE, (1800, 60_000), 20)


@Row("Scan left to itself / full scan, nothing to prune", bar=1.15, most=5, size="full")
def unprunable(settings: Settings) -> tuple[Run, Run]:
    """Measure what it costs to find out that nothing can be pruned."""
    return pruning(settings, GABOR, (1024, 60_000), 50, independent)


Slow = Callable[[InMemory, InMemory, int], Callable[[], object]]


def against(settings: Settings, slow: Slow) -> tuple[Run, Run]:
    """Return the seconds of a query of a slow search of the whole source, from a few queries, and of ours."""
    num_queries, num_rows = sized(settings, 512, 20_000)
    queries, source = in_memory(num_queries, GABOR, seed=QUERIES), in_memory(num_rows, GABOR, seed=SOURCE)
    few = InMemory(queries.histograms[:ASKED_SLOWLY], GABOR)
    k, shaped = min(50, num_rows), [rows.histograms.view(-1, *GABOR) for rows in (queries, source)]
    ours = partial(symmetric_kl_neighbors, *shaped, k=k)
    return timed(slow(few, source, k), parts=len(few)), timed(ours, parts=num_queries)


@Row("Neighbors, numpy broadcasting / ours", least=15.0, most=5, size="full")
def broadcasting(settings: Settings) -> tuple[Run, Run]:
    """Compare all source rows at once, in float32, with logarithms taken beforehand."""

    def slow(queries: InMemory, source: InMemory, k: int) -> Callable[[], object]:
        p, q = queries.histograms.numpy(), source.histograms.numpy()
        log_p, log_q = np.log(p), np.log(q)

        def search() -> list[np.ndarray]:
            rows = zip(p, log_p, strict=True)
            return [((row - q) * (log_row - log_q)).sum(1).argsort()[:k] for row, log_row in rows]

        return search

    return against(settings, slow)


@Row("Neighbors, Matlab-like loop / ours", least=80.0, most=5, size="full")
def loop(settings: Settings) -> tuple[Run, Run]:
    """Compare a query's histogram of one filter with all of the source's in float64, as in Matlab."""

    def slow(queries: InMemory, source: InMemory, k: int) -> Callable[[], object]:
        p, q = (
            rows.histograms.double().view(-1, *GABOR).transpose(0, 1).contiguous().numpy() for rows in (queries, source)
        )

        def search() -> list[np.ndarray]:
            found = []
            for number in range(p.shape[1]):
                distances = np.zeros(q.shape[1])
                for mine, theirs in zip(p[:, number], q, strict=True):
                    distances += (mine * np.log(mine / theirs) + theirs * np.log(theirs / mine)).sum(1) / 2
                found.append(distances.argsort()[:k])
            return found

        return search

    return against(settings, slow)


@cache
def peak_memory(settings: Settings, num_rows: int) -> float:
    """Return the peak bytes of a new process that searches so many rows on disk, with pruning and without."""
    num_queries, most = sized(settings, 1024, 600_000)
    source = on_disk(settings.folder, most, GABOR)
    numbers = (most, round(num_rows * settings.scale), num_queries)
    command = [sys.executable, __file__, str(source.store.folder), *map(str, numbers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_of_this_process(folder: Path, written: int, num_rows: int, num_queries: int) -> float:
    """Search, and return the peak bytes of this process."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    store = Store(folder, written, GABOR, POSITIONS)
    source = Stored(store, torch.arange(num_rows))
    queries = in_memory(num_queries, GABOR, seed=QUERIES)
    for prune in (None, False):
        Search(queries, source, min(100, num_rows), prune)()
    store.close()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would report what the parent process held
        return 1024.0 * int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if platform.system() == "Darwin" else 1024.0)


@Row("Peak memory, 600,000 source images", bar=1.5, unit="GB", most=1)
def memory(settings: Settings) -> tuple[Run, Run]:
    """Measure the peak, libraries included."""
    return partial(peak_memory, settings, 600_000), lambda: 1e9


@Row("Peak memory, 600,000 / 60,000 source images", bar=1.05, most=1)
def memory_growth(settings: Settings) -> tuple[Run, Run]:
    """Compare the peaks of two sizes: memory does not grow with the source."""
    return partial(peak_memory, settings, 600_000), partial(peak_memory, settings, 60_000)


class Described:
    """Grey images of random pixels, and their describer: 32 filters of 15 x 15, 20 bins each."""

    def __init__(self, pixels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(TOGETHER[pixels], 1, pixels, pixels, generator=generator)
        self.numbers, self.pictures = list(range(len(self.images))), [Picture(image) for image in self.images]
        self.bank = FilterBank.gabor(sizes=(15,), orientations=16)
        self.describer = Describer(self.bank, torch.device("cpu"))
        self.edges = self.describer.response_counts(iter([(self.numbers, self.pictures)]))[0].edges(20)
        self.binning = Binning(self.edges)

    def ours(self) -> Run:
        """Return the seconds of an image."""
        count = partial(self.describer.counts, self.numbers, self.pictures, self.binning)
        return timed(count, parts=len(self.images), times=AT_ONCE[self.images.shape[2]] // len(self.images))

    def naive(self) -> Run:
        """Return the seconds of an image, image by image and filter by filter."""
        (filters,), ends = self.bank.buffers(), self.edges[:, [0, -1]].tolist()

        def describe() -> None:
            for image in self.images[:ASKED_SLOWLY]:
                for one, (low, high) in zip(filters, ends, strict=True):
                    torch.histc(F.conv2d(image[None], one[None]), bins=20, min=low, max=high)

        return timed(describe, parts=ASKED_SLOWLY)


def against_decoding(settings: Settings, side: int, pixels: int) -> tuple[Run, Run]:
    """Compare an image's descriptor with decoding the image."""
    return Described(pixels).ours(), timed(decoder(side, pixels), times=AT_ONCE[pixels])


def against_naive(settings: Settings, pixels: int) -> tuple[Run, Run]:
    """Compare an image's descriptor, filter by filter, with ours."""
    described = Described(pixels)
    return described.naive(), described.ours()


for side, pixels, bar, least in ((500, 224, 3.6, 10.0), (40, 32, 0.95, 30.0)):
    name = f"Descriptor / decoding, {pixels} pixels"
    Row(name, bar=bar, most=5)(partial(against_decoding, side=side, pixels=pixels))
    name = f"Descriptor, naive torch / ours, {pixels} pixels"
    Row(name, least=least, most=5, is_slow=pixels == 224)(partial(against_naive, pixels=pixels))


if __name__ == "__main__":
    print(peak_of_this_process(Path(sys.argv[1]), *map(int, sys.argv[2:])))
