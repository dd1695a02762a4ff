"""How far a target lies from what a network knows: fine-tuning against a linear probe, and the domain gap (ours)."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_transfer.advising.parts import FOLDS, error, fold, some, to_score
from lightning_transfer.batches import class_numbers, label_hint
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import proxy
from lightning_transfer.glue.base import AnyCallback
from lightning_transfer.glue.hearing import Hearing
from lightning_transfer.glue.trainer import looking, to_device
from lightning_transfer.linear import fit_linear
from lightning_transfer.naming import structure
from lightning_transfer.progress import Progress, Step
from lightning_transfer.roles import find_head, is_pooling
from lightning_transfer.source.datasets import load
from lightning_transfer.source.gap import SOURCE_IMAGES, TARGET_IMAGES, Extent, domain_gap, look, unlike_pixels
from lightning_transfer.source.reading import readable
from lightning_transfer.source.stream import collate, seeded
from lightning_transfer.source.task import SourceTask
from lightning_transfer.tracing import evaluating, images_and_labels

STEPS = 300  # of those that the benchmarks know
MOST_PROBED = 5000  # that the probe learns from
ADAPT = "Say where they are: advise(..., adapt=lambda batch: (batch['image'], batch['label']))."
FORWARD = "Say how images run: advise(..., forward=lambda module, images: {})."
LOST = 10.0  # points below a linear probe, from which fine-tuning itself looks wrong
PROBE_PENALTY = 10.0  # of .1 to 1,000 about the best on four targets with ten images of a class


@dataclass(frozen=True)
class Measured:
    """What was seen of a target.

    Attributes:
        images: labelled images there are to train on.
        classes: how many classes they have.
        fewest: images of the rarest class.
        scored: how many were held out from a training, in turns, and scored.
        probe: accuracy of a linear classifier on the features of the network as it came.
        tuned: accuracy of plain fine-tuning.
        error: standard error of their difference, which is paired; images of one group stand for one. Where there are
            few it is so much larger that 1.96 of it are half of Student's 95 % interval all the same.
        gap: the domain gap to the source; None without one.
        remark: why none could be measured.
        guess: how images were run, where the module does not say.
        steps: of each training.
        groups: that images belong to, where the dataset says so.
        commonest: share of the most common class, where it is known.
    """

    images: int
    classes: int
    fewest: int
    scored: int
    probe: float
    tuned: float
    error: float
    gap: float | None
    remark: str = ""
    guess: str = ""
    steps: int = STEPS
    groups: int | None = None
    commonest: float | None = None

    @property
    def distance(self) -> float:
        """How far the network has to move: points that fine-tuning is above the probe."""
        return 100 * (self.tuned - self.probe)

    @property
    def is_guessing(self) -> bool:
        """Whether neither is shown to be better than the one answer that is right most often."""
        if self.commonest is None:
            return False
        scored = self.scored if self.groups is None else min(self.scored, self.groups)  # images of one stand for one
        return max(self.probe, self.tuned) <= self.commonest + 1.96 * math.sqrt(
            self.commonest * (1 - self.commonest) / scored
        )

    @property
    def falls_short(self) -> bool:
        """Whether fine-tuning did so much worse than the probe that itself is what has to be mended."""
        return self.distance < -LOST and self.distance + 196 * self.error < 0


@dataclass(frozen=True)
class Question:
    """What is asked of a target, and how it is read.

    Attributes:
        source: what the gap is measured to.
        unaugmented: the same images as the loader's, without augmentation; None for the loader's own.
        head: its path, or "auto".
        adapt: turns a batch of the user's into images and labels; None where it is both.
        steps: of each training.
        options: of the Trainer.
        forward: runs images, where the module's own forward does not take them.
    """

    source: SourceTask | None
    unaugmented: Any
    head: str
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None
    steps: int
    options: Mapping[str, Any]
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None


def measure(module: Any, data: Any, question: Question, *, progress: Progress) -> Measured:
    """Fine-tune copies of a module on parts of its training images, and score them on the rest.

    Args:
        module: the user's.
        data: its DataModule or train loader.
        question: what is asked.
        progress: makes a progress bar.

    Raises:
        TransferConfigError: the images cannot be split, or the module has no head.
    """
    trials = proxy.trials_of(module, data, question.options, unaugmented=question.unaugmented, adapt=question.adapt)
    counts = Counter(trials.labels)
    if min(counts, default=0) < 0:
        raise TransferConfigError(
            f"A label is {min(counts)}; expected class numbers from 0. Leave images without a class out of the loader "
            "that advice is asked for."
        )
    most = max(counts.values(), default=0)
    if len(counts) < 2 or most < 2:
        raise TransferConfigError(
            f"Classes among the {len(trials.labels)} training images: {len(counts)}, the largest of {most}; expected "
            "two at least, and two images of one. Give more labelled images."
        )
    if len(trials.labels) < 2 * FOLDS:
        raise TransferConfigError(
            f"There are {len(trials.labels)} labelled training images; advice takes {2 * FOLDS} at least, since a "
            "quarter of them is held out in turns."
        )
    if trials.groups is not None:
        _check_spread(trials.labels, trials.groups)
    folds = fold(trials.labels, trials.groups)
    found: list[_Looking] = []
    with progress("Fine-tuning, to see how far it goes", question.steps * len(folds), unit="steps") as step:
        for out in folds:
            kept = sorted({*range(len(trials.labels))} - {*out})
            probed = some(kept, MOST_PROBED)
            groups = None if trials.groups is None else [trials.groups[index] for index in probed]
            asked = question if not found else replace(question, source=None)
            looks = _Looking(trials.held(probed), trials.held(to_score(out)), asked, groups, step)
            trials.train(copy.deepcopy(module), kept, [looks], steps=question.steps, seed=0)
            del looks.runner  # which holds its copy
            found.append(looks)
    probe, tuned = (torch.cat([getattr(each, side) for each in found]).double() for side in ("probed", "tuned"))
    scored = [index for out in folds for index in to_score(out)]
    return Measured(
        images=len(trials.labels),
        classes=len(counts),
        fewest=min(counts.values()),
        scored=len(scored),
        probe=float(probe.mean()),
        tuned=float(tuned.mean()),
        error=error(tuned - probe, scored if trials.groups is None else [trials.groups[index] for index in scored]),
        gap=found[0].gap,
        remark=found[0].remark,
        guess=found[0].guess,
        steps=question.steps,
        groups=None if trials.groups is None else len({*trials.groups}),
        commonest=most / len(trials.labels),
    )


def _check_spread(labels: list[int], groups: list[Any]) -> None:
    spread = Counter(label for label, _ in {*zip(labels, groups, strict=True)})
    alone = sum(number == 1 for number in spread.values())
    if len(spread) - alone < 2:
        raise TransferConfigError(
            f"Of {len(spread)} classes {alone} have images of one group only, so where these are held out nothing has "
            "shown their class. Let groups say what images belong to beside their class, a patient or a track, or give "
            "none."
        )


class _Looking(AnyCallback):
    """Scores a linear probe before the first step, and the network behind the last."""

    gap: float | None = None
    remark = ""

    def __init__(
        self,
        probed: DataLoader[Any],
        scored: DataLoader[Any],
        question: Question,
        groups: list[Any] | None,
        step: Step,
    ) -> None:
        self.probed_on, self.scored_on, self.question, self.groups, self.step = probed, scored, question, groups, step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What the network as it came knows."""
        self.runner = _Runner(trainer, pl_module, self.question, self.scored_on)
        self.guess = self.runner.guess
        mine, others = self.runner.at(self.probed_on), self.runner.at(self.scored_on)
        num_classes = int(max(mine.labels.max(), others.labels.max())) + 1
        if num_classes > mine.logits.shape[1]:
            raise TransferConfigError(
                f"Labels run to {num_classes - 1}, and the head {self.runner.head.path!r} gives {mine.logits.shape[1]} "
                "numbers; expected one a class, numbered from 0."
            )
        says = fit_linear(mine.features, mine.labels, num_classes=num_classes, penalty=PROBE_PENALTY)
        self.probed = says(others.features).argmax(1) == others.labels
        if self.question.source is not None:
            self._measure_gap(self.question.source, mine)

    def _measure_gap(self, source: SourceTask, mine: "_Answers") -> None:
        chosen = some(list(range(len(mine.features))), TARGET_IMAGES)
        like = None if callable(source.forward) else mine.images  # which may bring both sides to one size
        with seeded(source.seed, 0):  # its augmentation would move the state that training draws from
            theirs = look(self.runner.images_of(source), self.runner.features, like=like)
        groups = None if self.groups is None else [self.groups[place] for place in chosen]
        self.remark = unlike_pixels(mine.extent, theirs.extent)
        if groups is not None and len({*groups}) < 2:
            self.remark = "beside those held out, all images are of one group"
        if not self.remark:
            self.gap = domain_gap(mine.features[chosen], theirs.features, target_groups=groups)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Show how far it is."""
        self.step(1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What it has learned."""
        seen = self.runner.at(self.scored_on)
        self.tuned = seen.logits.argmax(1) == seen.labels


