"""Rule out pairs of descriptors by a lower bound of their distance that is cheap to compute (ours).

2 sum w (sqrt p - sqrt q)^2 is never more than the distance D, and an orthonormal projection of the roots, with the
residual's length as one more coordinate, only lowers it. So few coordinates are compared first, and the distance is
computed only if the bound is below an estimate of the query's k-th distance.
"""

import math
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.methods.selective.pictures import spread
from lightning_transfer.methods.selective.search import (
    BLOCK,
    Nearest,
    Packed,
    Rows,
    blocks,
    cached,
    kept_for,
    numbered,
    places_of,
)

COORDINATES = (32, 64, 128, 256)  # of the projection: the cheapest number is chosen
COARSE = 8  # numbers that a filter's bins are projected to first
FITTED = 512  # rows that the projection is fitted to
TRIED = 1024, 64  # other rows, and queries, on which the cost of pruning is estimated
LIKELY = 0.95  # share of the queries whose k-th distance the estimate has to exceed
SCORES = 2**19  # held at once
COMPARED = 2**19  # numbers of source rows that are compared one by one while they are in the cache
CLEAR = 0.003  # share of the k-th distance that is searched beyond it, more than the error of float32
ROUNDING = 1e-5  # largest error of float32 in a squared length; the largest one seen was 5e-6

# cost of a pair, in multiplications: measured, accurate to about ten percent
SELECT = 96  # to compare its bound
SINGLE = 10  # times its numbers, to compute a single distance
SKETCH = 80  # times its numbers, to sketch a source row
WORTH = 0.6  # share of a full scan's cost below which pruning is used


class Sketcher:
    """Projects descriptors to a few coordinates whose distances bound theirs from below.

    Args:
        sample: (rows, numbers) flat histograms that the projection is fitted to.
        root: (numbers,) root of the weights.
        num_bins: bins a filter.
    """

    def __init__(self, sample: Tensor, root: Tensor, num_bins: int) -> None:
        self.num_bins = num_bins
        self.root = root[::num_bins].float()  # of a filter: the same for all of its bins
        by_filter = sample.float().sqrt().unflatten(1, (-1, num_bins))
        self.coarse = _top(by_filter.flatten(0, 1), COARSE)
        fine = self._fine(sample)
        mean = fine.mean(0, keepdim=True)
        self.basis = torch.linalg.qr(torch.cat([mean.T, _top(fine - mean, COORDINATES[-1])], 1).double())[0].float()

    def _fine(self, histograms: Tensor) -> Tensor:
        """Return (rows, coarse * filters) roots, the bins of each filter projected to few numbers."""
        fine = torch.empty(self.coarse.shape[1], len(histograms), len(self.root))
        for some in cached(*histograms.shape):
            roots = histograms[some].float().sqrt().view(-1, self.num_bins)
            turned = self.coarse.T @ roots.T  # four times as fast as the other way round
            fine[:, some] = turned.unflatten(1, (-1, len(self.root)))
        return fine.mul_(self.root).transpose(0, 1).flatten(1)

    def __call__(self, histograms: Tensor) -> Tensor:
        """Return (rows, coordinates + 2): the last two are the residual and the squared length of the whole."""
        length = histograms.float() @ self.root.square().repeat_interleave(self.num_bins)
        return _with_residual(self._fine(histograms) @ self.basis, length)

    def shortened(self, sketches: Tensor, num: int) -> Tensor:
        """Return sketches of the first coordinates only."""
        return _with_residual(sketches[:, :num], sketches[:, -1])


def _with_residual(coordinates: Tensor, length: Tensor) -> Tensor:
    rest = length * (1 + ROUNDING) - coordinates.square().sum(1)  # slightly too long, which only lowers the bound
    residual = rest.clamp_(min=0).sqrt_()
    return torch.cat([coordinates, residual[:, None], length[:, None]], 1)


