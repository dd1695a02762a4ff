"""The loss of networks that learn together (PeerJ CS 10:e2107 and the authors' code).

L = sum_j CE(z_j, y) + weight * mean over images of (1/N) sum_j ||z_j - mean(z)||
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def disagreement(logits: Tensor) -> Tensor:
    """How far networks lie from what they say together: the mean distance of logits from their mean, not squared.

    Args:
        logits: (N, B, classes), of N networks.

    Returns:
        A scalar; where all logits are equal it is 0, and so is its gradient.

    Example:
        >>> disagreement(torch.tensor([[[3.0, 4.0]], [[-3.0, -4.0]]]))
        tensor(5.)
    """
    distances: Tensor = torch.linalg.vector_norm(logits - logits.mean(0), dim=2)
    return distances.mean()


def collaborative_loss(
    logits: Tensor | Sequence[Tensor], targets: Tensor, *, weight: float = 0.2, loss: Criterion = F.cross_entropy
) -> Tensor:
    """The loss of every network by itself, and what they disagree by.

    Args:
        logits: (N, B, classes), of N networks, or N of (B, classes) in a list.
        targets: (B,) class numbers, or what `loss` takes.
        weight: of the disagreement; 0.2 is the authors'.
        loss: of one network's (B, classes) logits.

    Returns:
        A scalar.

    Example:
        >>> logits, targets = torch.zeros(2, 3, 4), torch.tensor([0, 1, 2])
        >>> torch.isclose(collaborative_loss(logits, targets), 2 * torch.log(torch.tensor(4.0)))
        tensor(True)
    """
    logits = logits if isinstance(logits, Tensor) else torch.stack([*logits])
    own = torch.stack([loss(each, targets) for each in logits])
    if own.ndim > 1:
        raise ValueError(f"loss gives {tuple(own.shape[1:])} numbers; expected one, the mean over images.")
    return own.sum() + weight * disagreement(logits)
