"""Make descriptors and images for measuring that resemble real ones as far as the cost of a search depends on it."""

import io
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_transfer.methods.selective.descriptors import to_histograms
from lightning_transfer.methods.selective.search import InMemory
from lightning_transfer.methods.selective.store import BLOCK, Store, Stored

Shape = tuple[int, int]  # filters, and bins of each
Shares = Callable[[int, Shape, torch.Generator], Tensor]  # expected (n, filters, bins) shares of an image's positions
POSITIONS = 10_000  # of each filter in an image: at most 2^16, so a count takes two bytes
LATENTS = 8  # random numbers that determine an image's responses
SOURCE, QUERIES = 1, 2  # seeds
SOURCES: dict[Path, Stored] = {}  # on disk


def natural(num: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return shares of Laplacian responses whose log-scale and shift are linear in a few latents of the image.

    Bins have equal shares where an image's latents are 0, as quantiles over a whole data set have.
    """
    filters, bins = shape
    loadings = torch.randn(LATENTS, filters, 2, generator=torch.Generator().manual_seed(0)) / math.sqrt(LATENTS)
    scale, shift = torch.einsum("nl,lfs->snf", torch.randn(num, LATENTS, generator=generator), loadings)
    below = torch.arange(1, bins) / bins
    edges = torch.where(below < 0.5, (2 * below).log(), -(2 - 2 * below).log())
    edges = edges * torch.exp(-0.5 * scale[..., None]) + 0.3 * shift[..., None]
    below = torch.where(edges < 0, 0.5 * edges.exp(), 1 - 0.5 * (-edges).exp())
    ends = torch.zeros(num, filters, 1)
    return torch.cat([ends, below, ends + 1], 2).diff(dim=2).clamp_(min=0)


def independent(num: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return independent shares of bins: images do not resemble each other, so nothing can be ruled out cheaply."""
    shares = torch.empty(num, *shape).exponential_(generator=generator)
    return shares / shares.sum(2, keepdim=True)


def counts(num: int, shape: Shape, *, seed: int, shares: Shares = natural) -> Iterator[Tensor]:
    """Yield counts (images, filters, bins) of synthetic images, block by block."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num, BLOCK):
        expected = shares(min(BLOCK, num - start), shape, generator).mul_(POSITIONS)
        noise = torch.randn(expected.shape, generator=generator)
        yield expected.addcmul_(noise, expected.sqrt()).clamp_(min=0).round_()


def in_memory(num: int, shape: Shape, *, seed: int, shares: Shares = natural) -> InMemory:
    """Return flat histograms of synthetic images."""
    blocks = [to_histograms(some).flatten(1) for some in counts(num, shape, seed=seed, shares=shares)]
    return InMemory(torch.cat(blocks), shape)


def on_disk(folder: str, num: int, shape: Shape, shares: Shares = natural) -> Stored:
    """Return a synthetic source in a file, two bytes a count; written once."""
    path = Path(folder, f"{shares.__name__} {num} {shape[0]} {shape[1]}")
    if path not in SOURCES:
        store = Store(path, num, shape, POSITIONS)
        for number, some in enumerate(counts(num, shape, seed=SOURCE, shares=shares)):
            store.write(number, some, torch.zeros(len(some), dtype=torch.int64))
        SOURCES[path] = Stored(store, torch.arange(num))
    return SOURCES[path]


def remove_sources() -> None:
    """Delete all files."""
    while SOURCES:
        store = SOURCES.popitem()[1].store
        store.close()
        shutil.rmtree(store.folder)


def decoder(side: int, resized: int) -> Callable[[], Image.Image]:
    """Return what decodes and resizes a synthetic photograph: a JPEG of smooth patches with noise."""
    generator = np.random.default_rng(0)
    patches = generator.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((side, side), Image.Resampling.BICUBIC))
    noisy = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return partial(_decode, file.getvalue(), resized)


def _decode(jpeg: bytes, side: int) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
