"""Short names of images, by which kept work knows what it was made of."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_transfer.methods.selective.pictures import IDENTIFIED, Picture, Pictures, spread
from lightning_transfer.source.datasets import known_labels


def identity(pictures: Pictures) -> str:
    """A short name of images in their order, by some of them and all labels that their dataset lists."""
    some = (pictures[index] for index in spread(len(pictures), IDENTIFIED))
    labels = known_labels(pictures.dataset)
    listed = "" if labels is None else f", labels {hashlib.sha256(repr(labels.tolist()).encode()).hexdigest()[:16]}"
    return f"{len(pictures)} images {digest_of(some)}{listed}"


def looked_at(pictures: Pictures) -> str:
    """What `identity` looks at, in words."""
    listed = "" if known_labels(pictures.dataset) is None else " and all listed labels"
    return f"{min(len(pictures), IDENTIFIED):,} of {len(pictures):,} {pictures.name} images{listed}"


def digest_of(pictures: Iterable[Picture]) -> str:
    """A short name of all of them, in their order."""
    found = hashlib.sha256()
    for pixels, label in pictures:
        found.update(f"{label} ".encode())
        if isinstance(pixels, Tensor):
            found.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
    return found.hexdigest()[:16]


def is_same(before: Dataset[Any] | None, data: Dataset[Any]) -> bool:
    """Return whether two datasets are one, or the same part of one, without a look at an image."""
    before = before.dataset if isinstance(before, Pictures) else before
    if isinstance(before, Subset) and isinstance(data, Subset) and before.dataset is data.dataset:
        return list(before.indices) == list(data.indices)
    return before is data
