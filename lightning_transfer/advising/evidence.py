"""What the benchmarks say of settings like somebody's own: which methods gained there, and which lost (ours).

`evidence.json` is made by examples/benchmarks/transfer_report.py out of the results beside it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from lightning_transfer.advising.measuring import Measured
from lightning_transfer.advising.student import quantile
from lightning_transfer.source.gap import is_near

GAP, DISTANCE, DOUBLINGS = 0.05, 10.0, 2.0  # differences in gap, points and shots that count alike
NEAR, FAR = 3.0, 15.0  # points of distance, below which a target is near and from which it is far
UNLIKE = 9.0  # three such differences in one respect, in squares, from which settings are not alike
NOTICED = 1.0  # points that a method loses on average before it is advised against, or gains to be named without proof
VAGUE = 10.0  # points of an interval that has both signs, beyond which nothing is known: the worst losses seen
MEASURED = {"soft, measured weight": "soft", "selective, measured weight": "selective"}  # that, or fine-tuning

Verdict = Literal["recommended", "may help", "no difference shown", "advised against", "not known"]


@dataclass(frozen=True)
class Setting:
    """One target of the matrix, at so many images of each class.

    Attributes:
        target: its name.
        shots: images of each class, on average.
        gap: domain gap to the source.
        distance: points that fine-tuning is above a linear probe.
        differences: of each method, the paired differences to plain fine-tuning in points, a number for each seed.
        costs: of each method, CPU time in that of plain fine-tuning.
    """

    target: str
    shots: float
    gap: float
    distance: float
    differences: dict[str, list[float]]
    costs: dict[str, float]

    def error(self, method: str) -> float:
        """Standard error of a method's mean difference."""
        values = self.differences[method]
        return float(stdev(values) / len(values) ** 0.5)

    def unlike(self, measured: Measured) -> float:
        """How much it differs from what was measured; what is known but roughly counts for less."""
        shots, error = measured.images / measured.classes, 100 * measured.error
        return self.apart(gap=measured.gap, distance=measured.distance, shots=shots, error=error)

    def may_be_unlike(self, measured: Measured, gaps: Sequence[float]) -> float:
        """By how much it may differ, up to `UNLIKE`: what was measured but roughly counts for more, not for less.

        Args:
            measured: what was measured.
            gaps: those that it may have.
        """
        shots, error = measured.images / measured.classes, 100 * measured.error
        known = self.apart(gap=None, distance=measured.distance, shots=shots) + (error / DISTANCE) ** 2
        return min(known + mean(((self.gap - gap) / GAP) ** 2 for gap in gaps), UNLIKE)

    def apart(self, *, gap: float | None, distance: float, shots: float, error: float = 0.0) -> float:
        """The same of numbers: squares of what it differs by, in steps that count alike."""
        steps = [(self.distance - distance) / math.hypot(DISTANCE, error), math.log2(self.shots / shots) / DOUBLINGS]
        return sum(step**2 for step in [*steps, 0.0 if gap is None else (self.gap - gap) / GAP])


@dataclass(frozen=True)
class Expected:
    """What a method is expected to change.

    Attributes:
        method: its row in the matrix.
        points: mean difference to plain fine-tuning in accuracy, in settings that are alike.
        interval: half of its 95 % interval.
        cost: CPU time, in that of plain fine-tuning.
    """

    method: str
    points: float
    interval: float
    cost: float

    @property
    def verdict(self) -> Verdict:
        """Recommended where the interval lies above zero, advised against below it; else by what is expected."""
        if self.points - self.interval > 0:
            return "recommended"
        if self.interval > VAGUE and self.points + self.interval > 0:
            return "not known"
        if self.points + self.interval < 0 or self.points < -NOTICED:
            return "advised against"
        return "may help" if self.points > NOTICED else "no difference shown"


@cache
def known_settings() -> tuple[Setting, ...]:
    """What the package comes with."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name("evidence.json").read_text())
    return tuple(Setting(**each) for each in found)


def place(distance: float) -> str:
    """Where a target lies that fine-tuning is so many points above a linear probe on."""
    return "near" if distance < NEAR else "middle" if distance < FAR else "far"


def weigh(measured: Measured, settings: Sequence[Setting]) -> list[tuple[float, Setting]]:
    """How much each setting says of what was measured, shares of 1, the most similar setting first."""
    apart = [setting.unlike(measured) for setting in settings]
    weights = [math.exp((min(apart) - each) / 2) for each in apart]
    shares = [weight / sum(weights) for weight in weights]
    return sorted(zip(shares, settings, strict=True), key=lambda pair: -pair[0])


def expect(measured: Measured, settings: Sequence[Setting], methods: Sequence[str]) -> list[Expected]:
    """What each method is expected to change, the best first.

    The mean over settings, by how similar they are. Its interval has what seeds differ by, and what settings differ by
    the more, the less they are alike or are known to be.

    Args:
        measured: what was seen of the target.
        settings: what is known.
        methods: those asked about; what was run in no setting that is alike is left out.
    """
    rows = {method: MEASURED.get(method, method) for method in methods}
    steps = {row: step for row in rows.values() if (step := spread(settings, row)) is not None}
    most = max(steps.values(), default=0.0)  # for a method known in one setting alone
    gaps = [each.gap for each in settings] if measured.gap is None else [measured.gap]
    found = []
    for method, row in rows.items():
        known = [each for each in settings if row in each.differences and each.unlike(measured) < UNLIKE]
        if not known:
            continue
        if method in MEASURED and (measured.gap is None or not is_near(measured.gap)):
            found.append(Expected(method, 0.0, 0.0, 1.0))
            continue
        shares = weigh(measured, known)
        points = sum(share * mean(each.differences[row]) for share, each in shares)
        points = min(points, 100 * (1 - measured.tuned))  # no more than is left
        seeds = sum((share * each.error(row)) ** 2 for share, each in shares)
        unlike = sum(share * each.may_be_unlike(measured, gaps) for share, each in shares)  # as if all erred alike
        freedom = min(len(each.differences[row]) for each in known) - 1
        cost = sum(share * each.costs[row] for share, each in shares)
        error = (seeds + steps.get(row, most) * unlike) ** 0.5
        found.append(Expected(method, points, quantile(freedom) * error, cost))
    return sorted(found, key=lambda expected: -expected.points)


def spread(settings: Sequence[Setting], method: str) -> float | None:
    """Squared points by which a method's true gains in two settings differ, for each step that they are unlike.

    Beyond `UNLIKE` they do not differ the more for it. None where the method was run in one setting alone.
    """
    surplus = apart = 0.0
    for one, other in combinations([each for each in settings if method in each.differences], 2):
        change = mean(one.differences[method]) - mean(other.differences[method])
        surplus += change**2 - one.error(method) ** 2 - other.error(method) ** 2
        apart += min(one.apart(gap=other.gap, distance=other.distance, shots=other.shots), UNLIKE)
    return max(surplus / apart, 0.0) if apart else None
