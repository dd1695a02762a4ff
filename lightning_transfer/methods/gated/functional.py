"""Weigh transferred features (arXiv 1810.12521 and the authors' code): f -> sigmoid(W2 relu(W1 f)) * f."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_features(
    features: Tensor, squeeze: Tensor, expand: Tensor, *, dropout: float = 0.0, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Multiply each feature by a learned weight between 0 and 1.

    Args:
        features: (B, D) after the global pool.
        squeeze: (D / ratio, D), the paper's W1.
        expand: (D, D / ratio), the paper's W2.
        dropout: share of the squeezed features that are dropped in training.
        training: whether to drop them.

    Returns:
        The weighted features and the weights, each (B, D).

    Example:
        >>> weighted, weights = gate_features(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(2, 1))
        >>> weighted
        tensor([[0.5000, 0.5000]])
    """
    squeezed = F.dropout(F.relu(F.linear(features, squeeze)), dropout, training)
    weights = torch.sigmoid(F.linear(squeezed, expand))
    return weights * features, weights
