"""Find the exact nearest source descriptors of every target descriptor.

The nearest in float32 are measured again in float64 wherever the error of float32 could change the order. If a cheap
lower bound rules out nearly all pairs, only the others are compared; the result is the same.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lightning_transfer import ranks
from lightning_transfer.methods.selective.bounds import pruned_scan
from lightning_transfer.methods.selective.distances import pair_distances
from lightning_transfer.methods.selective.search import BLOCK, CPU, LEAST, Packed, Rows, full_products, kept_for, scan

QUERIES = 2**27  # numbers of packed queries held at once
MOST_QUERIES = 8192  # in one pass over the source
MERGED = 2**20  # neighbors of a process' lists that are exchanged at once
SAMPLE = 1024  # pairs that are measured again to estimate the error of float32
SAFETY = 2  # times the largest error seen
QUANTA = 2  # steps of float32 that an error is assumed to have at least


@full_products()
def exact_neighbors(
    queries: Rows,
    source: Rows,
    *,
    k: int,
    root: Tensor,
    prune: bool | None = None,
    all_in_double: bool = False,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of the source of every query.

    Args:
        queries: flat histograms.
        source: flat histograms.
        k: how many, at most as many as the source has.
        root: (numbers,) root of the weights.
        prune: whether a lower bound rules pairs out first; by default if it is cheaper on a sample.
        all_in_double: measure every distance again in float64, not only those that could be out of order.
        device: of the comparisons in float32; without pruning if it is not the CPU.

    Returns:
        Distances in float64 and indices, each (n, k), nearest first, equal distances by index; on the CPU.
    """
    most = min(MOST_QUERIES, max(1, QUERIES // (2 * math.prod(source.shape))))
    step = math.ceil(len(queries) / math.ceil(len(queries) / most))
    groups = (queries.read(start, min(start + step, len(queries))) for start in range(0, len(queries), step))
    found = [_of_group(group, source, k, root, prune, all_in_double, device) for group in groups]
    distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
    return distances, indices


def search_bytes(num_queries: int, k: int, shape: tuple[int, int]) -> int:
    """Return about how much memory a search takes, which does not depend on the size of the source."""
    numbers = math.prod(shape)
    group = min(num_queries, MOST_QUERIES, max(1, QUERIES // (2 * numbers)))
    blocks = 4 * BLOCK + 2 * group * max(LEAST, BLOCK // (2 * numbers))  # of the source, and their scores
    lists = 2 * num_queries * k + 10 * group * kept_for(k, 2**62)
    return 4 * (4 * group * numbers + blocks) + 8 * lists


def _of_group(
    queries: Tensor, source: Rows, k: int, root: Tensor, prune: bool | None, all_in_double: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    distances = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    left, asked = torch.arange(len(queries)), k
    while len(left):
        packed = Packed(queries[left], source, root)
        pruned = pruned_scan(queries[left], packed, source, asked, prune) if device == CPU else None
        nearest = pruned or scan(packed, source, asked, device)
        rough = packed.distances(nearest.scores).double()
        order = torch.from_numpy(np.argsort(rough.numpy(), axis=1))  # twice as fast as torch's
        rough, near = rough.gather(1, order), nearest.indices.gather(1, order)
        largest = nearest.scores.abs().masked_fill(nearest.scores.isinf(), 0).amax(1)
        scale = (packed.own.abs() + largest).double().clamp(min=1e-30)[:, None]
        found, near, error = _settle(
            queries[left], source, root, (rough, near), scale, k=k, all_in_double=all_in_double
        )
        is_sure = torch.minimum(rough[:, -1], nearest.below.double()) > rough[:, k - 1] + 2 * error
        if asked == len(source):  # else a query is sure when what was left out cannot be among its k
            is_sure[:] = True
        distances[left], indices[left] = found, near
        left, asked = left[~is_sure], min(4 * asked, len(source))
    return distances, indices


def _settle(
    queries: Tensor,
    source: Rows,
    root: Tensor,
    lists: tuple[Tensor, Tensor],
    scale: Tensor,
    *,
    k: int,
    all_in_double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k nearest in their true order from (n, kept) rough distances and indices, and the error of float32.

    The error is estimated on a sample, relative to the (n, 1) size of the numbers in the distances, and is at least a
    few steps of float32. Distances that differ from each other, or from zero, by less than the error are measured
    again.
    """
    rough, indices = lists
    query, place = torch.arange(len(rough)), torch.arange(max(1, SAMPLE // len(rough)))[:, None]
    is_known = torch.zeros(rough.shape, dtype=torch.bool)
    is_known[query, (query + place * (1 + k // len(place))) % k] = True
    exact = rough.clone()
    exact[is_known] = measure(queries, source, root, is_known, indices)
    seen = float(((exact - rough).abs() / scale)[is_known].max())
    error = scale * max(SAFETY * seen, QUANTA * torch.finfo(torch.float32).eps)
    is_close = rough.diff(dim=1) <= 2 * error
    unclear = rough <= 2 * error
    unclear[:, 1:] |= is_close
    unclear[:, :-1] |= is_close
    unclear &= rough <= rough[:, k - 1 : k] + 2 * error
    unclear[:, :k] |= all_in_double
    unclear &= ~is_known
    exact[unclear] = measure(queries, source, root, unclear, indices)
    return *nearest_first(exact, indices, k), error[:, 0]


def nearest_first(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of (n, m) neighbors in order, equal distances by index."""
    ordered, order = distances.sort(dim=1, stable=True)
    indices = indices.gather(1, order)
    tied = (ordered.diff(dim=1) == 0).any(1)  # few rows: they need two more sorts
    by_index, order = indices[tied].sort(1)
    ordered[tied], order = ordered[tied].gather(1, order).sort(dim=1, stable=True)
    indices[tied] = by_index.gather(1, order)
    return ordered[:, :k].contiguous(), indices[:, :k].contiguous()


def merged(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of all processes' lists, (n, own k) each, in every process."""
    step = max(1, MERGED // k)
    found = []
    for mine in zip(distances.split(step), indices.split(step), strict=True):
        shares = zip(*ranks.gather(mine), strict=True)
        all_distances, all_indices = (torch.cat(share, 1) for share in shares)
        found.append(nearest_first(all_distances, all_indices, k))
    distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
    return distances, indices


def measure(queries: Tensor, source: Rows, root: Tensor, which: Tensor, indices: Tensor) -> Tensor:
    """Return exact distances at the chosen positions of (n, kept) lists, in the order of the positions."""
    query, place = which.nonzero(as_tuple=True)
    rows, order = indices[query, place].sort(stable=True)
    distances = torch.empty(len(rows), dtype=torch.float64)
    step = max(1, BLOCK // math.prod(source.shape))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        unique, inverse = rows[part].unique(return_inverse=True)
        distances[order[part]] = pair_distances(queries, source.take(unique), root, (query[order[part]], inverse))
    return distances
