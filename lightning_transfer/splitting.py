"""Hold out a part of the training images: the same share of each class, and no group on both sides (ours)."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_transfer.batches import either, label_places
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import structure
from lightning_transfer.source.datasets import known_labels, load
from lightning_transfer.source.stream import seeded

PROBED = 8  # samples whose labels are compared with those that their dataset lists


def labels_of(dataset: Dataset[Any], read: Callable[[Any], Any] | None = None) -> list[int]:
    """Return the class of every image, as the dataset lists them or by loading each.

    A list is trusted if some of its samples have the labels that it lists: `__getitem__` may map them.

    Args:
        dataset: the images.
        read: turns a sample into a batch of one image and its label; by default the sample is (image, label).

    Raises:
        TransferConfigError: an image has no class number.
    """
    known = listed_labels(dataset, read)
    if known is not None:
        return known.tolist()
    samples = ((index, load(dataset, index, of="target")) for index in range(len(dataset)))  # type: ignore[arg-type]
    return [_class_number(sample, dataset, index, read) for index, sample in samples]


def listed_labels(dataset: Dataset[Any], read: Callable[[Any], Any] | None = None) -> Tensor | None:
    """Return the class of every image, of a dataset that lists them as some of its samples have them; else None.

    Args:
        dataset: the images.
        read: as in `labels_of`.
    """
    known = known_labels(dataset)
    if known is None or known.ndim != 1 or known.is_floating_point() or not _are_given(dataset, known, read):
        return None
    return known


def _are_given(dataset: Dataset[Any], listed: Tensor, read: Callable[[Any], Any] | None) -> bool:
    """Return whether samples have the labels that are listed, as far as some of them can be read."""
    with seeded(0, 0):  # reading may augment
        for index in range(0, len(listed), max(1, len(listed) // PROBED)):
            with suppress(Exception):  # one that cannot be read says so when it is used
                sample = dataset[index]
                is_pair = read is not None or len(sample) == 2  # which of three is the label, the list alone says
                if is_pair and _class_number(sample, dataset, index, read) != int(listed[index]):
                    return False
    return True


def groups_of(dataset: Any) -> list[Any] | None:
    """Return the group of each image from `dataset.groups`, or from the datasets it is made of; None if there are none.

    The same name in two parts of a `ConcatDataset` is one group.

    Raises:
        TransferConfigError: it is not a list, or does not have one entry for each image.
    """
    groups = getattr(dataset, "groups", None)
    if groups is None and isinstance(dataset, Subset):
        inner = groups_of(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if groups is None and isinstance(dataset, ConcatDataset):
        parts = [groups_of(part) for part in dataset.datasets]
        sizes = np.diff([0, *dataset.cumulative_sizes])
        alone = [[(number, index) for index in range(size)] for number, size in enumerate(sizes)]  # each its own
        named = [each if part is None else part for part, each in zip(parts, alone, strict=True)]
        return None if all(part is None for part in parts) else [group for each in named for group in each]
    if groups is None:
        return None
    names = getattr(groups, "tolist", lambda: groups)()  # of a tensor, whose numbers are objects of their own
    if not isinstance(names, Sequence) or len(names) != len(dataset):
        found = f"names {len(names)} groups" if isinstance(names, Sequence) else f"is a {type(groups).__name__}"
        raise TransferConfigError(
            f"{type(dataset).__name__}.groups {found} for {len(dataset)} images; give a list with one for each."
        )
    return [*names]


def by_group(number: int, groups: Sequence[Any] | None) -> list[list[int]]:
    """Return the indices of `number` images as one list for each group; without groups each image is alone.

    >>> by_group(3, ["a", "b", "a"])
    [[0, 2], [1]]
    """
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(range(number) if groups is None else groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def _class_number(sample: Any, dataset: Any, index: int, read: Callable[[Any], Any] | None) -> int:
    try:
        label = torch.as_tensor(_label_in(sample) if read is None else read(sample)[1][0])
        if label.ndim or label.is_floating_point():
            raise TypeError(f"label {label!r}")
    except TransferConfigError as error:
        raise TransferConfigError(f"Image {index} of the training data is {structure(sample)}. {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TransferConfigError(
            f"Image {index} of the training data, a {type(dataset).__name__}, is {structure(sample)}; expected (image, "
            "class number), so that a part can be held out by class. Give such samples, or list the classes as "
            "dataset.targets; advise takes adapt=lambda batch: (batch['image'], batch['label'])."
        ) from error
    return int(label)


def _label_in(sample: Any) -> Any:
    """Return what stands where a sample's label does: of three entries or more the one whole number."""
    if not isinstance(sample, tuple | list) or len(sample) < 3:
        return sample[1]
    numbers = (torch.as_tensor(part) if isinstance(part, int | np.integer) else part for part in sample)
    places = label_places([part[None] if isinstance(part, Tensor) else part for part in numbers])
    if len(places) > 1:
        made = "advise(..., adapt=lambda batch: (batch[0], batch[{}]))"
        raise TransferConfigError(f"{either(places, made)} Or list the classes as dataset.targets.")
    return sample[places[0] if places else 1]


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


def folds(labels: Sequence[int], groups: Sequence[Any] | None = None, *, num_folds: int) -> list[list[int]]:
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
