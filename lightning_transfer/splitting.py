"""A part of the training images held out: of each class as much as of any, and no group on both sides (ours)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import structure
from lightning_transfer.source.datasets import known_labels
from lightning_transfer.source.stream import load


def labels_of(dataset: Dataset[Any]) -> list[int]:
    """The class of every image: as the dataset lists them, or by loading each.

    Raises:
        TransferConfigError: an image has no class number.
    """
    known = known_labels(dataset)
    if known is not None and known.ndim == 1 and not known.is_floating_point():
        return known.tolist()
    return [_class_number(load(dataset, index, of="target"), dataset, index) for index in range(len(dataset))]  # type: ignore[arg-type]


def groups_of(dataset: Any) -> list[Any] | None:
    """What each image belongs to, as `dataset.groups` says; None where it does not.

    Raises:
        TransferConfigError: there are more or fewer than images.
    """
    if isinstance(dataset, Subset):
        inner = groups_of(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):  # of a part that names no groups each image is one
        sizes = np.diff([0, *dataset.cumulative_sizes])
        parts = [(groups_of(part), range(size)) for part, size in zip(dataset.datasets, sizes, strict=True)]
        inside = [(number, group) for number, (named, each) in enumerate(parts) for group in named or each]
        return inside if any(named for named, _ in parts) else None
    groups = getattr(dataset, "groups", None)
    if groups is not None and len(groups) != len(dataset):
        raise TransferConfigError(
            f"{type(dataset).__name__}.groups names {len(groups)} groups for {len(dataset)} images; give one for each."
        )
    return None if groups is None else [*getattr(groups, "tolist", lambda: groups)()]  # a tensor's numbers are objects


def _class_number(sample: Any, dataset: Any, index: int) -> int:
    try:
        label = torch.as_tensor(sample[1])
        if label.ndim or label.is_floating_point():
            raise TypeError(f"label {sample[1]!r}")
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TransferConfigError(
            f"Image {index} of the training data, a {type(dataset).__name__}, is {structure(sample)}; expected (image, "
            "class number), so that a part can be held out by class. List the classes, as whole numbers, as "
            "dataset.targets."
        ) from error
    return int(label)


def held_out(labels: Sequence[int], share: float, *, groups: Sequence[Any] | None = None, seed: int = 0) -> list[int]:
    """Which images to hold out.

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
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(range(len(labels)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    wanted = {label: share * number for label, number in Counter(labels).items()}
    found: list[int] = []
    order = list(members.values())
    for place in np.random.default_rng(seed).permutation(len(order)):
        inside = Counter(labels[index] for index in order[place])
        gain = sum(abs(wanted[label]) - abs(wanted[label] - number) for label, number in inside.items())
        if gain >= 0:  # half a group too many is as near as half a group too few
            found += order[place]
            for label, number in inside.items():
                wanted[label] -= number
    if not 0 < len(found) < len(labels):
        raise TransferConfigError(
            f"Of {len(labels)} training images in {len(members)} groups, {len(found)} would be held out "
            f"as a share of {share:g}. Give more images, or another share."
        )
    return sorted(found)