def _scores(mine: Tensor, theirs: Tensor, *, residuals: bool) -> Tensor:
    """Return (n, rows) scores of sketches: the squared length of the query minus half of the bound.

    Without residuals it is half of a likely distance instead of the bound: residuals are mostly noise, which differs
    in every image.
    """
    compared = slice(-1 if residuals else -2)
    scores: Tensor = torch.addmm(theirs[:, -1], mine[:, compared], theirs[:, compared].T, beta=-1, alpha=2)
    return scores


def _top(rows: Tensor, num: int) -> Tensor:
    """Return (numbers, num) leading directions of rows, from the smaller of their two products."""
    if len(rows) >= rows.shape[1]:
        vectors: Tensor = torch.linalg.eigh((rows.T @ rows).double())[1]
        return vectors.flip(1)[:, :num].float()
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    is_real = values.flip(0)[:num] > 1e-9 * values[-1]
    top: Tensor = torch.linalg.qr(rows.T @ vectors.flip(1)[:, :num][:, is_real])[0].float()
    return top


def pruned_scan(queries: Tensor, packed: Packed, source: Rows, k: int, prune: bool | None) -> Nearest | None:
    """Return the nearest rows in float32, as `search.scan` does; None if pruning is not worth its cost.

    Args:
        queries: (n, numbers) flat histograms.
        packed: the same, packed.
        source: flat histograms.
        k: how many to find; every row that may be nearer than a query's `below` is found.
        prune: whether to prune; None to decide on a sample.
    """
    if prune is False or (prune is None and SKETCH / (2 * len(queries)) > WORTH):
        return None
    fitted = torch.tensor(spread(len(source), FITTED))
    sketcher = Sketcher(source.take(fitted), packed.root, source.shape[1])
    cost, coordinates, ratio = _cheapest(queries, packed, source, sketcher, k)
    if prune is None and cost > WORTH:
        return None
    sketcher.basis = sketcher.basis[:, :coordinates]
    return _scan(sketcher(queries), packed, source, sketcher, k, ratio)


