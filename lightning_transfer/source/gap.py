"""Measure how far a target is from a source: how well a classifier separates their frozen features (ours)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.linear import fit_linear
from lightning_transfer.splitting import FOLDS

PENALTY = 2.0  # on both classes' weights, which are each other's negative: equals 1 in a binary regression
NEAR = 0.8  # a source loss has helped up to .86 and has hurt from .81: see examples/benchmarks/small_networks.md
SCALE = f"0.5: cannot be separated; from {NEAR}: too far; 1: always separated"
TARGET_IMAGES, SOURCE_IMAGES = 200, 1000  # at most: with more images the classifier separates the sides better


def domain_gap(
    target_features: Tensor, source_features: Tensor, *, target_groups: Sequence[Any] | None = None
) -> float:
    """Return how well a classifier separates target images from source images.

    The balanced accuracy, cross-validated in five folds, of a logistic regression on standardised features: about one
    half if the two cannot be separated, so keeping the source is likely to help; 1 if the target is far from the
    source. Preprocess source and target identically; otherwise the gap measures the preprocessing. The gap grows with
    the number of images: compare only gaps of equally many images.

    Args:
        target_features: (n, D), of a frozen network.
        source_features: (m, D), of the same network.
        target_groups: (n,) the group of each target image, for example a patient or a track. Images of one group
            resemble each other for that reason alone, so a group is never split between folds.

    Returns:
        A number from 0 to 1; it may change slightly if the same images come in another order.

    Raises:
        TransferConfigError: there are fewer images than folds, the features differ in width, or all target images are
            of one group.

    Example:
        >>> features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> domain_gap(features[:30], features[30:] + 9)
        1.0
    """
    groups = list(range(len(target_features))) if target_groups is None else list(target_groups)
    _check_sides(target_features, source_features, groups)
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    random = torch.Generator().manual_seed(0)
    features = torch.cat([target_features, source_features]).double().cpu()
    sizes = len(target_features), len(source_features)
    labels = torch.tensor([1, 0]).repeat_interleave(torch.tensor(sizes))
    num_folds = min(FOLDS, len(number))
    # not `splitting.folds`, whose folds differ: NEAR and every figure of the benchmarks come from these
    mine, theirs = (torch.randperm(size, generator=random) % num_folds for size in (len(number), len(source_features)))
    folds = torch.cat([mine[[number[group] for group in groups]], theirs])
    right = torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(num_folds):
        out = folds == fold
        sides = labels[~out]
        alike = (len(sides) / (2 * torch.bincount(sides, minlength=2).clamp(min=1)))[sides]  # however many each has
        says = fit_linear(features[~out], sides, num_classes=2, penalty=PENALTY, importance=alike)
        right[out] = says(features[out]).argmax(1) == labels[out]
    shares = [right[labels == label].double().mean().item() for label in (0, 1)]
    return sum(shares) / 2


def _check_sides(target_features: Tensor, source_features: Tensor, groups: Sequence[Any]) -> None:
    if target_features.ndim != 2 or target_features.shape[1:] != source_features.shape[1:]:
        raise TransferConfigError(
            f"Features of shape {tuple(target_features.shape)} and {tuple(source_features.shape)}; expected (n, D) and "
            "(m, D) of one network."
        )
    if min(len(target_features), len(source_features)) < FOLDS:
        raise TransferConfigError(
            f"{len(target_features)} target and {len(source_features)} source images; a gap needs at least {FOLDS} of "
            "each."
        )
    if len(groups) != len(target_features):
        raise TransferConfigError(f"{len(groups)} groups are named for {len(target_features)} target images.")
    if len({*groups}) < 2:
        raise TransferConfigError(
            f"All {len(target_features)} target images are of one group ({groups[0]!r}), so the gap would measure how "
            "similar the images of a group are. Give at least two groups, or none."
        )
    check_finite("target", target_features)
    check_finite("source", source_features)


def check_finite(name: str, features: Tensor, indices: Sequence[int] | None = None) -> None:
    """Refuse features that are not finite.

    Args:
        name: of the side, "target" or "source".
        features: (n, D).
        indices: of the images in their dataset, if known.
    """
    if bad := (~torch.isfinite(features).all(1)).nonzero()[:, 0].tolist():
        which = f"the first in row {bad[0]}" if indices is None else f"{name} samples {[indices[row] for row in bad]}"
        raise TransferConfigError(
            f"Features of {len(bad)} of {len(features)} {name} images are not finite, {which}, so the two sides cannot "
            "be compared. Check for pixels that are not finite, or a network that overflows."
        )


def check_alike(target_images: Tensor, source_images: Tensor) -> None:
    """Refuse batches whose images differ in channels or size."""
    sizes = [tuple(images.shape[1:]) for images in (target_images, source_images)]
    if sizes[0] != sizes[1]:
        raise TransferConfigError(
            f"Target images are of shape {sizes[0]}, source images of {sizes[1]}; expected equal sizes; otherwise the "
            "gap measures the size. Give the source dataset the target's transform, or bring both to one size: "
            "SourceTask(forward=lambda module, images: ...)."
        )


def is_near(gap: float) -> bool:
    """Return whether a source loss is likely to help at a domain gap.

    >>> [is_near(gap) for gap in (0.5, 0.7, 0.9)]
    [True, True, False]
    """
    return gap < NEAR
