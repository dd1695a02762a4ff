"""A linear probe: a classifier of frozen features whose penalty is chosen by cross-validation (ours)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.linear import LinearClassifier, fit_linear
from lightning_transfer.splitting import folds

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5


def fit_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, groups: Sequence[Any] | None = None
) -> LinearClassifier:
    """Fit a linear classifier with the penalty that gives images held out in turns the smallest loss.

    Args:
        features: (n, D) of a frozen network.
        labels: (n,) class numbers.
        num_classes: how many classes there are.
        groups: what each image belongs to; images of one group are held out together.

    Raises:
        TransferConfigError: all images belong to one group.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.0], [10.0]])
        >>> fit_probe(features, torch.tensor([0, 0, 0, 1, 1, 1]), num_classes=2)(features).argmax(1).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    losses = dict.fromkeys(PENALTIES, 0.0)
    for out in folds(labels.tolist(), groups, num_folds=FOLDS):
        is_out = _mask(out, len(labels))
        for penalty in PENALTIES:
            says = fit_linear(features[~is_out], labels[~is_out], num_classes=num_classes, penalty=penalty)
            losses[penalty] += F.cross_entropy(says(features[is_out]), labels[is_out], reduction="sum").item()
    return fit_linear(features, labels, num_classes=num_classes, penalty=min(losses, key=losses.__getitem__))


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
    for out in folds(labels.tolist(), groups, num_folds=FOLDS):
        is_out = _mask(out, len(labels))
        rest = None if groups is None else [group for group, at in zip(groups, is_out.tolist(), strict=True) if not at]
        says = fit_probe(features[~is_out], labels[~is_out], num_classes=num_classes, groups=rest)
        right[is_out] = says(features[is_out]).argmax(1) == labels[is_out]
    return right


def _mask(indices: Sequence[int], number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.bool).index_fill(0, torch.tensor(indices), True)