def _cheapest(queries: Tensor, packed: Packed, source: Rows, sketcher: Sketcher, k: int) -> tuple[float, int, float]:
    """Return the least cost as a share of a full scan, and its number of coordinates, from a sample.

    The third value is a factor: times its likely k-th distance, nearly every query's true k-th distance is below it.
    """
    asked = torch.arange(0, len(queries), max(1, len(queries) // TRIED[1]))
    tried = torch.arange(min(FITTED // 2, len(source) - 1), len(source), max(1, len(source) // TRIED[0]))[: TRIED[0]]
    histograms, sides = source.take(tried), packed.queries[asked]
    parts = map(packed.rows, histograms.split(max(1, BLOCK // sides.shape[1])))
    scores = torch.cat([torch.addmm(own, sides, rows.T, beta=-1) for rows, own in parts], 1)
    nearest = min(max(1, round(k * len(tried) / len(source))), len(tried))
    distance = (packed.own[asked] - scores.topk(nearest).values[:, -1]) / 2
    mine, theirs = sketcher(queries[asked]), sketcher(histograms)
    costs = []
    for num in sorted({min(num, sketcher.basis.shape[1]) for num in COORDINATES}):
        short, others = sketcher.shortened(mine, num), sketcher.shortened(theirs, num)
        likely = 2 * (short[:, -1] - _scores(short, others, residuals=False).topk(nearest).values[:, -1])
        shares = distance / likely.clamp(min=ROUNDING * short[:, -1].max())
        ratio = max(1.0, float(shares.quantile(LIKELY)))  # at least 1: likely distances are not below the bounds
        is_left = 2 * (short[:, -1:] - _scores(short, others, residuals=True)) <= ratio * likely[:, None]
        compared = 2 * (num + SELECT) / packed.queries.shape[1]
        costs.append((SKETCH / (2 * len(queries)) + compared + SINGLE * float(is_left.float().mean()), num, ratio))
    return min(costs)


def _scan(mine: Tensor, packed: Packed, source: Rows, sketcher: Sketcher, k: int, ratio: float) -> Nearest:
    """Estimate a limit for each query from likely distances, then compare every pair whose bound is below the limit.

    A query whose k-th distance exceeds its limit, or nearly so, is searched once more with a higher limit.
    """
    likely, nearest = Nearest(len(mine), min(k, len(source))), Nearest(len(mine), kept_for(k, len(source)))
    with tempfile.TemporaryFile() as file:  # the sketches of a large source do not fit into memory

        def sketched(start: int, stop: int) -> Tensor:
            theirs = sketcher(source.read(start, stop))
            file.write(theirs.numpy().data)
            return theirs

        def kept(start: int, stop: int) -> Tensor:
            numbers = np.fromfile(file, dtype=np.float32, count=(stop - start) * mine.shape[1])
            return torch.from_numpy(numbers).view(stop - start, -1)

        for first, part in _parts(source, len(mine), sketched):
            likely.add(_scores(mine, part, residuals=False), first)
        likely.settle()
        asked = torch.arange(len(mine))
        nearest.below = ratio * 2 * (mine[:, -1] - likely.scores.amin(1))
        for _ in range(2):
            nearest.scores[asked], nearest.indices[asked] = -torch.inf, -1
            file.seek(0)
            for first, part in _parts(source, len(mine), kept):
                query, row = _below(nearest.below[asked], mine[asked], part)
                query, row = asked[query], first + row
                nearest.add_pairs(query, row, _single_scores(packed, source, query, row))
            nearest.settle()
            furthest = (packed.own[asked] - nearest.scores[asked].topk(k).values[:, -1]) / 2
            wanted = (1 + CLEAR) * furthest + CLEAR**2 * mine[asked, -1]
            is_beyond = wanted > nearest.below[asked]
            asked, wanted = asked[is_beyond], wanted[is_beyond]
            nearest.below[asked] = wanted
            if not len(asked):
                break
    return nearest


def _below(below: Tensor, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries, and positions of sketches whose bound is not above (queries,) distances, ordered by query."""
    longest = torch.maximum(mine[:, -1].max(), theirs[:, -1].max())
    enough = mine[:, -1] - below / 2 - ROUNDING * longest
    return places_of(_scores(mine, theirs, residuals=True) >= enough[:, None])


def _parts(source: Rows, num_queries: int, sketches: Callable[[int, int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield parts of the sketches whose scores fit into the processor's cache, after the row of their first sketch."""
    step = max(1, SCORES // num_queries)
    for start, stop in blocks(source, math.prod(source.shape)):
        block = sketches(start, stop)
        for first in range(0, len(block), step):
            yield start + first, block[first : first + step]


def _single_scores(packed: Packed, source: Rows, query: Tensor, row: Tensor) -> Tensor:
    """Return the scores of single pairs, equal to those that `search.scan` computes with a matrix product."""
    import faiss

    scores = torch.empty(len(row))
    if not len(row):
        return scores
    row, order = row.sort(stable=True)
    unique, inverse = row.unique_consecutive(return_inverse=True)
    for near in unique.split(max(1, COMPARED // math.prod(source.shape))):
        rows, own = packed.rows(source.take(near))
        part = slice(*torch.searchsorted(row, near[[0, -1]] + torch.tensor([0, 1])).tolist())
        number = inverse[part] - inverse[part.start]
        column = numbered(number, len(near))
        ids = torch.full((len(near), int(column.max()) + 1), -1)
        ids[number, column] = query[order[part]]
        products = torch.empty(ids.shape)
        pointers = (faiss.swig_ptr(tensor.numpy()) for tensor in (products, rows, packed.queries, ids))
        compare = faiss.fvec_inner_products_by_idx  # type: ignore[attr-defined]
        compare(*pointers, rows.shape[1], *ids.shape)
        scores[order[part]] = products[number, column] - own[number]
    return scores
