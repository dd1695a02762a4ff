"""Compute the nearest images of selective joint fine-tuning (arXiv 1702.08690), and how many are borrowed."""

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError, check_count
from lightning_transfer.methods.selective.distances import root_weights
from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.search import InMemory, plain_arithmetic, searched_on

WRONG, UNSURE = 4, 2  # times k, the neighbors that a round adds for a hard target image (the paper's)


def symmetric_kl_neighbors(
    target: Tensor, source: Tensor, *, k: int, filter_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest source descriptors of every target descriptor, exactly.

    With c_q = sum w q log q, the distance is half of c_p + c_q - <w p, log q> - <w log p, q>: the nearest are the top
    of an inner product of (w p, w log p, 1) with (log q, q, -c_q). The top in float32 is measured again in float64. If
    the error of float32 could hide a nearer row, the query is searched again with a longer list.

    Args:
        target: (n, filters, bins) histograms.
        source: (m, filters, bins) histograms.
        k: how many neighbors.
        filter_weights: (filters,), the weight of each filter; one over their number by default.

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
    device, target, source = target.device, target.detach().cpu(), source.detach().cpu()
    root = root_weights(target, source, filter_weights)
    for name, histograms in (("target", target), ("source", source)):
        if not len(histograms) or not histograms.is_floating_point() or not bool((histograms >= 0).all()):
            raise TransferConfigError(
                f"{name} is {histograms.dtype} {tuple(histograms.shape)}, or has numbers below 0 or NaN; expected "
                "histograms, for example from response_histograms."
            )
    queries, rows = (
        InMemory(_at_least_single(histograms).flatten(1), (histograms.shape[1], histograms.shape[2]))
        for histograms in (target, source)
    )
    with plain_arithmetic():
        distances, indices = exact_neighbors(
            queries, rows, k=k, root=root, all_in_double=True, device=searched_on(device)
        )
    return distances.to(device), indices.to(device)


def _at_least_single(histograms: Tensor) -> Tensor:
    """Return histograms in single precision at least: half precision cannot hold the number added to empty bins."""
    return histograms.to(torch.promote_types(histograms.dtype, torch.float32))


def neighbor_budget(
    budget: Tensor, *, is_correct: Tensor, entropy: Tensor, k: int, limit: int, hard_entropy: float = 0.1
) -> Tensor:
    """Return how many neighbors each target image may have after a round.

    The paper's rule: a target image that the network gets wrong gets 4 k more neighbors, one that it gets right but is
    not sure of gets 2 k more, and the others keep theirs. `hard_entropy` is ours, because the paper's is not available;
    the limit is the authors' code's.

    Args:
        budget: (n,) numbers of neighbors before the round.
        is_correct: (n,) whether the network is right.
        entropy: (n,) entropy of its class probabilities, in nats.
        k: the number of neighbors that every image began with.
        limit: the most that an image may have.
        hard_entropy: the entropy from which a right answer counts as unsure.

    Returns:
        (n,) numbers of neighbors, none lower than before.

    Example:
        >>> before, right = torch.tensor([10, 10, 10]), torch.tensor([False, True, True])
        >>> neighbor_budget(before, is_correct=right, entropy=torch.tensor([0.0, 0.5, 0.01]), k=10, limit=100)
        tensor([50, 30, 10])
    """
    more = torch.where(is_correct, torch.where(entropy >= hard_entropy, UNSURE, 0), WRONG)
    return torch.maximum(budget, (budget + more * k).clamp(max=limit))
