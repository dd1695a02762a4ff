"""Train a candidate on all but one part of the images and score it on that part; fine-tuning with the linear probe."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_transfer.advising.candidates import PLAIN, PROBE, Candidate
from lightning_transfer.advising.first_step import FirstStep
from lightning_transfer.advising.reading import Places, Reading, Runner
from lightning_transfer.batches import is_right
from lightning_transfer.datasets import index_in
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.namespaces import AnyCallback
from lightning_transfer.glue.trials import Trials
from lightning_transfer.probing import fit_probe
from lightning_transfer.progress import Step, duration
from lightning_transfer.randomness import reseed, seeded
from lightning_transfer.splitting import folds

MOST = 1000  # images that are scored in a fold
MOST_PROBED = 5000  # images that a probe learns from
PRICED = 10  # steps by which the time of a training is estimated


class OutOfTimeError(Exception):
    """Stops a training that does not fit into the time; its argument is the seconds that the training would take."""


class Scored(NamedTuple):
    """Holds which of the scored images (n,) are right, and how many seconds this took."""

    right: Tensor
    seconds: float


class PairedTrials:
    """Trains candidates with the same parts, seeds, new head and batches, so that only the candidate differs.

    Args:
        module: the user's, of which copies are trained.
        trials: of its training images.
        reading: of these.
        clock: gives seconds.
        deadline: of the clock, after which every training stops.

    Raises:
        TransferConfigError: all images are of one group.
    """

    def __init__(
        self,
        module: Any,
        trials: Trials,
        reading: Reading,
        *,
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self.module, self.trials, self.reading = module, trials, reading
        self.clock, self.deadline = clock, deadline
        self.steps = 0
        self.step: Step = lambda more, note="": None
        self.parts = folds(trials.labels, trials.groups)
        self.places: Places | None = None  # as fine-tuning, which changes no layer, has found them

    def kept(self, fold: int) -> list[int]:
        """Return the images that are trained on while a part is held out."""
        return sorted({*range(len(self.trials.labels))} - {*self.parts[fold]})

    def scored(self, fold: int) -> list[int]:
        """Return the images of a part that are scored."""
        return some(self.parts[fold], MOST)

    def groups(self, indices: list[int]) -> list[Any]:
        """Return what images belong to; an image alone is its own group."""
        return indices if self.trials.groups is None else [self.trials.groups[index] for index in indices]

    def train(self, candidate: Candidate, fold: int) -> dict[str, Scored]:
        """Train a candidate on all parts but one and score it on that one; with fine-tuning, score the probe too.

        Raises:
            OutOfTimeError: it does not fit before the deadline.
            TransferConfigError: it does not fit the module, or is ended early.
            FloatingPointError: what it has learned gives NaN.
        """
        scoring = _Scoring(self, candidate, fold)
        kept = self.kept(fold)
        given = candidate.callbacks(Subset(self.trials.clean, kept))
        callbacks = [*given, scoring]  # the last, when the others have done their work
        self.trials.train(self.module, kept, callbacks, steps=self.steps, seed=fold)
        if candidate.name not in scoring.found:
            by = " or ".join(["the module", *(type(each).__name__ for each in given)])
            raise TransferConfigError(
                f"The training was ended by {by} after {scoring.done} of its {self.steps} steps, so it was not scored."
            )
        return scoring.found


class _Scoring(AnyCallback):
    """Draws the same batches for every candidate, stops what does not fit in time, and scores what was learned."""

    def __init__(self, paired: PairedTrials, candidate: Candidate, fold: int) -> None:
        self.paired, self.name, self.fold = paired, candidate.name, fold
        self.found: dict[str, Scored] = {}
        self.began, self.batches, self.done = paired.clock(), 0, 0
        self.first: tuple[int, float] | None = None  # step, and when it was done
        self.looking: FirstStep | None = None  # until the first step is over

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Seed the network that the module may build now, so that it is the same for every candidate."""
        self._draw_anew()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the workers, which start soon, so that they draw the same batches for every candidate."""
        self._draw_anew()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fit and score the linear probe."""
        if self.name == PLAIN:
            began = self.paired.clock()
            runner = self._runner(trainer, pl_module)
            self.looking = FirstStep(pl_module, runner.hearing, self.paired.reading.adapt)
            right = self._probed(runner)
            seconds = self.paired.clock() - began
            self.found[PROBE] = Scored(right, seconds)
            self.began += seconds

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the epoch's order."""
        self._draw_anew()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Show the step, stop what does not fit, and draw the next batch as every candidate does."""
        if self.looking is not None:
            self.looking.check(batch)
            self.looking = None
        self.batches += 1
        self._draw_anew()
        now, before, done = self.paired.clock(), self.done, int(trainer.global_step)
        self.done = done
        self.first = self.first or (done, now)  # the first step is slow, so it is not counted
        since, deadline = done - self.first[0], self.paired.deadline
        each = (now - self.first[1]) / since if since else (now - self.began) / max(done, 1)
        left = each * (self.paired.steps - done)
        is_priced = before - self.first[0] < PRICED <= since  # once; a batch may take several steps, or none
        if now > deadline or (is_priced and now + left > deadline):
            raise OutOfTimeError(now - self.began + left)
        note = f"{self.name}, part {self.fold + 1}; all ends within {duration(deadline - now)}"
        self.paired.step(done - before, note)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Score the part that was held out."""
        if trainer.global_step < self.paired.steps:
            return
        with seeded(0, 0):  # images may be augmented at random
            held = self.paired.trials.held(self.paired.scored(self.fold))
            logits, labels = self._runner(trainer, pl_module).logits(held)
        if lost := int(logits.isnan().any(1).sum()):
            raise FloatingPointError(
                f"After {self.done} steps its outputs are not a number (NaN) for {lost} of {len(labels)} images. Lower "
                "the learning rate, or look for images and losses that are not numbers."
            )
        self.found[self.name] = Scored(is_right(logits, labels).bool(), self.paired.clock() - self.began)

    def _draw_anew(self) -> None:
        reseed(self.fold, 1 + self.batches)

    def _runner(self, trainer: Any, module: Any) -> Runner:
        paired = self.paired
        runner = Runner(trainer, module, paired.reading, paired.trials.held(paired.scored(self.fold)), paired.places)
        paired.places = runner.places
        return runner

    def _probed(self, runner: Runner) -> Tensor:
        """Return which scored images a linear classifier of the unchanged network's features has right."""
        paired = self.paired
        chosen, scored = some(paired.kept(self.fold), MOST_PROBED), paired.scored(self.fold)
        with seeded(0, 0):
            features, labels, outputs = runner.features(paired.trials.held(chosen))
            others, theirs, _ = runner.features(paired.trials.held(scored))
        if lost := (~torch.cat([features, others]).isfinite()).any(1).nonzero()[:, 0].tolist():
            bad = sorted(index_in(paired.trials.dataset, [*chosen, *scored][row]) for row in lost)
            raise TransferConfigError(
                f"Before training, the features of images {bad} are not finite. Look for pixels that are not finite, "
                "or a network that overflows."
            )
        num_classes = int(max(labels.max(), theirs.max())) + 1
        if num_classes > max(outputs, 2):
            raise TransferConfigError(
                f"Labels run to {num_classes - 1}, and the head {runner.head.path!r} gives {outputs} numbers; expected "
                "one a class, numbered from 0."
            )
        groups = paired.groups(chosen)
        is_split = len({*groups}) > 1  # else its penalty is chosen on images of the one group that there is
        says = fit_probe(features, labels, num_classes=num_classes, groups=groups if is_split else None)
        return says(others).argmax(1) == theirs


def some(indices: list[int], most: int) -> list[int]:
    """Return at most `most` of the indices, drawn at random, in order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:most]
    return [indices[place] for place in order.sort().values.tolist()]
