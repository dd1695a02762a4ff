"""A linear classifier on the features of a network, fitted to its optimum (ours)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100
ROUNDING = 1e-6  # share of its largest value by which a feature that never varies may seem to


class LinearClassifier(NamedTuple):
    """Scores (n, classes) of features (n, D): weight (classes, D) and bias (classes,), in float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores."""
        return features.double() @ self.weight.T + self.bias


def fit_linear(
    features: Tensor, labels: Tensor, *, num_classes: int, penalty: float = 1.0, is_balanced: bool = False
) -> LinearClassifier:
    """Fit a multinomial logistic regression on standardised features, in float64.

    Args:
        features: (n, D).
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        penalty: on half of the squared weights, against the sum of losses: one over scikit-learn's C.
        is_balanced: whether classes count alike, however many images they have.

    Returns:
        The classifier of features as they are, not standardised.

    Example:
        >>> says = fit_linear(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> says(torch.tensor([[0.5], [8.5]])).argmax(1).tolist()
        [0, 1]
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0)
    std = std.masked_fill(std <= ROUNDING * features.abs().amax(0), math.inf)  # a weight on rounding would be enormous
    standardised, basis = (features - mean) / std, None
    if len(features) < features.shape[1]:  # the optimum lies in the span of the images: as many numbers as there are
        left, scale, basis = torch.linalg.svd(standardised, full_matrices=False)
        standardised = left * scale
    counts = torch.bincount(labels, minlength=num_classes)
    importance = (len(labels) / (num_classes * counts.clamp(min=1))).double() if is_balanced else None
    weight = torch.zeros(num_classes, standardised.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(standardised @ weight.T + bias, labels, importance, reduction="sum")
        total = losses + penalty * weight.square().sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    slope = (weight.detach() if basis is None else weight.detach() @ basis) / std
    return LinearClassifier(slope, bias.detach() - slope @ mean)
