"""Hold out a part of the training images: the same share of each class, and no group on both sides (ours)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_transfer.errors import TransferConfigError

FOLDS = 5


def by_group(number: int, groups: Sequence[Any] | None) -> list[list[int]]:
    """Return the indices of `number` images as one list for each group; without groups each image is alone.

    >>> by_group(3, ["a", "b", "a"])
    [[0, 2], [1]]
    """
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(range(number) if groups is None else groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def held_out(labels: Sequence[int], share: float, *, groups: Sequence[Any] | None = None, seed: int = 0) -> list[int]:
    """Return which images to hold out.

    Args:
        labels: class of each image.
        share: of each class that is held out, as nearly as images and groups can be counted.
        groups: what each image belongs to, a patient, say; images of one group stay together.
        seed: of the choice.

    Raises:
        TransferConfigError: nothing, or all, would be held out.

    Example:
        >>> held_out([0, 0, 0, 0, 1, 1, 1, 1], 0.25, groups=list("aabbccdd"))
        [0, 1, 4, 5]
    """
    order = by_group(len(labels), groups)
    wanted = {label: share * number for label, number in Counter(labels).items()}
    found: list[int] = []
    for place in np.random.default_rng(seed).permutation(len(order)):
        inside = Counter(labels[index] for index in order[place])
        gain = sum(abs(wanted[label]) - abs(wanted[label] - number) for label, number in inside.items())
        if gain >= 0:  # half a group too many is as near as half a group too few
            found += order[place]
            for label, number in inside.items():
                wanted[label] -= number
    if not 0 < len(found) < len(labels):
        raise TransferConfigError(
            f"Of {len(labels)} training images in {len(order)} groups, {len(found)} would be held out "
            f"as a share of {share:g}. Give more images, or another share."
        )
    return sorted(found)


def folds(labels: Sequence[int], groups: Sequence[Any] | None = None, *, num_folds: int = FOLDS) -> list[list[int]]:
    """Return parts of the images to hold out in turns: of even size and classes, and no group in two of them.

    Args:
        labels: class of each image.
        groups: what each image belongs to.
        num_folds: how many parts; as many as there are groups, if those are fewer.

    Raises:
        TransferConfigError: all images belong to one group.

    Example:
        >>> folds([0, 0, 1, 1], num_folds=2)
        [[1, 2], [0, 3]]
    """
    order = by_group(len(labels), groups)
    num_folds = min(num_folds, len(order))
    if num_folds < 2:
        raise TransferConfigError(
            f"All {len(labels)} training images are of one group, so none can be held out from the others. Give at "
            "least two groups."
        )
    drawn = [order[place] for place in np.random.default_rng(0).permutation(len(order))]
    parts: list[list[int]] = [[] for _ in range(num_folds)]
    counts = [Counter[int]() for _ in parts]
    for inside in sorted(drawn, key=len, reverse=True):  # each to where its classes are fewest, and the part smallest
        classes = Counter(labels[index] for index in inside)
        crowd = [(sum(count[label] * number for label, number in classes.items()), count.total()) for count in counts]
        place = crowd.index(min(crowd))
        parts[place] += inside
        counts[place] += classes
    return [sorted(part) for part in parts]
