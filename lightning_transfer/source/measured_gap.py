"""Measure how far a run's target is from its source before the first step, and decide whether the source is used.

The rule is ours: examples/benchmarks/small_networks.md shows the data on which it was chosen.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_transfer import ranks
from lightning_transfer.datasets import groups_of
from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue.loaders import source_workers, target_workers
from lightning_transfer.glue.logs import progress_of, say
from lightning_transfer.glue.moving import as_validated
from lightning_transfer.glue.sides import Side, target_side
from lightning_transfer.naming import nesting
from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.randomness import seeded
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.choosing import Chooser
from lightning_transfer.source.gap import (
    SCALE,
    SOURCE_IMAGES,
    TARGET_IMAGES,
    check_alike,
    check_finite,
    domain_gap,
    is_near,
)
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView


class _Seen(NamedTuple):
    """Holds what was seen of a side's images."""

    features: Tensor  # (n, D)
    images: Tensor  # the last batch
    extent: Extent
    groups: list[Any] | None  # of each image


def measure_gap(view: NetworkView, chooser: Chooser | None, weight: Schedule) -> float:
    """Return the domain gap of the features before the head of the current network; the same in every process.

    Args:
        view: of the network.
        chooser: chooses the source images; None if all are drawn.
        weight: of the source if it is near enough, for messages.
    """
    trainer = view.trainer

    def measured() -> float:
        with progress_of(trainer)("How far the target is from the source", TARGET_IMAGES + SOURCE_IMAGES) as step:
            target, source = _sides(view, chooser)
            mine = _look(view, target)
            step(TARGET_IMAGES)
            like = None if callable(view.source.forward) else mine.images  # a user's forward may resize both
            theirs = _look(view, source, like=like)
            step(SOURCE_IMAGES)
        gap = domain_gap(mine.features, theirs.features, target_groups=mine.groups)
        then = "kept" if is_near(gap) else "left out"
        of = "" if mine.groups is None else f" of {len({*mine.groups})} groups"
        says = f"Domain gap {gap:.2f}, by {len(mine.features)} target images{of} ({SCALE}): the source is {then}."
        if is_near(gap):
            say(trainer, says)
        else:
            line = f"To keep it: weight=lt.{weight!r}."
            if mine.extent.scale != theirs.extent.scale:
                line = (
                    f"The reason may be the scaling: pixels run {mine.extent} in the target, {theirs.extent} in the "
                    "source: give the source the target's transform."
                )
            warnings.warn(f"{says} This run is plain fine-tuning. {line}", NoEffectWarning, stacklevel=2)
        return gap

    try:
        return ranks.from_first(measured)
    except Exception as error:
        hint = (
            "This happened while weight='auto' measured how far the target is from the source. To use the source "
            f"without measuring: weight=lt.{weight!r}."
        )
        if isinstance(error, TransferConfigError):
            raise TransferConfigError(f"{error} {hint}") from error
        error.add_note(hint)
        raise


def data_of(trainer: Any) -> Any:
    """Return the train loader's dataset; the loader itself if the dataset, such as a list, has no weak reference."""
    data = getattr(trainer.train_dataloader, "dataset", None)
    return data if type(data).__weakrefoffset__ else trainer.train_dataloader


def _sides(view: NetworkView, chooser: Chooser | None) -> tuple[Side, Side]:
    """Return the target's and the source's images; if the target was given without augmentation, so is the source."""
    source, given = view.source, None if chooser is None else chooser.target
    hooks, num = source.batch_hooks, source.num_workers
    if given is None:
        target, dataset = target_side(view.trainer, most=TARGET_IMAGES), source.dataset
    else:
        workers = target_workers(num, view.trainer)  # the same as in the rounds of a selection
        target, dataset = Side("target", given, TARGET_IMAGES, hooks, workers), source.plain_dataset
    workers = source_workers(num, view.trainer)
    return target, Side("source", dataset, SOURCE_IMAGES, hooks, workers, forgives=chooser is not None)


def _look(view: NetworkView, side: Side, *, like: Tensor | None = None) -> _Seen:
    """Return what is seen of a side's images; the program's random state does not change.

    If `like` is given, shapes are compared with it before the network runs.
    """
    indices: list[int] = []
    features, extent = [], Extent()
    with seeded(view.source.seed, 0):
        drawn = side.draw()
        for some, batch in side.batches(drawn, view.batch_size):
            images = _unpacked(view.source, as_validated(view.trainer, batch, hooks=side.hooks), side.name)
            if like is not None:
                check_alike(like, images)
            indices += some
            features.append(view.features(images).float().flatten(1).cpu())
            extent.see(images)
    found = torch.cat(features)
    check_finite(side.name, found, indices)
    groups = groups_of(side.dataset) if side.name == "target" else None
    return _Seen(found, images, extent, groups and [groups[index] for index in drawn])


def _unpacked(source: SourceTask, batch: Any, name: str) -> Tensor:
    """Return the images of a batch; a target batch is read in the same way as a source batch."""
    try:
        return source.unpack(batch)[0]
    except Exception as error:
        if name == "source":
            raise
        raise TransferConfigError(
            f"A target batch is {nesting(batch)}, and weight='auto' reads it in the same way as a source batch, "
            f"which failed ({type(error).__name__}). Give SourceTask(adapt=) a function that takes batches of both: "
            "lambda batch: (batch['image'], batch['label']) if isinstance(batch, dict) else batch."
        ) from error
