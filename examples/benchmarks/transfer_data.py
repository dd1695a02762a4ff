"""Load images for the transfer matrix: a source, targets near and far, and a few training images of each class."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
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

MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of CIFAR-100, which the networks are pretrained on
SIDE, SHIFT = 32, 4
NEAR = sorted(np.random.default_rng(0).permutation(100)[:20].tolist())  # CIFAR-100's classes that no pretraining sees
VALIDATION, MOST_VALIDATION = 0.25, 500  # of the training split: a share, and at most so many images

SKEWED = "-skewed"  # ends the name of a target whose classes have unequal numbers of images
# name: changes the pixels of the near target so that it is farther
CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "upside-down": lambda pixels: pixels.flip(2),
    "channels-swapped": lambda pixels: pixels.flip(1),
    "negative": lambda pixels: 255 - pixels,
}

# name: file of --data, data set of torchvision, and whether its images may be mirrored
SETS = {
    "cifar100": ("cifar100_32", "CIFAR100", True),
    "trashnet": ("trashnet_32", None, True),
    "gtsrb": ("gtsrb_32", "GTSRB", False),
    "signdigits": ("signdigits_32", None, False),
    "cifar10": (None, "CIFAR10", True),
    "flowers": (None, "Flowers102", True),
    "dtd": (None, "DTD", True),
}


@dataclass(frozen=True)
class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory as bytes, returned normalised.

    Attributes:
        pixels: (n, 3, 32, 32) bytes.
        targets: (n,) classes.
        augmented: whether each is shifted at random, and mirrored if `mirrored`.
        mirrored: whether mirroring makes sense.
        groups: what each image belongs to, if the data set has groups.
    """

    pixels: Tensor
    targets: Tensor
    augmented: bool = False
    mirrored: bool = False
    groups: list[int] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        if self.augmented:
            down, right = torch.randint(2 * SHIFT + 1, (2,)).tolist()
            image = F.pad(image, (SHIFT,) * 4)[:, down : down + SIDE, right : right + SIDE]
            image = image.flip(2) if self.mirrored and torch.rand(()) < 0.5 else image
        return normalised(image[None])[0], int(self.targets[index])

    def only(self, indices: Any, *, augmented: bool = False) -> "Pictures":
        """Return some of them."""
        groups = None if self.groups is None else [self.groups[index] for index in torch.as_tensor(indices).tolist()]
        return Pictures(self.pixels[indices], self.targets[indices], augmented, self.mirrored, groups)

    def of_classes(self, classes: list[int]) -> "Pictures":
        """Return those of some classes, with new numbers."""
        number = torch.full((int(self.targets.max()) + 1,), -1)
        number[classes] = torch.arange(len(classes))
        kept = (number[self.targets] >= 0).nonzero()[:, 0]
        found = self.only(kept)
        return Pictures(found.pixels, number[found.targets], found.augmented, found.mirrored, found.groups)


def normalised(pixels: Tensor) -> Tensor:
    """Return bytes as a network's input."""
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@cache
def load(name: str, folder: Path | None) -> tuple[Pictures, Pictures]:
    """Load training and test images of a data set, from a folder of .npz files or by torchvision; once a process."""
    file, _, mirrored = SETS[name]
    if folder is not None and file is not None:
        with np.load(folder / f"{file}.npz", allow_pickle=False) as data:
            groups = data["group_train"].tolist() if "group_train" in data else None
            return (
                Pictures(_pixels(data, "train"), torch.from_numpy(data["y_train"]), mirrored=mirrored, groups=groups),
                Pictures(_pixels(data, "test"), torch.from_numpy(data["y_test"]), mirrored=mirrored),
            )
    import torchvision

    torchvision_name = _of_torchvision(name)
    make, root = getattr(torchvision.datasets, torchvision_name), folder or Path("data")
    parts = []
    for split in ("train", "test"):
        which = {"train": split == "train"} if torchvision_name.startswith("CIFAR") else {"split": split}
        images = make(root, download=True, **which)
        arrays = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for image, _ in images]
        labels = torch.tensor([label for _, label in images])
        groups = _tracks(images) if torchvision_name == "GTSRB" and split == "train" else None
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        parts.append(Pictures(pixels, labels, mirrored=mirrored, groups=groups))
    return parts[0], parts[1]


