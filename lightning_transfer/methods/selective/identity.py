"""Digest images, so that kept work can be compared with the images it was made of."""

from typing import Any

from torch.utils.data import Dataset, Subset

from lightning_transfer.methods.selective.pictures import IDENTIFIED, Pictures


def identity(pictures: Pictures) -> str:
    """Return a digest of images in their order, from some of them and from what their dataset lists about all."""
    listed = "".join(f", {name} {digest}" for name, digest in pictures.listed.items())
    return f"{len(pictures)} images {pictures.glance.digest}{listed}"


def looked_at(pictures: Pictures) -> str:
    """Return a text that says what `identity` compares."""
    listed = "".join(f", {name}" for name in pictures.listed)
    return f"{min(len(pictures), IDENTIFIED):,} of {len(pictures):,} {pictures.name} images{listed}"


def is_same(before: Dataset[Any] | None, data: Dataset[Any]) -> bool:
    """Return whether two datasets are the same, or the same part of one, without reading an image."""
    before = before.dataset if isinstance(before, Pictures) else before
    if isinstance(before, Subset) and isinstance(data, Subset) and before.dataset is data.dataset:
        return list(before.indices) == list(data.indices)
    return before is data
