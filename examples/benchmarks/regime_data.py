"""Load the photographs of the regime benchmark: ImageNet's as the source, small data sets as targets, at 112 pixels."""

import io
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.splitting import held_out

SIDE, WHOLE = 112, 128  # of a crop; of the resized image before its centre is cropped
AREA, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)  # of random crops: share of the image, width to height
VALIDATION = 0.25  # of the training split
SOURCES = ("src_in1k", "src_in37")
TARGETS = ("flowers", "dtd10", "scenes15", "trashnet", "rsscn7", "brainmri")


@dataclass(frozen=True)
class Photos(Dataset[tuple[Tensor, int]]):
    """Images in memory as bytes, returned as a network's input.

    Attributes:
        pixels: (n, 3, height, width) bytes.
        targets: (n,) classes.
        augmented: whether each is cropped and mirrored at random; otherwise its centre is returned.
        random: draws the crops; by default torch's own generator.
    """

    pixels: Tensor
    targets: Tensor
    augmented: bool = False
    random: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        return self._cropped(image) if self.augmented else centre(image[None])[0], int(self.targets[index])

    def only(self, indices: Any, **options: Any) -> "Photos":
        """Return some of them."""
        return Photos(self.pixels[indices], self.targets[indices], **options)

    def _cropped(self, image: Tensor) -> Tensor:
        """Return a part of random size, shape and place, mirrored with probability .5."""
        area, shape, down, right, mirrored = torch.rand(5, generator=self.random).tolist()
        (low, high), (narrow, wide) = AREA, np.log(RATIO)
        total, ratio = image.shape[1] * image.shape[2], np.exp(narrow + shape * (wide - narrow))
        size = (low + area * (high - low)) * total
        height, width = (
            min(round(side), most)
            for side, most in zip((np.sqrt(size / ratio), np.sqrt(size * ratio)), image.shape[1:], strict=True)
        )
        top, left = (
            int(place * (most - side + 1))
            for place, most, side in zip((down, right), image.shape[1:], (height, width), strict=True)
        )
        part = resized(image[None, :, top : top + height, left : left + width], SIDE)[0]
        return part.flip(2) if mirrored < 0.5 else part


def resized(pixels: Tensor, side: int) -> Tensor:
    """Return bytes as square images of that side, normalised as EfficientNet-lite takes them."""
    images = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
    return images / 127.5 - 1


def centre(pixels: Tensor) -> Tensor:
    """Return the centres of images, as evaluation sees them."""
    edge = (WHOLE - SIDE) // 2
    return resized(pixels, WHOLE)[:, :, edge : edge + SIDE, edge : edge + SIDE]


@cache
def load(file: str, folder: Path) -> dict[str, Photos]:
    """Read the training and test images of a file; once a process."""
    with np.load(folder / f"{file}.npz", allow_pickle=False) as data:
        numbers = data.get("imagenet_index")
        parts = {}
        for split in ("train", "test"):
            files, ends = data[f"{split}_bytes"].tobytes(), data[f"{split}_offsets"].tolist()
            images = [np.asarray(Image.open(io.BytesIO(files[start:end]))) for start, end in pairwise(ends)]
            labels = data[f"y_{split}"] if numbers is None else numbers[data[f"y_{split}"]]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
            parts[split] = Photos(pixels, torch.from_numpy(labels).long())
    return parts


@cache
def source(folder: Path) -> Photos:
    """Read the training images of both source files, labelled by their place among ImageNet's 1,000 classes."""
    parts = [load(file, folder)["train"] for file in SOURCES]
    return Photos(torch.cat([part.pixels for part in parts]), torch.cat([part.targets for part in parts]))


@dataclass(frozen=True)
class Draw:
    """One draw of a target: training images, validation images that choose, and test images that are read once.

    Attributes:
        name: of the target, the number of images and the seed.
        train: without augmentation.
        validation: held out of the training split, the same for every seed.
        test: the data set's own test images.
        num_classes: of the target.
    """

    name: str
    train: Photos
    validation: Photos
    test: Photos
    num_classes: int


def target(name: str, folder: Path, *, shots: int, seed: int) -> Draw:
    """Draw a target with `shots` training images of each class, or all that are not held out."""
    parts = load(f"tgt_{name}", folder)
    train = parts["train"]
    num_classes = int(train.targets.max()) + 1
    out = held_out(train.targets.tolist(), VALIDATION)
    rest = torch.tensor(sorted({*range(len(train))} - {*out}))
    if shots:
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        rest = torch.cat([rest[train.targets[rest] == label][:shots] for label in range(num_classes)])
    name = f"{name}-{shots}-{seed if shots else 'any'}"
    return Draw(name, train.only(rest), train.only(torch.tensor(out)), parts["test"], num_classes)