class _Answers(NamedTuple):
    """What a head takes and gives, of images with labels; some of the images, and how far pixels run."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    images: Tensor
    extent: Extent


class _Runner:
    """Runs images through a module outside of training, and takes what its head takes and gives."""

    def __init__(self, trainer: Any, module: Any, question: Question, loader: DataLoader[Any]) -> None:
        self.trainer, self.module, self.question = trainer, module, question
        self.head = find_head(module, question.head, probe=partial(self._try, loader))
        self.hearing = Hearing(trainer, module, self.head, forward=question.forward, how=FORWARD)
        self.guess = f"through {self.hearing.path!r}" if self.hearing.path else ""
        if self.hearing.is_apart:
            self.guess += f" and {self.head.path!r}"

    def at(self, loader: DataLoader[Any]) -> _Answers:
        """What is seen of all images of a loader."""
        parts, extent = [], Extent()
        for batch in loader:
            images, given = self._read(batch)
            labels = class_numbers(given)
            if labels is None:
                found = f"Labels have shape {tuple(given.shape)} and type {given.dtype}; expected (B,) class numbers."
                raise TransferConfigError(f"{found} {label_hint(given, 'adapt=lambda batch: (batch[0], {})')}")
            parts.append((*self._run(images), labels.cpu()))
            extent.see(images)
        features, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return _Answers(features, logits, labels, images, extent)

    def images_of(self, source: SourceTask) -> Iterator[Tensor]:
        """Some of a source's images."""
        dataset = source.dataset if self.question.unaugmented is None else source.plain_dataset  # as the target's are
        chosen, workers = some(list(range(source.num_images)), SOURCE_IMAGES), {"num_workers": source.num_workers}
        for samples in readable(dataset, chosen, of="source", size=100, workers=workers):
            batch = collate(samples, of="source")
            with looking(self.trainer):
                images, _ = source.unpack(to_device(self.trainer, batch, hooks=source.batch_hooks))
            yield images

    def features(self, images: Tensor) -> Tensor:
        """What the head takes."""
        return self._run(images)[0]

    def _try(self, loader: DataLoader[Any]) -> None:
        """Run an image."""
        images, _ = self._read((loader.collate_fn or default_collate)([load(loader.dataset, 0, of="target")]))
        with evaluating(self.module):
            self.module(images)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels, on the device and behind the user's hooks."""
        with looking(self.trainer):
            moved = to_device(self.trainer, batch, hooks=True)
        adapt = self.question.adapt
        made = ADAPT if adapt is None else f"adapt= made that of {structure(moved)}."
        given = moved if adapt is None else adapt(moved)
        return images_and_labels(given, self.trainer.strategy.root_device, otherwise=made)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the head takes and gives; a `SourceTask(forward=)` may end before it."""
        (calls,) = self.hearing.hear(images, [self.head.module])
        if not calls:
            raise TransferConfigError(
                f"{type(self.module).__name__} does not run its head {self.head.path!r} on images. {FORWARD}".format(
                    "..."
                )
            )
        taken, given = calls[-1]
        if given.ndim != 2 and given.shape[1:].numel() != given.shape[1]:
            raise TransferConfigError(
                f"The head {self.head.path!r} gives {tuple(given.shape[1:])} for an image; expected one row of classes."
            )
        taken = taken.mean((2, 3)) if is_pooling(self.head.module) else taken
        return taken.float().flatten(1).cpu(), given.float().flatten(1).cpu()
