"""Describe images by one histogram of responses per filter (arXiv 1702.08690, section 3, and the authors' code).

The authors': bin edges are quantiles of the target's responses and are used unchanged for the source. Ours: responses
are counted as bfloat16 numbers, so that a table lookup finds a bin and quantiles are exact over a target of any size;
the number of bins; and the mass of one position that is added to every bin.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.errors import TransferConfigError, check_number

CODES = 2**16  # numbers that bfloat16 has
MOST_BINS = 100  # the authors'
SMOOTHING = 1.0  # on each bin's count: the mass of one position


def filter_responses(images: Tensor, filters: Tensor, *, stride: int = 1) -> Tensor:
    """Compute responses of filters at every position where they are wholly inside the image.

    Args:
        images: (n, channels, height, width).
        filters: (filters, channels, size, size).
        stride: use every stride-th position only.

    Returns:
        (n, filters, height - size + 1, width - size + 1), at stride 1.

    Raises:
        TransferConfigError: the images are too small for the filters, or have a different number of channels.

    Example:
        >>> filter_responses(torch.ones(1, 1, 4, 4), torch.full((2, 1, 3, 3), 1 / 9)).shape
        torch.Size([1, 2, 2, 2])
    """
    size = filters.shape[-1]
    if images.ndim != 4 or images.shape[1] != filters.shape[1] or min(images.shape[2:]) < size:
        raise TransferConfigError(
            f"Found images of shape {tuple(images.shape)}; filters of shape {tuple(filters.shape)} take "
            f"(n, {filters.shape[1]}, height, width) with sides of at least {size}."
        )
    return F.conv2d(images, filters, stride=stride)


def response_histograms(responses: Tensor, edges: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Compute histograms of filter responses over all positions.

    Args:
        responses: (n, filters, ...), any number of positions.
        edges: (filters, bins - 1), the inner edges of each filter's bins, rising; a response on an edge belongs to the
            bin above it, one outside of all edges to the first or last bin.
        smoothing: added to each bin's count, so that no bin is empty; 1 adds the mass of one position (ours; the
            authors add nothing).

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
    num_images, num_filters, _ = flat.shape
    if edges.ndim != 2 or len(edges) != num_filters:
        raise TransferConfigError(
            f"Found edges {tuple(edges.shape)} for {num_filters} filters; expected ({num_filters}, bins - 1)."
        )
    if torch.isnan(flat).any():
        bad = int(torch.isnan(flat).flatten(1).any(1).nonzero()[0])
        raise TransferConfigError(f"Responses of image {bad} are not numbers: it has NaN or infinite pixels.")
    bins = edges.shape[1] + 1
    by_filter = flat.transpose(0, 1).reshape(num_filters, -1).contiguous()
    which = torch.searchsorted(edges.contiguous(), by_filter, right=True).view(num_filters, num_images, -1)
    histogram = torch.arange(num_images * num_filters, device=which.device).view(num_images, num_filters, 1)
    places = which.transpose(0, 1) + histogram * bins
    counts = torch.bincount(places.flatten(), minlength=num_images * num_filters * bins)
    return to_histograms(counts.view(num_images, num_filters, bins), smoothing=smoothing)


def to_histograms(counts: Tensor, *, smoothing: float = SMOOTHING, out: Tensor | None = None) -> Tensor:
    """Turn counts (n, filters, bins) into shares of each filter's positions, after adding `smoothing` to every bin."""
    raised = counts.float() if out is None else out.copy_(counts)
    raised += smoothing
    return raised.div_(raised.sum(-1, keepdim=True))


def num_bins(num_positions: float) -> int:
    """Return the number of bins for a number of positions: its square root, at most 100 (ours).

    >>> num_bins(30 * 30), num_bins(224 * 224)
    (30, 100)
    """
    return max(2, min(MOST_BINS, math.isqrt(int(num_positions))))


class ResponseCounts:
    """Counts how often each filter gave each number, over any number of images, to find quantiles.

    Args:
        num_filters: of the bank.
        device: of the responses.
    """

    def __init__(self, num_filters: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_filters * CODES, dtype=torch.int64, device=device)

    def add(self, responses: Tensor, first: int) -> None:
        """Count responses (n, filters, height, width) of filters from `first` on."""
        codes = _codes(responses, first)
        self.counts.index_add_(0, codes, torch.ones_like(codes, dtype=torch.int64))

    @property
    def per_filter(self) -> float:
        """Return the mean number of responses of a filter."""
        return int(self.counts.sum()) * CODES / len(self.counts)

    def edges(self, bins: int) -> Tensor:
        """Return (filters, bins - 1) inner edges that divide the counted responses as evenly as ties allow."""
        values = _values().to(self.counts.device)
        order = values.nan_to_num(torch.inf).argsort(stable=True)
        counts = self.counts.view(-1, CODES)[:, order].cpu()
        values = values[order].cpu()
        if bool(counts[:, values.isnan()].any()):
            raise TransferConfigError("The bank's responses are not numbers. Check the weights of its network.")
        zeros = (values == 0).nonzero()[:, 0]  # 0 and -0 are equal, so they are counted together
        counts[:, zeros[1]] += counts[:, zeros[0]]
        counts[:, zeros[0]] = 0
        below = (counts.cumsum(1) - counts).double()  # how many responses lie below each value
        wanted = counts.sum(1, keepdim=True) * torch.arange(1, bins, dtype=torch.float64) / bins
        above = torch.searchsorted(below, wanted.contiguous()).clamp(1, CODES - 1)
        is_nearer = wanted - below.gather(1, above - 1) < below.gather(1, above) - wanted
        return values[above - is_nearer.long()]


class Binning:
    """Counts responses into bins, with one table lookup each.

    Args:
        edges: (filters, bins - 1), rising.
    """

    def __init__(self, edges: Tensor) -> None:
        self.bins = edges.shape[1] + 1
        places = torch.searchsorted(edges.contiguous(), _values().expand(len(edges), CODES).contiguous(), right=True)
        offsets = torch.arange(len(edges))[:, None] * self.bins
        self._places = (places.clamp(max=self.bins - 1) + offsets).int().flatten()

    def to(self, device: torch.device) -> "Binning":
        """Move the table to a device and return itself."""
        self._places = self._places.to(device)
        return self

    def counts(self, responses: Tensor, first: int) -> Tensor:
        """Return (n, filters, bins) counts of responses (n, filters, height, width) of filters from `first` on."""
        num_images, num_filters = responses.shape[:2]
        places = self._places.index_select(0, _codes(responses, first)).view(num_images, -1)
        size = num_filters * self.bins
        shift = torch.arange(num_images, dtype=torch.int32, device=places.device) * size - first * self.bins
        found = torch.bincount((places + shift[:, None]).flatten(), minlength=num_images * size)
        return found.view(num_images, num_filters, self.bins)


def _codes(responses: Tensor, first: int) -> Tensor:
    """Return each response's position in the table of all numbers that filters from `first` on can give."""
    codes = responses.bfloat16().view(torch.int16).int()
    filters = torch.arange(first, first + responses.shape[1], dtype=torch.int32, device=codes.device)
    return codes.add_((filters * CODES + CODES // 2)[:, None, None]).flatten()


def _values() -> Tensor:
    """Return the number of each code, as float32."""
    return torch.arange(-CODES // 2, CODES // 2, dtype=torch.int16).view(torch.bfloat16).float()
