"""Run training images through a network outside of training, and return what its head takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_transfer.batches import class_numbers, label_hint
from lightning_transfer.datasets import load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.hearing import Hearing
from lightning_transfer.glue.moving import as_validated
from lightning_transfer.naming import nesting
from lightning_transfer.reading import apart
from lightning_transfer.roles import Head, find_head, is_pooling, on_the_way
from lightning_transfer.tracing import evaluating, images_and_labels

ADAPT = "Pass what extracts images and labels: advise(..., adapt=lambda batch: (batch['image'], batch['label']))."
FORWARD = "Say how images run: advise(..., forward=lambda module, images: {})."


@dataclass(frozen=True)
class Reading:
    """Holds how images and labels are read.

    Attributes:
        head: its path, or "auto".
        adapt: turns a batch into images and labels; None if it is both.
        forward: runs images; None for the module's own forward.
    """

    head: str = "auto"
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None


class Places(NamedTuple):
    """Holds where the head and the network are in a module before a candidate changes its layers.

    Attributes:
        head: its path.
        network: path of what takes the images.
        is_apart: whether that ends before the head.
    """

    head: str
    network: str
    is_apart: bool

    @property
    def guess(self) -> str:
        """Return how images run if the module has no forward."""
        end = f" and {self.head!r}" if self.is_apart else ""
        return f"through {self.network!r}{end}" if self.network else ""


class Runner:
    """Runs images through a module as a Trainer would, but without gradients.

    Args:
        trainer: of the run.
        module: a copy of the user's.
        reading: how batches are read.
        loader: of images, of which one may be needed to find the head.
        places: as another runner found them; None in an unchanged module.

    Raises:
        TransferConfigError: there is no head, or it is not known what takes the images.
    """

    def __init__(
        self, trainer: Any, module: Any, reading: Reading, loader: DataLoader[Any], places: Places | None
    ) -> None:
        self.trainer, self.module, self.reading = trainer, module, reading
        forward = reading.forward
        if places is None:
            self.head = find_head(module, reading.head, probe=lambda: self._try(loader))
        else:
            self.head = Head(places.head, _standing_at(module, places.head))
            forward = forward or (lambda module, images: module.get_submodule(places.network)(images))
        self.hearing = Hearing(trainer, module, self.head, forward=forward, how=FORWARD)
        self.places = places or Places(self.head.path, self.hearing.path, self.hearing.is_apart)

    def logits(self, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
        """Return logits (n, classes) and labels (n,) of all images of a loader."""
        found = [(_rows(self._hear(images)[1]), labels) for images, labels in map(self._read, loader)]
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logits, labels

    def features(self, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, int]:
        """Return what the head takes (n, D), labels (n,), and how many numbers it gives for an image."""
        found, outputs = [], 0
        for images, labels in map(self._read, loader):
            taken, given = self._hear(images)
            taken = taken.mean((2, 3)) if is_pooling(self.head.module) else taken
            found.append((_rows(taken), labels))
            outputs = given.shape[1]
        features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return features, labels, outputs

    def _try(self, loader: DataLoader[Any]) -> None:
        sample = apart(lambda: load(loader.dataset, 0, of="target"), loader.num_workers)
        images, _ = self._read((loader.collate_fn or default_collate)([sample]))
        with evaluating(self.module):
            self.module(images)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images, on the device and after the user's hooks, and class numbers."""
        moved = as_validated(self.trainer, batch)
        adapt = self.reading.adapt
        made = ADAPT if adapt is None else f"adapt= made that of {nesting(moved)}."
        given = moved if adapt is None else adapt(moved)
        images, labels = images_and_labels(given, self.trainer.strategy.root_device, otherwise=made)
        numbers = class_numbers(labels)
        if numbers is None:
            found = f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected (B,) class numbers."
            raise TransferConfigError(f"{found} {label_hint(labels, 'adapt=lambda batch: (batch[0], {})')}")
        return images, numbers.cpu()

    def _hear(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head takes and gives."""
        (calls,), _ = self.hearing.hear(images, [self.head.module])
        if not calls:
            name, how = type(self.module).__name__, FORWARD.format("...")
            raise TransferConfigError(f"{name} does not run its head {self.head.path!r} on images. {how}")
        taken, given = calls[-1]
        if given.ndim != 2 and given.shape[1:].numel() != given.shape[1]:
            raise TransferConfigError(
                f"The head {self.head.path!r} gives {tuple(given.shape[1:])} for an image; expected one row of classes."
            )
        return taken, given


def _rows(values: Tensor) -> Tensor:
    return values.float().flatten(1).cpu()


def _standing_at(module: nn.Module, path: str) -> nn.Module:
    """Return what stands at a path, or the networks side by side that have taken the place of one on the way there."""
    ensembles = (part for _, part in on_the_way(module, path) if hasattr(part, "heads_of_members"))
    return next(ensembles, module.get_submodule(path))
