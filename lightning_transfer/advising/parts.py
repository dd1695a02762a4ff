"""Parts of the training images that are held out in turns, and how sure a mean over them is (ours)."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.advising.student import quantile
from lightning_transfer.splitting import folds

FOLDS = 4
ENOUGH = 250  # scored images, behind which no further fold is trained
MOST = 1000  # images of the target that are scored in a fold


def fold(labels: list[int], groups: list[Any] | None) -> list[list[int]]:
    """Parts to hold out in turns, each a quarter, or a group where there are fewer, until enough images are scored.

    Raises:
        TransferConfigError: all images belong to one group.
    """
    parts = folds(labels, groups, num_folds=FOLDS)
    needed = 1
    while needed < len(parts) and not _are_enough(parts[:needed], groups):
        needed += 1
    return parts[:needed]


def _are_enough(parts: list[list[int]], groups: list[Any] | None) -> bool:
    """Whether no more have to be scored: of enough images, and of two groups, without which a mean has no error."""
    scored = [index for part in parts for index in to_score(part)]
    return len(scored) >= ENOUGH and len({index if groups is None else groups[index] for index in scored}) > 1


def to_score(part: list[int]) -> list[int]:
    """The images of a part that are scored."""
    return some(part, MOST)


def some(indices: list[int], most: int) -> list[int]:
    """At most so many of them, drawn evenly, in order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:most]
    return [indices[place] for place in order.sort().values.tolist()]


def error(apart: Tensor, groups: list[Any]) -> float:
    """The standard error of a mean over images of which those of a group are not independent, or a step of it.

    Of few groups it is so much larger that 1.96 of it are half of Student's 95 % interval all the same.
    """
    sums: dict[Any, float] = {}
    for value, group in zip((apart - apart.mean()).tolist(), groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value
    spread = sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
    return max(math.sqrt(spread), 1.0) / len(apart) * quantile(len(sums) - 1) / 1.96
