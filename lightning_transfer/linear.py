"""Fit a linear classifier on the features of a network to its optimum (ours)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100
ROUNDING = 1e-6  # share of its largest value by which a feature that never varies may seem to
SURE = 1e-9  # change of the loss or a weight at which a fit has ended


class LinearClassifier(NamedTuple):
    """Gives scores (n, classes) of features (n, D): weight (classes, D) and bias (classes,), in float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores."""
        return features.double() @ self.weight.T + self.bias


def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalty: float = 1.0,
    importance: Tensor | None = None,
    by_feature: bool = True,
) -> LinearClassifier:
    """Fit a multinomial logistic regression on scaled features, in float64.

    Args:
        features: (n, D).
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        penalty: on half of the squared weights, against the sum of losses: one over scikit-learn's C.
        importance: (n,) of each image's loss; 1 if left out.
        by_feature: whether each feature is divided by its own standard deviation, or all by the median one.

    Returns:
        The classifier of features as they are, not scaled.

    Example:
        >>> says = fit_linear(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> says(torch.tensor([[0.5], [8.5]])).argmax(1).tolist()
        [0, 1]
    """
    shared: dict[str, Any] = {"num_classes": num_classes, "importance": importance, "by_feature": by_feature}
    return fit_path(features, labels, penalties=[penalty], **shared)[penalty]


def fit_path(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalties: Sequence[float],
    importance: Tensor | None = None,
    by_feature: bool = True,
    dtype: torch.dtype = torch.float64,
    tolerance: float = SURE,
) -> dict[float, LinearClassifier]:
    """Fit a classifier for each of several penalties, which share one decomposition of the features.

    Args:
        features: (n, D).
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        penalties: of each fit; from the strongest on, each starts where the one before it ended.
        importance: (n,) of each image's loss; 1 if left out.
        by_feature: whether each feature is divided by its own standard deviation, or all by the median one.
        dtype: of the fits.
        tolerance: change of the loss or a weight at which a fit has ended.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=min(1, len(features) - 1))  # 0 of a single image
    std = std.masked_fill(std <= ROUNDING * features.abs().amax(0), math.inf)  # a weight on rounding would be enormous
    varies = std.isfinite()
    if not by_feature and varies.any():
        std = torch.where(varies, std[varies].median(), std)
    values, basis, design = _principal((features - mean) / std)
    weight, bias = torch.zeros(num_classes, len(values), dtype=dtype), torch.zeros(num_classes, dtype=dtype)
    curvature = (1 - 1 / num_classes) / num_classes  # of the loss by a score, at first
    found = {}
    for penalty in sorted(penalties, reverse=True):
        scale = (curvature * values + penalty).rsqrt().to(dtype)  # the loss is about as steep in all directions
        weight, bias = _descend(
            design.to(dtype) * scale,
            labels,
            (weight / scale, bias),
            penalty * scale.square(),
            None if importance is None else importance.to(dtype),
            tolerance,
        )
        weight = weight * scale
        slope = weight.double() @ basis.T / std
        found[penalty] = LinearClassifier(slope, bias.double() - slope @ mean)
    return found


def _principal(scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared singular values (r,), directions (D, r) and the images' coordinates (n, r) along them.

    The optimal weights lie in the span of the images, so min(n, D) coordinates are enough.
    """
    is_wide = len(scaled) < scaled.shape[1]
    values, vectors = torch.linalg.eigh(scaled @ scaled.T if is_wide else scaled.T @ scaled)
    matters = values > values.amax().clamp(min=1e-12) * 1e-14 * len(values)
    values, vectors = values[matters], vectors[:, matters]
    if not is_wide:
        return values, vectors, scaled @ vectors
    return values, scaled.T @ vectors / values.sqrt(), vectors * values.sqrt()


def _descend(
    design: Tensor,
    labels: Tensor,
    start: tuple[Tensor, Tensor],
    penalty: Tensor,
    importance: Tensor | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Return the weight (classes, r) and the bias of the least penalised loss."""
    weight, bias = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_change=tolerance
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(design @ weight.T + bias, labels, reduction="none")
        weighed = losses if importance is None else losses * importance
        total = weighed.sum() + (penalty * weight.square()).sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
