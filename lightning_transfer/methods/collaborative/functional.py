"""Compute the loss of networks that learn together (PeerJ CS 10:e2107 and the authors' code).

L = sum_j CE(z_j, y) + weight * mean over images of (1/N) sum_j ||z_j - mean(z)||
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.errors import TransferConfigError

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def disagreement(logits: Tensor) -> Tensor:
    """Return the mean distance (not squared) of the networks' logits from their mean.

    Args:
        logits: (N, B, classes), of N networks.

    Returns:
        A scalar. If all networks give the same logits, it is 0, and so is its gradient.

    Example:
        >>> disagreement(torch.tensor([[[3.0, 4.0]], [[-3.0, -4.0]]]))
        tensor(5.)
    """
    distances: Tensor = torch.linalg.vector_norm(logits - logits.mean(0), dim=2)
    return distances.mean()


def collaborative_loss(
    logits: Tensor | Sequence[Tensor], targets: Tensor, *, weight: float = 0.2, loss: Criterion = F.cross_entropy
) -> Tensor:
    """Return the sum of the networks' own losses and their weighted disagreement.

    Args:
        logits: (N, B, classes), of N networks, or a list of N tensors (B, classes).
        targets: (B,) class numbers, or what `loss` takes.
        weight: of the disagreement; the authors' is 0.2.
        loss: of one network's (B, classes) logits.

    Returns:
        A scalar.

    Raises:
        TransferConfigError: `loss` does not give one number.

    Example:
        >>> logits, targets = torch.zeros(2, 3, 4), torch.tensor([0, 1, 2])
        >>> torch.isclose(collaborative_loss(logits, targets), 2 * torch.log(torch.tensor(4.0)))
        tensor(True)
    """
    logits = logits if isinstance(logits, Tensor) else torch.stack([*logits])
    own = torch.stack([loss(each, targets) for each in logits])
    if own.ndim > 1:
        raise TransferConfigError(f"loss gives {tuple(own.shape[1:])} numbers; expected one, the mean over images.")
    return own.sum() + weight * disagreement(logits)
