"""A linear classifier on the features of a network, fitted to its optimum (ours)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100


def fit_linear(
    features: Tensor, labels: Tensor, *, num_classes: int, penalty: float = 1.0, is_balanced: bool = False
) -> Callable[[Tensor], Tensor]:
    """Fit a multinomial logistic regression on standardised features, in float64.

    Args:
        features: (n, D).
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        penalty: on half of the squared weights, against the sum of losses: one over scikit-learn's C.
        is_balanced: whether classes count alike, however many images they have.

    Returns:
        A function from other features (m, D) to their scores (m, num_classes).

    Example:
        >>> says = fit_linear(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> says(torch.tensor([[0.5], [8.5]])).argmax(1).tolist()
        [0, 1]
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0).clamp(min=1e-12)
    counts = torch.bincount(labels, minlength=num_classes)
    importance = (len(labels) / (num_classes * counts.clamp(min=1))).double() if is_balanced else None
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")
    standardised = (features - mean) / std

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(standardised @ weight.T + bias, labels, importance, reduction="sum")
        total = losses + penalty * weight.square().sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    slope, offset = weight.detach(), bias.detach()
    return lambda others: (others.double() - mean) / std @ slope.T + offset
