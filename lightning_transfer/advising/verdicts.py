"""Compare a candidate with fine-tuning on the same images: the difference, its interval and a verdict (ours)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.05  # of all intervals of a page together
NOISE = 0.02  # standard deviation by which two trainings differ in accuracy by their seeds alone
GRID = 100_000  # points of a numerical integral
MOST_FREEDOM = 1000  # beyond which Student's t is a normal one

Verdict = Literal["shown better", "not shown", "shown worse"]


@dataclass(frozen=True)
class Difference:
    """Holds a difference in accuracy from fine-tuning.

    Attributes:
        points: in percent of the images that both were scored on.
        half: of its interval; infinite if all images are of one group.
    """

    points: float
    half: float

    @property
    def verdict(self) -> Verdict:
        """Return better or worse only if the interval is on one side of 0."""
        if abs(self.points) <= self.half:
            return "not shown"
        return "shown better" if self.points > 0 else "shown worse"

    def __str__(self) -> str:
        half = "not known" if math.isinf(self.half) else f"{self.half:.1f}"
        return f"{self.points:+.1f} +- {half}"


def difference(mine: Sequence[Tensor], plain: Sequence[Tensor], groups: Sequence[Any], *, among: int) -> Difference:
    """Compare two candidates on the same images.

    The variance is the cluster-robust one of the mean, at least one image's worth, plus that between seeds (`NOISE`).
    The interval is Student's, with one degree of freedom less than there are groups.

    Args:
        mine: of each fold, which (n,) images a candidate has right.
        plain: the same of fine-tuning.
        groups: what each image of all folds belongs to; an image alone is its own group.
        among: number of candidates that are compared; all their intervals hold together with 95 % (Bonferroni).

    Example:
        >>> right, wrong = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
        >>> difference([right], [wrong], range(50), among=1).verdict
        'shown better'
    """
    apart = torch.cat([*mine]).double() - torch.cat([*plain]).double()
    half = half_interval(apart, groups, among=among, noise=NOISE / math.sqrt(len(mine)))
    return Difference(100 * float(apart.mean()), 100 * half)


def half_interval(apart: Tensor, groups: Sequence[Any], *, among: int = 1, noise: float = 0.0) -> float:
    """Return half of Student's interval of a mean over images; infinite if all are of one group.

    Args:
        apart: (n,) numbers, one an image.
        groups: the group of each image, by which the standard error is clustered.
        among: number of intervals that hold together with 95 % (Bonferroni).
        noise: standard deviation to add, such as that between seeds.
    """
    freedom = len({*groups}) - 1
    if not freedom:
        return math.inf
    return math.hypot(_clustered(apart, groups), noise) * quantile(1 - LEVEL / among, freedom)


def is_above(right: Tensor, share: float, groups: Sequence[Any]) -> bool:
    """Return whether an accuracy is shown to be above a share.

    Args:
        right: (n,) which images are right.
        share: from 0 to 1.
        groups: as in `half_interval`.

    Example:
        >>> is_above(torch.tensor([1.0, 1, 1, 1, 0]), 0.5, range(5))
        False
    """
    return float(right.mean()) - half_interval(right, groups) > share


def _clustered(apart: Tensor, groups: Sequence[Any]) -> float:
    """Return the cluster-robust standard error of the mean, at least one image's worth."""
    sums: dict[Any, float] = {}
    for value, group in zip((apart - apart.mean()).tolist(), groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value
    spread = sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return max(math.sqrt(spread), 1.0) / len(apart)


@cache
def quantile(share: float, freedom: int) -> float:
    """Return how far Student's t lies from 0 at most in this share of cases.

    >>> [round(quantile(0.95, freedom), 1) for freedom in (1, 4, 100)]
    [12.7, 2.8, 2.0]
    """
    freedom = min(freedom, MOST_FREEDOM)
    angles = (np.arange(GRID) + 0.5) * (math.pi / 2 / GRID)
    below = np.cumsum(np.cos(angles) ** (freedom - 1))  # t = sqrt(freedom) tan(angle)
    place = int(np.searchsorted(below, share * below[-1]))
    return math.sqrt(freedom) * math.tan(angles[place])
