"""Short names of images, by which kept work knows what it was made of."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_transfer.methods.selective.pictures import Picture, Pictures, spread

IDENTIFIED = 64  # images whose pixels tell one large dataset from another


def identity(pictures: Pictures) -> str:
    """A short name of images in their order, by some of them."""
    some = (pictures[index] for index in spread(len(pictures), IDENTIFIED))
    return f"{len(pictures)} images {digest_of(some)}"


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
