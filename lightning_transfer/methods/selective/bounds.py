"""Pairs of descriptors ruled out by a lower bound of their distance that is cheap to take (ours).

2 sum w (sqrt p - sqrt q)^2 is never more than the distance D, and an orthonormal projection of the roots, with the
residual's length as one more coordinate, only lowers it. Few coordinates are then compared in place of all, and the
distance is taken only where the bound is below what the k-th of a query's likely distances foretells.
"""

import math
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

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

COORDINATES = (32, 64, 128, 256)  # of the projection: as many as pay best
COARSE = 8  # numbers that a filter's bins are projected to first
FITTED = 512  # rows that the projection is fitted to
TRIED = 1024, 64  # other rows, and queries, on which it is seen whether pruning pays
LIKELY = 0.95  # of the queries whose k-th distance is to be foreseen
SCORES = 2**19  # held at once
COMPARED = 2**19  # numbers of source rows that are compared one by one while they are in the cache
CLEAR = 0.003  # by how much more than its k-th distance is searched, so that float32 cannot mistake what is left out
ROUNDING = 1e-5  # of a squared length: what float32 may err in it; 5e-6 was the most seen

# what a pair costs, in numbers multiplied: measured, good to some ten percent
SELECT = 96  # to compare its bound
SINGLE = 10  # times its numbers, to take its distance by itself
SKETCH = 80  # times its numbers, to sketch a source row
WORTH = 0.6  # of a full scan, at which pruning is tried


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
        """(rows, coarse * filters) roots, the bins of each filter projected to few numbers."""
        fine = torch.empty(self.coarse.shape[1], len(histograms), len(self.root))
        for some in cached(*histograms.shape):
            roots = histograms[some].float().sqrt().view(-1, self.num_bins)
            turned = self.coarse.T @ roots.T  # four times as fast as the other way round
            fine[:, some] = turned.unflatten(1, (-1, len(self.root)))
        return fine.mul_(self.root).transpose(0, 1).flatten(1)

    def __call__(self, histograms: Tensor) -> Tensor:
        """(rows, coordinates + 2): the last but one is the residual, the last the squared length of the whole."""
        length = histograms.float() @ self.root.square().repeat_interleave(self.num_bins)
        return _with_residual(self._fine(histograms) @ self.basis, length)

    def shortened(self, sketches: Tensor, num: int) -> Tensor:
        """What the first coordinates alone would have given."""
        return _with_residual(sketches[:, :num], sketches[:, -1])


def _with_residual(coordinates: Tensor, length: Tensor) -> Tensor:
    rest = length * (1 + ROUNDING) - coordinates.square().sum(1)  # rather too long a residual: it lowers the bound
    residual = rest.clamp_(min=0).sqrt_()
    return torch.cat([coordinates, residual[:, None], length[:, None]], 1)


def _scores(mine: Tensor, theirs: Tensor, *, residuals: bool) -> Tensor:
    """(n, rows) of sketches: what the squared length of the query is more than half the bound.

    Or than half of what the distance may well be, which leaves the residuals out: they are mostly noise, of which no
    two images' are alike.
    """
    compared = slice(-1 if residuals else -2)
    scores: Tensor = torch.addmm(theirs[:, -1], mine[:, compared], theirs[:, compared].T, beta=-1, alpha=2)
    return scores


def _top(rows: Tensor, num: int) -> Tensor:
    """(numbers, num) leading directions of rows, through the smaller of their two products."""
    if len(rows) >= rows.shape[1]:
        vectors: Tensor = torch.linalg.eigh((rows.T @ rows).double())[1]
        return vectors.flip(1)[:, :num].float()
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    is_real = values.flip(0)[:num] > 1e-9 * values[-1]
    top: Tensor = torch.linalg.qr(rows.T @ vectors.flip(1)[:, :num][:, is_real])[0].float()
    return top


def pruned_scan(queries: Tensor, packed: Packed, source: Rows, k: int, prune: bool | None) -> Nearest | None:
    """What float32 takes for the nearest, as `search.scan` finds it; None where pruning does not pay.

    Args:
        queries: (n, numbers) flat histograms.
        packed: the same, packed.
        source: flat histograms.
        k: how many are sought; all that may be nearer than a query's `below` is found.
        prune: True or False to do it or not, whatever it costs; None to see on a sample.
    """
    if prune is False or (prune is None and SKETCH / (2 * len(queries)) > WORTH):
        return None
    fitted = torch.arange(0, len(source), max(1, len(source) // FITTED))[:FITTED]
    sketcher = Sketcher(source.take(fitted), packed.root, source.shape[1])
    cost, coordinates, ratio = _cheapest(queries, packed, source, sketcher, k)
    if prune is None and cost > WORTH:
        return None
    sketcher.basis = sketcher.basis[:, :coordinates]
    return _scan(sketcher(queries), packed, source, sketcher, k, ratio)


def _cheapest(queries: Tensor, packed: Packed, source: Rows, sketcher: Sketcher, k: int) -> tuple[float, int, float]:
    """The least cost, full scan = 1, and with how many coordinates; from a sample of queries and source rows.

    The last is what the k-th distance of nearly every query is below, in likely ones.
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
        ratio = max(1.0, float(shares.quantile(LIKELY)))  # never below 1: likely distances are no less than the bounds
        is_left = 2 * (short[:, -1:] - _scores(short, others, residuals=True)) <= ratio * likely[:, None]
        compared = 2 * (num + SELECT) / packed.queries.shape[1]
        costs.append((SKETCH / (2 * len(queries)) + compared + SINGLE * float(is_left.float().mean()), num, ratio))
    return min(costs)


def _scan(mine: Tensor, packed: Packed, source: Rows, sketcher: Sketcher, k: int, ratio: float) -> Nearest:
    """Two passes: likely distances give each query one to stay below, then every pair whose bound does is compared.

    A query whose k-th distance turns out to be longer, or nearly so, is asked once more, to stay below that.
    """
    likely, nearest = Nearest(len(mine), min(k, len(source))), Nearest(len(mine), kept_for(k, len(source)))
    with tempfile.TemporaryFile() as file:  # one sketch a row: for a large source too much to hold

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
    """Queries, and places of sketches whose bound is not above (queries,) distances; by query."""
    longest = torch.maximum(mine[:, -1].max(), theirs[:, -1].max())
    enough = mine[:, -1] - below / 2 - ROUNDING * longest
    return places_of(_scores(mine, theirs, residuals=True) >= enough[:, None])


def _parts(source: Rows, num_queries: int, sketches: Callable[[int, int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Sketches, so many at once that their scores stay in the processor's cache, and the row of each part's first."""
    step = max(1, SCORES // num_queries)
    for start, stop in blocks(source, math.prod(source.shape)):
        block = sketches(start, stop)
        for first in range(0, len(block), step):
            yield start + first, block[first : first + step]


def _single_scores(packed: Packed, source: Rows, query: Tensor, row: Tensor) -> Tensor:
    """The scores of single pairs: what `search.scan` takes from a matrix product."""
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
