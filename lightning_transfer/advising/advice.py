"""Show the result of paired trials, as text and as an HTML table."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from lightning_transfer.advising.candidates import PROBE, STATISTICS
from lightning_transfer.advising.tables import html_table, text_table
from lightning_transfer.advising.verdicts import LEVEL, NOISE, Difference, Verdict

HEADS = ("candidate", "difference from fine-tuning, points", "times the cost", "parts", "verdict")
NOT_WORSE = {  # what else to consider if nothing is shown to be better
    PROBE: "the linear probe, which costs little",
    STATISTICS: f"{STATISTICS}, which gained most in benchmarks with an ImageNet network",
}


@dataclass(frozen=True)
class Measured:
    """Holds what was seen of the target, and of fine-tuning.

    Attributes:
        images: number of labelled training images.
        classes: how many classes they have.
        fewest: images of the rarest class.
        groups: that images belong to, if the dataset names them.
        commonest: share of the most common class.
        scored: how many images were held out from a training, in turns, and scored.
        probe: accuracy of a linear probe of the network as it came.
        tuned: accuracy of fine-tuning.
        is_guessing: whether neither is shown to be better than always predicting the most common class.
        falls_short: whether fine-tuning is so much worse than the probe that it has to be repaired first.
        steps: of each training.
        passes: over the images that are trained on.
        parts: that the images were divided into.
        folds: parts that were held out in turns; fewer if time was short.
        guess: how images were run if the module has no forward; otherwise empty.
        trainings: number of trainings that were scored.
        seconds: mean time of one fine-tuning.
        round_seconds: time of one training of everything, as seen or as expected.
    """

    images: int
    classes: int
    fewest: int
    groups: int | None
    commonest: float
    scored: int
    probe: float
    tuned: float
    is_guessing: bool
    falls_short: bool
    steps: int
    passes: float
    parts: int
    folds: int
    guess: str = ""
    trainings: int = 0
    seconds: float = field(default=0.0, compare=False)
    round_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Compared:
    """Holds what became of a candidate.

    Attributes:
        name: of the candidate.
        line: what to write to use it; empty for the user's own.
        difference: from fine-tuning; None if it was not scored.
        folds: parts that it was scored on.
        is_dropped: whether it was dropped, and so was scored on fewer parts than fine-tuning.
        is_refused: whether it does not fit the module.
        reason: why it was dropped, refused or not trained; empty if it was worse or time was short.
        cost: in trainings of fine-tuning.
    """

    name: str
    line: str
    difference: Difference | None
    folds: int
    is_dropped: bool = False
    is_refused: bool = False
    reason: str = ""
    cost: float = field(default=0.0, compare=False)

    @property
    def verdict(self) -> Verdict | Literal["dropped", "refused", "not trained"]:
        """Return what is known of it."""
        if self.difference is None:
            return "refused" if self.is_refused else "not trained"
        return "dropped" if self.is_dropped else self.difference.verdict

    @property
    def row(self) -> tuple[str, ...]:
        """Return its row of the table."""
        if self.difference is None:
            return self.name, "", "", "", f"{self.verdict}: {self.reason}"
        verdict: str = self.verdict
        if verdict == "dropped":
            verdict += f" after {_counted(self.folds, 'part')}" + f": {self.reason}" * bool(self.reason)
        return self.name, str(self.difference), f"{self.cost:.1f}", str(self.folds), verdict


@dataclass(frozen=True)
class Advice:
    """Holds what was measured and what to do; `print` shows both, with the reasons.

    Attributes:
        measured: what was seen of the target, and of fine-tuning.
        candidates: what was compared with fine-tuning, the best first.

    Example:
        >>> seen = {"images": 100, "classes": 10, "fewest": 10, "groups": None, "commonest": 0.1, "scored": 100}
        >>> seen |= {"probe": 0.91, "tuned": 0.94, "is_guessing": False, "falls_short": False}
        >>> soft = Compared("soft", "callbacks=[lt.SoftFinetuning(source)]", Difference(4.0, 3.6), folds=5)
        >>> Advice(Measured(**seen, steps=150, passes=37.5, parts=5, folds=5), (soft,)).best.line
        'callbacks=[lt.SoftFinetuning(source)]'
    """

    measured: Measured
    candidates: tuple[Compared, ...]

    @property
    def best(self) -> Compared | None:
        """Return the best that is shown to be better than fine-tuning, of those scored on most parts, or None."""
        if self.measured.is_guessing:
            return None
        better = (each for each in self.candidates if each.verdict == "shown better")
        return max(better, key=lambda each: each.folds, default=None)

    def __str__(self) -> str:
        return "\n".join([*self._seen(), "", *text_table(self._rows()), "", *self._advised()])

    def _repr_html_(self) -> str:
        def lines(texts: Iterable[str]) -> str:
            return "".join(f"<p>{escape(text)}</p>" for text in texts)

        return f"{lines(self._seen())}{html_table(self._rows())}{lines(self._advised())}"

    def _rows(self) -> list[tuple[str, ...]]:
        return [HEADS, *(each.row for each in self.candidates)]

    def _seen(self) -> Iterator[str]:
        """Yield what was measured, and how."""
        seen, among = self.measured, sum(each.difference is not None for each in self.candidates)
        of = "" if seen.groups is None else f" of {seen.groups} groups"
        yield f"{seen.images} labelled images{of}, {seen.classes} classes, at least {seen.fewest} of each."
        passes = f"{seen.passes:.3g} pass{'es' * (seen.passes != 1)}"
        yield (
            f"{_counted(seen.trainings, 'training')} of {seen.steps} steps ({passes}; fine-tuning took "
            f"{seen.seconds:.0f} seconds). Each leaves out one of {seen.parts} parts of the images and is scored on "
            "it. Parts, batches and the new head are the same for all."
        )
        yield f"Accuracy on {seen.scored} images: fine-tuning {seen.tuned:.1%}, a linear probe {seen.probe:.1%}."
        if seen.guess:
            yield (
                f"The module has no forward, so images were run {seen.guess}. If your training step does more than "
                "that, write a forward."
            )
        grouped = "account for the groups of images, and " * (seen.groups is not None)
        yield (
            f"{_counted(among, 'candidate')} {'is' if among == 1 else 'are'} compared. The intervals of those scored "
            f"on all parts hold jointly with {1 - LEVEL:.0%} confidence. They {grouped}include {100 * NOISE:.1f} "
            "points for the difference between seeds."
        )

    def _tried(self) -> list[str]:
        return [each.name for each in self.candidates if each.difference and each.name != PROBE]

    def _advised(self) -> Iterator[str]:
        """Yield what to do, and the code to write."""
        seen, best = self.measured, self.best
        if seen.is_guessing and seen.scored < seen.images:
            yield (
                f"Give it more minutes: only {seen.scored} of {seen.images} images were scored, on which neither "
                "fine-tuning nor the probe is shown to be better than always predicting the most common class "
                f"({seen.commonest:.1%})."
            )
        elif seen.is_guessing:
            yield (
                "Look at your labels first: neither fine-tuning nor the probe is shown to be better than always "
                f"predicting the most common class ({seen.commonest:.1%}). Images and labels may not match, or there "
                "are too few images or steps."
            )
        elif seen.falls_short and best is not None:  # which is the probe, or better
            yield (
                "Repair fine-tuning first: it is far less accurate than the probe, so its learning rate is too high or "
                f"it has too few steps. Until then use {best.name}."
            )
        elif best is not None:
            yield (
                f"Use {best.name}: it is shown to be better than fine-tuning, by {best.difference} points, at "
                f"{best.cost:.1f} times the cost."
            )
        elif any(each.verdict == "not trained" for each in self.candidates) and not self._tried():
            yield (
                "Nothing was compared but the probe: no candidate fitted into the time. Pass minutes="
                f"{math.ceil(seen.round_seconds / 60)} or more, or fewer steps= if you will train for fewer."
            )
        else:
            tried = self._tried()
            halves = [each.difference.half for each in self.candidates if each.difference and not each.is_dropped]
            none = f"none of {len(tried) + 1}" if tried else "nothing else"
            said = [f"Stay with fine-tuning: {none} is shown to be better."]
            if halves and max(halves) < math.inf:
                least, most = (f"{end:.0f}" for end in (min(halves), max(halves)))
                points = least if least == most else f"{least} to {most}"
                said += [f"With {seen.scored} images, differences of less than about {points} points cannot be shown."]
            if seen.folds < seen.parts:
                said += [f"Pass more minutes=: {seen.folds} of {seen.parts} parts were scored."]
            open_ones = {each.name for each in self.candidates if each.verdict == "not shown"}
            kept = [text for name, text in NOT_WORSE.items() if name in open_ones]
            if kept:
                said += [f"Not shown to be worse: {', and '.join(kept)}."]
            yield " ".join(said)
        if best is not None and best.line:
            yield f"    {best.line}"


def _counted(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"
