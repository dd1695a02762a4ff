"""Compute the distance of two descriptors (arXiv 1702.08690 and the authors' code), directly or as an inner product.

D(p, q) = sum_i w_i sum_b 1/2 [p log((p + e) / (q + e)) + q log((q + e) / (p + e))]. With c_q = sum w q log q it is half
of c_p + c_q - <w p, log q> - <w log p, q>: the nearest are the top of an inner product.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError

EPS = 2.2e-16  # the authors' e; it matters only for empty bins
CHUNK = 2**17  # numbers held at once for single distances, so that they stay in the cache
# with AVX512 numpy's logarithm takes less than half of the time of torch's; without it torch's is faster
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def symmetric_kl(p: Tensor, q: Tensor, *, filter_weights: Tensor | None = None) -> Tensor:
    """Return the distance of every descriptor of one set to every one of another, in float64, term by term.

    Args:
        p: (n, filters, bins) histograms.
        q: (m, filters, bins) histograms.
        filter_weights: (filters,), the weight of each filter; one over their number by default.

    Returns:
        (n, m) distances: 0 for equal descriptors, the same in both directions.

    Raises:
        TransferConfigError: the sets do not fit each other.

    Example:
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]])
        >>> symmetric_kl(p, p)
        tensor([[0.0000, 0.4394],
                [0.4394, 0.0000]], dtype=torch.float64)
    """
    root = root_weights(p, q, filter_weights)
    (p, log_p), (q, log_q) = with_logs(p.flatten(1).double(), root), with_logs(q.flatten(1).double(), root)
    distances = torch.empty(len(p), len(q), dtype=torch.float64, device=p.device)
    block = max(1, CHUNK // max(1, q.numel()))
    for start in range(0, len(p), block):
        rows = slice(start, start + block)
        distances[rows] = ((p[rows, None] - q) * (log_p[rows, None] - log_q)).sum(2) / 2
    return distances


def root_weights(p: Tensor, q: Tensor, filter_weights: Tensor | None) -> Tensor:
    """Return the square root of the weight of each number of a flat descriptor: (filters * bins,), in float64.

    Raises:
        TransferConfigError: the sets, or the weights, do not fit.
    """
    if p.ndim != 3 or q.ndim != 3 or p.shape[1:] != q.shape[1:]:
        raise TransferConfigError(
            f"Found descriptors {tuple(p.shape)} and {tuple(q.shape)}; expected (n, filters, bins) and (m, filters, "
            "bins), of the same filters and bins."
        )
    num_filters, num_bins = p.shape[1:]
    if filter_weights is None:
        filter_weights = torch.full((num_filters,), 1 / num_filters, dtype=torch.float64)
    if filter_weights.shape != (num_filters,) or not bool((filter_weights >= 0).all()):
        raise TransferConfigError(
            f"filter_weights has shape {tuple(filter_weights.shape)}; expected ({num_filters},), none of them negative."
        )
    return filter_weights.double().sqrt().repeat_interleave(num_bins).to(p.device)


def with_logs(histograms: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat histograms and their logarithms, both times the root of the weights, in the histograms' precision."""
    root = root.to(histograms.dtype)
    return histograms * root, logs(histograms).mul_(root)


def logs(histograms: Tensor) -> Tensor:
    """Return logarithms, also of empty bins."""
    raised = histograms + EPS
    if raised.device.type != "cpu" or raised.requires_grad or not HAS_AVX512:
        return raised.log_()
    return torch.from_numpy(np.log(raised.numpy(), out=raised.numpy()))


def pair_distances(p: Tensor, q: Tensor, root: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return distances of pairs of flat descriptors in float64; a pair's distance does not depend on the other pairs.

    Args:
        p: (n, numbers) histograms.
        q: (m, numbers) histograms.
        root: (numbers,) root of the weights.
        pairs: (pairs,) rows of p and (pairs,) rows of q.

    Returns:
        (pairs,) distances.
    """
    found = torch.empty(len(pairs[0]), dtype=torch.float64)
    block = max(1, CHUNK // p.shape[1])
    for start in range(0, len(found), block):
        (mine, of_p), (theirs, of_q) = (rows[start : start + block].unique(return_inverse=True) for rows in pairs)
        (a, log_a), (b, log_b) = with_logs(p[mine].double(), root), with_logs(q[theirs].double(), root)
        difference, log_difference = a[of_p].sub_(b[of_q]), log_a[of_p].sub_(log_b[of_q])
        # numpy sums each row in one thread; torch would divide a single long row among threads
        found[start : start + block] = torch.from_numpy((difference.numpy() * log_difference.numpy()).sum(1))
    return found / 2
