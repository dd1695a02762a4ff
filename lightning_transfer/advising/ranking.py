"""Rank pretrained networks on the user's data by linear probes of their frozen features (ours)."""

import os
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.advising.backbones import Networks, Run, by_name, pictures_of
from lightning_transfer.advising.tables import html_table, text_table
from lightning_transfer.advising.verdicts import half_interval
from lightning_transfer.datasets import groups_of
from lightning_transfer.errors import check_count
from lightning_transfer.probing import probed
from lightning_transfer.progress import tqdm_progress
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import labels_of
from lightning_transfer.splitting import check_divisible

COLUMNS = ("network", "accuracy, %", "from the best", "ms an image", "M parameters", "pixels")


@dataclass(frozen=True)
class Ranked:
    """Holds how well a linear classifier of a network's features does.

    Attributes:
        name: of the network.
        accuracy: share of the images that are right when held out.
        error: its standard error, if 1.96 of it are half of Student's 95 % interval; clustered by group.
        difference: accuracy above that of the best network: 0 or less.
        interval: half of the difference's interval, which is paired: both networks are scored on the same images. The
            intervals of all pairs of networks hold together with 95 % (Bonferroni), because the best is chosen of all.
        milliseconds: that an image takes without reading it, in the fastest batch: others may share the machine.
        parameters: of the network without its head.
        size: height and width of the pictures that it was given.
    """

    name: str
    accuracy: float
    error: float
    difference: float
    interval: float
    milliseconds: float
    parameters: int
    size: tuple[int, int]

    @property
    def is_told_apart(self) -> bool:
        """Return whether it is shown to be worse than the best network."""
        return self.difference + self.interval < 0

    def cells(self, *, is_best: bool) -> tuple[str, ...]:
        """Return what a table shows."""
        apart = "" if is_best else f"{100 * self.difference:+.1f} +- {100 * self.interval:.1f}"
        accuracy = f"{100 * self.accuracy:.1f} +- {196 * self.error:.1f}"
        cost = f"{self.milliseconds:.1f}", f"{self.parameters / 1e6:.1f}"
        return self.name, accuracy, apart, *cost, f"{self.size[0]} x {self.size[1]}"


@dataclass(frozen=True)
class Ranking:
    """Holds networks from the best to the worst; `print` and notebooks show a table.

    Attributes:
        rows: one for each network.
        images: the number of images.
        classes: the number of their classes.
        groups: the number of their groups; None without groups.

    Example:
        >>> row = Ranked("net", 0.9, 0.03, 0.0, 0.0, milliseconds=1.0, parameters=300_000, size=(32, 32))
        >>> Ranking((row,), images=100, classes=10).best
        'net'
    """

    rows: tuple[Ranked, ...]
    images: int
    classes: int
    groups: int | None = None

    @property
    def best(self) -> str:
        """Return the name of the network with the best accuracy."""
        return self.rows[0].name

    def __str__(self) -> str:
        return "\n".join([self._title(), "", *text_table(self._cells(), is_right=True), "", self._says()])

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return f"<p>{self._title()}</p>{html_table(self._cells())}<p>{escape(self._says())}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [COLUMNS, *(row.cells(is_best=number == 0) for number, row in enumerate(self.rows))]

    def _title(self) -> str:
        of = "" if self.groups is None else f" of {self.groups} groups"
        return (
            f"Linear probes on frozen features: {self.images:,} images{of}, {self.classes} classes. Each image is "
            "scored by a probe that was not fitted to it. +- is half of a 95 % interval; the intervals of all "
            "differences between two networks hold jointly with 95 % confidence."
        )

    def _says(self) -> str:
        others = self.rows[1:]
        alike = [row.name for row in others if not row.is_told_apart]
        if not others:
            return f"{self.best} is the only network."
        if not alike:
            return f"{self.best} is shown to be better than each of the others."
        names = ", ".join(alike)
        return f"Not shown to be worse than {self.best}: {names}. Of these take the cheapest, or give more images."


