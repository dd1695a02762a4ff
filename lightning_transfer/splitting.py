"""Hold out a part of the training images: the same share of each class, and each group on one side only (ours)."""

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


def check_divisible(labels: Sequence[int], groups: Sequence[Any] | None, *, least: int, least_groups: int = 2) -> None:
    """Refuse images of which none can be held out in turns.

    Args:
        labels: class of each image.
        groups: the group of each image.
        least: how many images there have to be.
        least_groups: how many groups, if there are groups.

    Raises:
        TransferConfigError: a label is negative, or there are too few images, classes or groups.
    """
    counts = Counter(labels)
    if min(counts, default=0) < 0:
        raise TransferConfigError(
            f"A label is {min(counts)}; expected class numbers from 0. Leave images without a class out."
        )
    most = max(counts.values(), default=0)
    if len(counts) < 2 or most < 2 or len(labels) < least:
        raise TransferConfigError(
            f"There are {len(labels)} images of {len(counts)} classes, the largest of size {most}; expected at least "
            f"two classes, two images of one class, and {least} images. Give more labelled images."
        )
    if groups is not None:
        spread = Counter(label for label, _ in {*zip(labels, groups, strict=True)})
        alone = sum(number == 1 for number in spread.values())
        if (number := len({*groups})) < least_groups or len(spread) - alone < 2:
            raise TransferConfigError(
                f"Images are of {number} groups, and {alone} of {len(spread)} classes have images of only one group: "
                f"if it is held out, no training image has the class. Expected at least {least_groups} groups and two "
                "classes that are in several. Let the dataset's groups name what images belong to besides their class, "
                "such as a patient or a track, or remove groups."
            )


def held_out(labels: Sequence[int], share: float, *, groups: Sequence[Any] | None = None, seed: int = 0) -> list[int]:
    """Return which images to hold out.

    Args:
        labels: class of each image.
        share: of each class that is held out, as closely as whole images and groups allow.
        groups: the group of each image, for example a patient; images of one group stay together.
        seed: of the choice.

    Raises:
        TransferConfigError: no image, or all images, would be held out.

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
        if gain >= 0:  # if half a group too many is as close as half a group too few, hold it out
            found += order[place]
            for label, number in inside.items():
                wanted[label] -= number
    if not 0 < len(found) < len(labels):
        raise TransferConfigError(
            f"Of {len(labels)} training images in {len(order)} groups, {len(found)} would be held out "
            f"as a share of {share:g}. Pass more images, or another share."
        )
    return sorted(found)


def folds(labels: Sequence[int], groups: Sequence[Any] | None = None, *, num_folds: int = FOLDS) -> list[list[int]]:
    """Return parts of the images to hold out in turns: of even size and classes, and no group in two of them.

    Args:
        labels: class of each image.
        groups: the group of each image.
        num_folds: how many parts; if there are fewer groups, as many as groups.

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
            f"All {len(labels)} training images are of one group, so none can be held out from the others. Pass at "
            "least two groups."
        )
    drawn = [order[place] for place in np.random.default_rng(0).permutation(len(order))]
    parts: list[list[int]] = [[] for _ in range(num_folds)]
    counts = [Counter[int]() for _ in parts]
    for inside in sorted(drawn, key=len, reverse=True):  # each to the part with the fewest of its classes and images
        classes = Counter(labels[index] for index in inside)
        crowd = [(sum(count[label] * number for label, number in classes.items()), count.total()) for count in counts]
        place = crowd.index(min(crowd))
        parts[place] += inside
        counts[place] += classes
    return [sorted(part) for part in parts]