def _tracks(images: Any) -> list[int]:
    """Return the track of each image, which shows one sign: the first number in its file's name."""
    tracks = [(label, Path(path).name.partition("_")[0]) for path, label in images._samples]
    numbers = {track: number for number, track in enumerate(dict.fromkeys(tracks))}
    return [numbers[track] for track in tracks]


def _pixels(data: Any, split: str) -> Tensor:
    if f"x_{split}" in data:
        return torch.from_numpy(data[f"x_{split}"]).permute(0, 3, 1, 2).contiguous()
    files, ends = data[f"{split}_bytes"].tobytes(), data[f"{split}_offsets"].tolist()
    images = [np.asarray(Image.open(io.BytesIO(files[start:end]))) for start, end in pairwise(ends)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Target:
    """One draw of a target: training images, validation images that choose, and test images that are read once.

    If its name ends in "-skewed", some classes have a tenth of the images that others have.
    """

    train: Pictures
    validation: Pictures
    test: Pictures
    num_classes: int


def source(folder: Path | None) -> tuple[Pictures, Pictures]:
    """Return CIFAR-100 without the held-out classes, for training and for testing."""
    classes = [label for label in range(100) if label not in NEAR]
    train, test = load("cifar100", folder)
    return train.of_classes(classes), test.of_classes(classes)


def set_of(name: str) -> str:
    """Return the data set that a target is made of.

    Raises:
        SystemExit: no target has that name.
    """
    plain = name.removesuffix(SKEWED)
    found = "cifar100" if plain == "near" or plain in CHANGED else plain
    known = ["near", *CHANGED, *(each for each in SETS if each != "cifar100")]
    if plain not in known:
        raise SystemExit(f"There is no target {name!r}; known: {', '.join(known)}.")
    return found


def check_there(name: str, folder: Path | None) -> None:
    """Refuse a data set that cannot be loaded.

    Raises:
        SystemExit: its file is missing, or torchvision does not have it.
    """
    file = SETS[name][0]
    if folder is None or file is None:
        _of_torchvision(name)
    elif not (folder / f"{file}.npz").exists():
        raise SystemExit(f"There is no {file}.npz in {folder}.")


def _of_torchvision(name: str) -> str:
    """Return torchvision's name of a data set."""
    file, torchvision_name, _ = SETS[name]
    if torchvision_name is None:
        raise SystemExit(f"{name} is not one of torchvision's: pass --data FOLDER with {file}.npz, or other --targets.")
    return torchvision_name


def target(name: str, folder: Path | None, *, shots: int | None, seed: int) -> Target:
    """Draw a target with `shots` training images of each class, or all.

    The validation part is cut from the training split, the same for every seed, and by group if there are groups. The
    seed draws the training images among the rest.
    """
    data, name, is_skewed = set_of(name), name.removesuffix(SKEWED), name.endswith(SKEWED)
    train, test = load(data, folder)
    if data == "cifar100":
        train, test = train.of_classes(NEAR), test.of_classes(NEAR)
    if name in CHANGED:
        train, test = (replace(part, pixels=CHANGED[name](part.pixels)) for part in (train, test))
    num_classes = int(train.targets.max()) + 1
    out = held_out(train.targets.tolist(), VALIDATION, groups=train.groups)
    rest = torch.tensor(sorted({*range(len(train))} - {*out}))
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(0))[:MOST_VALIDATION]
    if shots is not None:
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        sizes = skewed(shots, num_classes) if is_skewed else [shots] * num_classes
        rest = torch.cat([rest[train.targets[rest] == label][:size] for label, size in enumerate(sizes)])
    return Target(train.only(rest, augmented=True), train.only(torch.tensor(out)[order]), test, num_classes)


def relatives(name: str) -> set[str]:
    """Return a target's name and those of the targets that are made of the same images."""
    name = name.removesuffix(SKEWED)
    family = {"near", *CHANGED} if name in ("near", *CHANGED) else {name}
    return family | {each + SKEWED for each in family}


def skewed(shots: int, num_classes: int) -> list[int]:
    """Return unequal class sizes with the same sum; the first is about ten times the last.

    >>> skewed(10, 5)
    [23, 13, 7, 4, 2]
    """
    sizes = np.geomspace(10, 1, num_classes)
    return [max(1, round(size)) for size in sizes * shots * num_classes / sizes.sum()]