def rank_networks(
    networks: Networks,
    data: Any,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    cache: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> Ranking:
    """Rank pretrained networks by the accuracy of linear classifiers of their features on your images.

    All images run once through each frozen network, resized and normalised as its timm configuration says. A linear
    classifier is then fitted on the input of its head, in five folds, each of which chooses its penalty without the
    images that it is scored on. Networks are compared on the same images. The best of many is partly best by chance, so
    the intervals of all pairs hold jointly with 95 % confidence: look at which networks are not shown to be worse.
    Networks and random state are left as they were.

    Args:
        networks: names of timm models, whose pretrained weights are loaded one network at a time, or modules, in a list
            or by name. A module that is not timm's needs a `pretrained_cfg` with mean, std and input_size. It gives
            features; if it gives logits, the input of its head is used.
        data: a dataset of (image, class number) without Normalize and augmentation, whose images are PIL images, uint8,
            or floats from 0 to 1, which are rounded to 8 bits; or a loader or DataModule with such a train dataset.
            Images of one group, if the dataset has a list `groups`, are held out together.
        device: where networks run.
        batch_size: images that run together.
        num_workers: processes that read images.
        cache: folder that keeps features, so that an interrupted ranking resumes. Features are used again if layers and
            weights, the transform, `device`, `batch_size` and the images are the same (64 images and what the dataset
            lists are compared), and the network gives the same features for eight images.
        image_size: height and width of the images that every network gets, without a crop, for the accuracy and the
            cost at the size that you will train with. By default each network gets the size of its pretraining.

    Raises:
        TransferConfigError: images are normalised or augmented at random, labels are not class numbers, a network does
            not say how its pictures are normalised, it does not take `image_size`, it cannot be copied or run, what it
            gives is not features, or there is nothing to hold out.

    Example:
        >>> import timm
        >>> networks = {width: timm.create_model("resnet10t", num_classes=0).eval() for width in ("one", "other")}
        >>> images = [(torch.full((3, 8, 8), index % 2 * 255, dtype=torch.uint8), index % 2) for index in range(12)]
        >>> rank_networks(networks, images).rows[0].accuracy
        1.0
    """
    check_count("batch_size", batch_size, least=1)
    check_count("num_workers", num_workers, least=0)
    if image_size is not None:
        check_count("image_size", image_size, least=1)
    chosen = by_name(networks, image_size)
    pictures = pictures_of(data, num_workers)
    with seeded(0, 0):  # reading may draw
        labels = labels_of(pictures.dataset, num_workers=num_workers)
    groups = groups_of(pictures.dataset)
    check_divisible(labels, groups, least=5, least_groups=3)
    classes, numbers = torch.tensor(labels).unique(return_inverse=True)
    costs: dict[str, dict[str, Any]] = {}
    right: dict[str, Tensor] = {}
    with tqdm_progress("Ranking networks", len(chosen) * len(labels)) as step:
        run = Run(pictures, step, device, batch_size, num_workers, cache, image_size)
        for name, network in chosen.items():
            seen, size = run.look(name, network)
            costs[name] = {"milliseconds": seen.milliseconds, "parameters": seen.parameters, "size": size}
            right[name] = probed(seen.features, numbers, num_classes=len(classes), groups=groups).double()
    names = sorted(right, key=lambda name: -float(right[name].mean()))
    gaps, of = {name: right[name] - right[names[0]] for name in names}, groups or [*range(len(labels))]
    pairs = len(names) * (len(names) - 1) // 2
    rows = (
        Ranked(
            name,
            accuracy=float(right[name].mean()),
            error=half_interval(right[name], of) / 1.96,
            difference=float(gaps[name].mean()),
            interval=half_interval(gaps[name], of, among=pairs) if name != names[0] else 0.0,
            **costs[name],
        )
        for name in names
    )
    return Ranking(tuple(rows), len(labels), len(classes), None if groups is None else len({*groups}))
