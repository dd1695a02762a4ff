"""What the benchmarks say of settings like somebody's own: which methods gained there, and which lost (ours).

`evidence.json` is made by examples/benchmarks/transfer_report.py out of the results beside it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from lightning_transfer.advising.measuring import Measured

GAP, DISTANCE, DOUBLINGS = 0.05, 10.0, 2.0  # differences in gap, points and shots that count alike
NEAR, FAR = 3.0, 15.0  # points of distance, below which a setting is near and from which it is far
TOLERATED = 1.0  # points that a method may lose on average before it is advised against

Verdict = Literal["recommended", "no difference shown", "advised against"]


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

    @property
    def place(self) -> str:
        """Where it lies."""
        return "near" if self.distance < NEAR else "middle" if self.distance < FAR else "far"

    def unlike(self, measured: Measured) -> float:
        """How much it differs from what was measured; what is known but roughly counts for less."""
        apart = (self.distance - measured.distance) ** 2 / (DISTANCE**2 + (100 * measured.error) ** 2)
        apart += (math.log2(self.shots * measured.classes / measured.images) / DOUBLINGS) ** 2
        return apart if measured.gap is None else apart + ((self.gap - measured.gap) / GAP) ** 2


@dataclass(frozen=True)
class Expected:
    """What a method is expected to change.

    Attributes:
        method: its row in the matrix.
        points: mean difference to plain fine-tuning in accuracy, in settings that are alike.
        interval: half of its 95 % interval over those runs.
        cost: CPU time, in that of plain fine-tuning.
    """

    method: str
    points: float
    interval: float
    cost: float

    @property
    def verdict(self) -> Verdict:
        """Recommended where the interval lies above zero; advised against below it, or where much is lost."""
        if self.points - self.interval > 0:
            return "recommended"
        loses = self.points + self.interval < 0 or self.points < -TOLERATED
        return "advised against" if loses else "no difference shown"


@cache
def known_settings() -> tuple[Setting, ...]:
    """What the package comes with."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name("evidence.json").read_text())
    return tuple(Setting(**each) for each in found)


def weigh(measured: Measured, settings: Sequence[Setting]) -> list[tuple[float, Setting]]:
    """How much each setting says of what was measured, shares of 1, the most similar setting first."""
    apart = [setting.unlike(measured) for setting in settings]
    weights = [math.exp((min(apart) - each) / 2) for each in apart]
    shares = [weight / sum(weights) for weight in weights]
    return sorted(zip(shares, settings, strict=True), key=lambda pair: -pair[0])


def expect(measured: Measured, settings: Sequence[Setting], methods: Sequence[str]) -> list[Expected]:
    """What each method is expected to change, the best first.

    Runs count by how similar their setting is; the interval is that of a weighted mean, with as many degrees of freedom
    as runs of equal weight would have.

    Args:
        measured: what was seen of the target.
        settings: what is known.
        methods: those asked about; what no setting knows is left out.
    """
    found = []
    for method in methods:
        shares = weigh(measured, known) if (known := [each for each in settings if method in each.differences]) else []
        runs = [
            (share / len(setting.differences[method]), value)
            for share, setting in shares
            for value in setting.differences[method]
        ]
        if not runs:
            continue
        points = sum(share * value for share, value in runs)
        num_runs = 1 / sum(share**2 for share, _ in runs)
        variance = sum(share * (value - points) ** 2 for share, value in runs) / (num_runs - 1)
        cost = sum(share * setting.costs[method] for share, setting in shares)
        found.append(Expected(method, points, _quantile(num_runs - 1) * variance**0.5, cost))
    return sorted(found, key=lambda expected: -expected.points)


def _quantile(freedom: float) -> float:
    """Student's t at 97.5 %, from 4 degrees of freedom on within .2 % (Cornish and Fisher's expansion)."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
