"""Fit a linear probe, a classifier of frozen features whose penalty is chosen by cross-validation (ours).

Features are divided by one number, the median of their standard deviations. With ten photographs of a class and an
ImageNet network this is better than to divide each feature by its own: see examples/benchmarks/regime.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.linear import LinearClassifier, fit_linear, fit_path
from lightning_transfer.splitting import folds

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
ROUGH = 1e-2  # change of a loss, summed over images, at which a fit is near enough to choose the penalty by


class Choice(NamedTuple):
    """Holds the penalty with the smallest loss on held-out images, and the share of them that is right with it."""

    penalty: float
    accuracy: float


def choose_penalty(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    groups: Sequence[Any] | None = None,
    importance: Tensor | None = None,
) -> Choice:
    """Choose the penalty that gives images held out in turns the smallest loss.

    Args:
        features: (n, D) of a frozen network.
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        groups: what each image belongs to; images of one group are held out together.
        importance: (n,) of each image's loss and answer; 1 if left out.

    Raises:
        TransferConfigError: all images belong to one group.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.0], [10.0]])
        >>> choose_penalty(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)
        Choice(penalty=1.0, accuracy=1.0)
    """
    counts = torch.ones(len(labels)) if importance is None else importance
    losses, right = dict.fromkeys(PENALTIES, 0.0), dict.fromkeys(PENALTIES, 0.0)
    for out in folds(labels.tolist(), groups):
        is_out = _mask(out, len(labels))
        is_known = torch.isin(labels[is_out], labels[~is_out])  # otherwise its score falls without end
        rough: dict[str, Any] = {"dtype": torch.float32, "tolerance": ROUGH, "importance": counts[~is_out]}
        rough["by_feature"] = False
        fits = fit_path(features[~is_out], labels[~is_out], num_classes=num_classes, penalties=PENALTIES, **rough)
        for penalty, says in fits.items():
            scores = says(features[is_out])
            each = F.cross_entropy(scores[is_known], labels[is_out][is_known], reduction="none")
            losses[penalty] += (each * counts[is_out][is_known]).sum().item()
            right[penalty] += counts[is_out][scores.argmax(1) == labels[is_out]].sum().item()
    best = min(losses, key=losses.__getitem__)
    return Choice(best, right[best] / counts.sum().item())


def fit_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, groups: Sequence[Any] | None = None
) -> LinearClassifier:
    """Fit a linear classifier with the penalty that `choose_penalty` gives for the same arguments.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.0], [10.0]])
        >>> fit_probe(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)(features).argmax(1).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    penalty, _ = choose_penalty(features, labels, num_classes=num_classes, groups=groups)
    return fit_linear(features, labels, num_classes=num_classes, penalty=penalty, by_feature=False)


def probed(features: Tensor, labels: Tensor, *, num_classes: int, groups: Sequence[Any] | None = None) -> Tensor:
    """Return which images (n,) a linear probe gets right that has not seen them, nor any other of their group.

    Args:
        features: (n, D) of a frozen network.
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        groups: what each image belongs to.

    Raises:
        TransferConfigError: images are of fewer than three groups, so a penalty cannot be chosen in each fold.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.0], [10.0]])
        >>> probed(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2).tolist()
        [True, True, True, True, True, True]
    """
    right = torch.zeros(len(labels), dtype=torch.bool)
    for out in folds(labels.tolist(), groups):
        is_out = _mask(out, len(labels))
        rest = None if groups is None else [group for group, at in zip(groups, is_out.tolist(), strict=True) if not at]
        says = fit_probe(features[~is_out], labels[~is_out], num_classes=num_classes, groups=rest)
        right[is_out] = says(features[is_out]).argmax(1) == labels[is_out]
    return right


def _mask(indices: Sequence[int], number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.bool).index_fill(0, torch.tensor(indices), True)
