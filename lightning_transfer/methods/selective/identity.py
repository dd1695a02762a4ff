"""Short names of images, by which kept work knows what it was made of."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_transfer.methods.selective.pictures import Picture, Pictures

IDENTIFIED = 64  # images whose pixels tell one large dataset from another


def identity(pictures: Pictures) -> str:
    """A short name of images in their order, by some of them."""
    some = torch.linspace(0, len(pictures) - 1, min(IDENTIFIED, len(pictures))).long().tolist()
    return f"{len(pictures)} images {digest_of(pictures[index] for index in some)}"


def digest_of(pictures: Iterable[Picture]) -> str:
    """A short name of all of them, in their order."""
    found = hashlib.sha256()
    for pixels, label in pictures:
        found.update(f"{label} ".encode())
        if isinstance(pixels, Tensor):
            found.update(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
    return found.hexdigest()[:16]
