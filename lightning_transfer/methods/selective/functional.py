"""Descriptors, their distance, and the nearest source images (arXiv 1702.08690, section 3, and the authors' code).

A descriptor is one histogram per filter; the distance of two images is
D(p, q) = sum_i w_i sum_b 1/2 [p log((p + e) / (q + e)) + q log((q + e) / (p + e))], as in the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.errors import TransferConfigError, check_count, check_number

EPS = 2.2e-16  # the authors' e; logarithms are taken in float64, where it still counts
WRONG, UNSURE = 4, 2  # how many times its first budget a hard target image is given on top (the paper's)
CHUNK = 2**23  # numbers held at once when distances are taken one by one


def filter_responses(images: Tensor, filters: Tensor, *, stride: int = 1) -> Tensor:
    """Responses of filters at every position of images; borders are reflected, so that all filters see all positions.

    Args:
        images: (n, channels, height, width).
        filters: (filters, channels, size, size), of odd size.
        stride: take every stride-th position only.

    Returns:
        (n, filters, height / stride, width / stride), rounded up.

    Raises:
        TransferConfigError: the images are too small for the filters, or have other channels.

    Example:
        >>> filter_responses(torch.ones(1, 1, 4, 4), torch.full((2, 1, 3, 3), 1 / 9)).shape
        torch.Size([1, 2, 4, 4])
    """
    reach = filters.shape[-1] // 2
    if images.ndim != 4 or images.shape[1] != filters.shape[1] or min(images.shape[2:]) <= reach:
        raise TransferConfigError(
            f"Found images of shape {tuple(images.shape)}; filters of shape {tuple(filters.shape)} take "
            f"(n, {filters.shape[1]}, height, width) with sides above {reach}."
        )
    return F.conv2d(F.pad(images, [reach] * 4, mode="reflect"), filters, stride=stride)


def response_histograms(responses: Tensor, edges: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Histograms of filter responses over all positions.

    Args:
        responses: (n, filters, ...), any number of positions.
        edges: (filters, bins - 1), the inner edges of each filter's bins, rising; a response on an edge falls into the
            bin above it, one outside of all edges into the end bin.
        smoothing: what is added to each bin's count, so that an empty bin is not infinitely unlikely; 1 adds the mass
            of one position (ours; the authors add nothing).

    Returns:
        (n, filters, bins), each histogram summing to 1.

    Raises:
        TransferConfigError: shapes do not fit, or a response is not a number.

    Example:
        >>> response_histograms(torch.tensor([[[0.1, 0.4, 0.6, 0.9]]]), torch.tensor([[0.5, 0.8]]))
        tensor([[[0.5000, 0.2500, 0.2500]]])
    """
    check_number("smoothing", smoothing)
    flat = responses.flatten(2)
    num_images, num_filters, num_positions = flat.shape
    if edges.ndim != 2 or len(edges) != num_filters:
        raise TransferConfigError(
            f"Found edges {tuple(edges.shape)} for {num_filters} filters; expected ({num_filters}, bins - 1)."
        )
    if torch.isnan(flat).any():
        bad = int(torch.isnan(flat).flatten(1).any(1).nonzero()[0])
        raise TransferConfigError(f"Responses of image {bad} are not numbers: it has NaN or infinite pixels.")
    bins = edges.shape[1] + 1
    by_filter = flat.transpose(0, 1).reshape(num_filters, -1).contiguous()
    which = torch.searchsorted(edges.contiguous(), by_filter, right=True).view(num_filters, num_images, num_positions)
    histogram = torch.arange(num_images * num_filters, device=which.device).view(num_images, num_filters, 1)
    places = which.transpose(0, 1) + histogram * bins
    counts = torch.bincount(places.flatten(), minlength=num_images * num_filters * bins)
    counts = counts.view(num_images, num_filters, bins) + smoothing
    return counts / (num_positions + smoothing * bins)


def symmetric_kl(p: Tensor, q: Tensor, *, filter_weights: Tensor | None = None) -> Tensor:
    """The distance of every descriptor of one set to every one of another, in float64, term by term.

    Args:
        p: (n, filters, bins) histograms.
        q: (m, filters, bins) histograms.
        filter_weights: (filters,), what each filter counts; one over their number by default.

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
    weights = _weights(p, q, filter_weights)
    (p, log_p), (q, log_q) = _with_logs(p, weights), _with_logs(q, weights)
    distances = torch.empty(len(p), len(q), dtype=torch.float64, device=p.device)
    block = max(1, CHUNK // q.numel())
    for start in range(0, len(p), block):
        rows = slice(start, start + block)
        distances[rows] = ((p[rows, None] - q) * (log_p[rows, None] - log_q)).sum(2) / 2
    return distances


def symmetric_kl_neighbors(
    target: Tensor, source: Tensor, *, k: int, filter_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest source descriptors of every target descriptor, exactly.

    With c_q = sum w q log q, the distance is half of c_p + c_q - <w p, log q> - <w log p, q>: the nearest are the top
    of an inner product of (w p, w log p, 1) with (log q, q, -c_q), which faiss finds in float32. What it finds, and as
    many more, is measured again in float64; a query whose k-th is not nearer than everything left out, by the error
    seen, is asked again with twice as many.

    Args:
        target: (n, filters, bins) histograms.
        source: (m, filters, bins) histograms.
        k: how many neighbors.
        filter_weights: (filters,), what each filter counts; one over their number by default.

    Returns:
        Distances in float64 and indices, each (n, k), nearest first, equal distances by index.

    Raises:
        TransferConfigError: k is more than the source has, or the sets do not fit each other.

    Example:
        >>> sets = torch.eye(3)[:, None] * 0.8 + 0.1
        >>> symmetric_kl_neighbors(sets[:1], sets, k=2)[1]
        tensor([[0, 1]])
    """
    check_count("k", k, least=1)
    if k > len(source):
        raise TransferConfigError(f"k={k} exceeds the {len(source)} source images; pass k<={len(source)}.")
    weights = _weights(target, source, filter_weights)
    (p, log_p), (q, log_q) = _with_logs(target, weights), _with_logs(source, weights)
    middle, log_middle = q.mean(0), log_q.mean(0)  # differences are all that counts: centred, float32 errs less
    p, q, log_p, log_q = p - middle, q - middle, log_p - log_middle, log_q - log_middle
    distances = torch.empty(len(p), k, dtype=torch.float64)
    indices = torch.empty(len(p), k, dtype=torch.int64)
    left, asked = torch.arange(len(p)), min(2 * k, len(q))
    while len(left):
        found, near, is_sure = _nearest(p[left], log_p[left], q, log_q, asked, k)
        distances[left], indices[left] = found, near
        left, asked = left[~is_sure], min(2 * asked, len(q))
    return distances, indices


