"""How far a target lies from a source: how well frozen features tell images of the one from the other (ours)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.linear import fit_linear

FOLDS = 5
PENALTY = 2.0  # on the weights of either side, which are each other's negative: 1 on those of a binary regression
NEAR = 0.8  # a source loss has helped up to .86 and hurt from .81 on: see examples/benchmarks/README.md
SCALE = f"0.5 not told apart, {NEAR} too unlike, 1 always told apart"
RAW = 32.0  # a pixel beyond any normalisation
TARGET_IMAGES, SOURCE_IMAGES = 200, 1000  # at most: the more there are to learn from, the better they are told apart


def domain_gap(
    target_features: Tensor, source_features: Tensor, *, target_groups: Sequence[Any] | None = None
) -> float:
    """How well target images can be told from source images.

    The balanced accuracy, cross-validated in five folds, of a logistic regression on standardised features: about one
    half where nobody can tell the two apart, and keeping the source is likely to help; 1 where the target lies far from
    it. Both sides must be decoded, resized and normalised alike, or it is that which is told apart. It grows with the
    number of images: compare what was taken from as many.

    Args:
        target_features: (n, D), of a frozen network.
        source_features: (m, D), of the same network.
        target_groups: (n,) what each target image belongs to, a patient or a track, say: images of one group are alike
            for that alone, so a fold has all of it or nothing.

    Returns:
        A number from 0 to 1; the same images in another order may change it slightly.

    Raises:
        TransferConfigError: there are fewer images than folds, the features do not fit together, or all of the target
            is one group.

    Example:
        >>> features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> domain_gap(features[:30], features[30:] + 9)
        1.0
    """
    if target_features.ndim != 2 or target_features.shape[1:] != source_features.shape[1:]:
        raise TransferConfigError(
            f"Features of shape {tuple(target_features.shape)} and {tuple(source_features.shape)}; expected (n, D) and "
            "(m, D) of one network."
        )
    if min(len(target_features), len(source_features)) < FOLDS:
        raise TransferConfigError(
            f"{len(target_features)} target and {len(source_features)} source images; a gap is told from {FOLDS} of "
            "each at least."
        )
    groups = list(range(len(target_features))) if target_groups is None else list(target_groups)
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    if len(groups) != len(target_features):
        raise TransferConfigError(f"{len(groups)} groups are named for {len(target_features)} target images.")
    if len(number) < 2:
        raise TransferConfigError(
            f"All {len(target_features)} target images are of one group ({groups[0]!r}), so how far the target lies "
            "cannot be told from how alike a group's images are. Give two groups at least, or none."
        )
    random = torch.Generator().manual_seed(0)
    features = torch.cat([target_features, source_features]).double().cpu()
    check_finite("target", target_features)
    check_finite("source", source_features)
    sizes = len(target_features), len(source_features)
    labels = torch.tensor([1, 0]).repeat_interleave(torch.tensor(sizes))
    num_folds = min(FOLDS, len(number))
    mine, theirs = (torch.randperm(size, generator=random) % num_folds for size in (len(number), len(source_features)))
    folds = torch.cat([mine[[number[group] for group in groups]], theirs])
    right = torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(num_folds):
        out = folds == fold
        says = fit_linear(features[~out], labels[~out], num_classes=2, penalty=PENALTY, is_balanced=True)
        right[out] = says(features[out]).argmax(1) == labels[out]
    shares = [right[labels == label].double().mean().item() for label in (0, 1)]
    return sum(shares) / 2


def check_finite(name: str, features: Tensor, indices: Sequence[int] | None = None) -> None:
    """Refuse features that are not finite.

    Args:
        name: of the side, "target" or "source".
        features: (n, D).
        indices: of the images in their dataset, where they are known.

    Raises:
        TransferConfigError: naming the images.
    """
    if bad := (~torch.isfinite(features).all(1)).nonzero()[:, 0].tolist():
        which = f"the first in row {bad[0]}" if indices is None else f"{name} samples {[indices[row] for row in bad]}"
        raise TransferConfigError(
            f"Features of {len(bad)} of {len(features)} {name} images are not finite, {which}, so the two sides cannot "
            "be compared. Look for pixels that are not finite, or a network that overflows."
        )


def check_alike(target_images: Tensor, source_images: Tensor) -> None:
    """Refuse batches of which a glance tells which is which.

    Raises:
        TransferConfigError: their images differ in channels or size.
    """
    sizes = [tuple(images.shape[1:]) for images in (target_images, source_images)]
    if sizes[0] != sizes[1]:
        raise TransferConfigError(
            f"Target images are of shape {sizes[0]}, source images of {sizes[1]}; expected alike, or it is their size "
            "that tells them apart. Give the source dataset the target's transform, or bring both to one size: "
            "SourceTask(forward=lambda module, images: ...)."
        )


@dataclass
class Extent:
    """The least and the largest pixel of the images that were seen of a side."""

    least: float = math.inf
    largest: float = -math.inf

    def see(self, images: Tensor) -> "Extent":
        """Some more images; gives itself."""
        self.least = min(self.least, float(images.min()))
        self.largest = max(self.largest, float(images.max()))
        return self

    @property
    def scale(self) -> tuple[bool, bool]:
        """Whether pixels are normalised to both sides of 0, and whether they are raw numbers of 0 to 255."""
        return self.least < 0, self.largest > RAW

    def __str__(self) -> str:
        return f"from {self.least:.2f} to {self.largest:.2f}"


class Seen(NamedTuple):
    """What was seen of a side: (n, D) features, the last of the images, and how far pixels run."""

    features: Tensor
    images: Tensor
    extent: Extent


def look(batches: Iterable[Tensor], run: Callable[[Tensor], Tensor], *, like: Tensor | None = None) -> Seen:
    """Look at images, a batch at a time.

    Where others are given that they have to be like, shapes are compared before the network meets them.
    """
    found, extent = [], Extent()
    for images in batches:
        if like is not None:
            check_alike(like, images)
        found.append(run(images).float().flatten(1).cpu())
        extent.see(images)
    return Seen(torch.cat(found), images, extent)


def unlike_pixels(target: Extent, source: Extent) -> str:
    """What is wrong with sides of which one is scaled otherwise than the other, by which anybody tells them apart."""
    if target.scale == source.scale:
        return ""
    return f"pixels run {target} in the target, {source} in the source: give the source the target's transform"


def is_near(gap: float) -> bool:
    """Whether a source loss is worth its while at a domain gap.

    >>> [is_near(gap) for gap in (0.5, 0.7, 0.9)]
    [True, True, False]
    """
    return gap < NEAR