def _nearest(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, asked: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of `asked` candidates, and for which queries nothing left out can be among them."""
    import faiss

    own, others = (p * log_p).sum(1), (q * log_q).sum(1)
    queries = torch.cat([p, log_p, torch.ones_like(own)[:, None]], dim=1).float().numpy()
    base = torch.cat([log_q, q, -others[:, None]], dim=1).float().numpy()
    similarity, candidates = map(torch.from_numpy, faiss.knn(queries, base, asked, metric=faiss.METRIC_INNER_PRODUCT))
    rough = (own[:, None] - similarity.double()) / 2
    candidates, order = candidates.sort(1)  # by index, so that a stable sort by distance breaks ties by index
    rough = rough.gather(1, order)
    exact = torch.empty_like(rough)
    block = max(1, CHUNK // (asked * q.shape[1]))
    for start in range(0, len(p), block):
        rows = slice(start, start + block)
        near = candidates[rows]
        exact[rows] = ((p[rows, None] - q[near]) * (log_p[rows, None] - log_q[near])).sum(2) / 2
    error = (exact - rough).abs().amax(1)
    exact, order = exact.sort(dim=1, stable=True)
    is_sure = torch.full((len(p),), True) if asked == len(q) else exact[:, k - 1] < rough.amax(1) - 4 * error
    return exact[:, :k], candidates.gather(1, order)[:, :k], is_sure


def _weights(p: Tensor, q: Tensor, filter_weights: Tensor | None) -> Tensor:
    """What each number of a descriptor counts: (filters, 1), in float64."""
    if p.ndim != 3 or q.ndim != 3 or p.shape[1:] != q.shape[1:]:
        raise TransferConfigError(
            f"Found descriptors {tuple(p.shape)} and {tuple(q.shape)}; expected (n, filters, bins) and (m, filters, "
            "bins), of the same filters and bins."
        )
    if filter_weights is None:
        return torch.full((p.shape[1], 1), 1 / p.shape[1], dtype=torch.float64, device=p.device)
    if filter_weights.shape != p.shape[1:2] or not bool((filter_weights >= 0).all()):
        raise TransferConfigError(
            f"filter_weights has shape {tuple(filter_weights.shape)}; expected ({p.shape[1]},), none of them negative."
        )
    return filter_weights.double()[:, None].to(p.device)


def _with_logs(histograms: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Histograms and their logarithms, (n, filters * bins), each times the root of the weights."""
    histograms = histograms.double()
    root = weights.sqrt()
    return (histograms * root).flatten(1), ((histograms + EPS).log() * root).flatten(1)


def neighbor_budget(
    budget: Tensor, *, is_correct: Tensor, entropy: Tensor, k: int, limit: int, hard_entropy: float = 0.1
) -> Tensor:
    """How many neighbors each target image may have after a round.

    The paper's rule: a target image that the network gets wrong is given 4 k more, one that it gets right but is not
    sure of, 2 k more, the others keep what they have. `hard_entropy` is ours, the paper's is not available; the limit
    is the authors' code's.

    Args:
        budget: (n,) numbers of neighbors before.
        is_correct: (n,) whether the network is right.
        entropy: (n,) entropy of its class probabilities, in nats.
        k: the number of neighbors that every image began with.
        limit: the most that an image may have.
        hard_entropy: from which entropy on a right answer counts as unsure.

    Returns:
        (n,) numbers of neighbors, none lower than before.

    Example:
        >>> before, right = torch.tensor([10, 10, 10]), torch.tensor([False, True, True])
        >>> neighbor_budget(before, is_correct=right, entropy=torch.tensor([0.0, 0.5, 0.01]), k=10, limit=100)
        tensor([50, 30, 10])
    """
    more = torch.where(is_correct, torch.where(entropy >= hard_entropy, UNSURE, 0), WRONG)
    return torch.maximum(budget, (budget + more * k).clamp(max=limit))
