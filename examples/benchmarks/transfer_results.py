"""Read the JSON files of the transfer matrix and compute differences from plain fine-tuning, paired by seed."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import t as student  # type: ignore[import-untyped]
from transfer_data import SKEWED, skewed

PLAIN, PROBE = "fine-tuning", "linear probe"
FOLDER = Path(__file__).with_name("results")
TEN_SHOTS = ("transfer", "between")  # the results of ten images a class
SHOTS = (*TEN_SHOTS, "5-shots", "25-shots", "full")  # and some of the same targets with other numbers of images
STEPS = ("transfer", "150-steps")
LABELS = ("transfer", "skewed")
Cells = dict[tuple[str, str], list[dict[str, Any]]]  # by target and row, final runs in the order of seeds


@cache
def read(name: str) -> Any:
    """Read one of the committed files; once, and its result must not be changed."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def finals(report: dict[str, Any]) -> Cells:
    """Return the final runs of rows that have all their seeds; the tuning seed chooses the rate only."""
    found: Cells = {}
    for cell in sorted(report["cells"], key=lambda cell: cell["seed"]):
        if "test" in cell:
            found.setdefault((cell["target"], cell["row"]), []).append(cell)
    num_seeds = int(report["settings"]["seeds"])
    return {key: cells for key, cells in found.items() if len(cells) == num_seeds}


def tuning(report: dict[str, Any], target: str, row: str) -> dict[float, dict[str, Any]]:
    """Return the runs of the seed that chooses learning rates, by their rate."""
    return {
        cell["lr"]: cell
        for cell in report["cells"]
        if "test" not in cell and (cell["target"], cell["row"]) == (target, row)
    }


def paired(cells: Cells, target: str, row: str, key: str = "test", to: str = PLAIN) -> Any:
    """Return the differences (seeds,) of a row to plain fine-tuning, or to another row, in points."""
    return np.array([100 * (a[key] - b[key]) for a, b in zip(cells[target, row], cells[target, to], strict=True)])


def interval(apart: Any) -> tuple[float, float]:
    """Return a mean, and half of its 95 % interval by Student's t."""
    if len(apart) == 1:
        return float(apart[0]), np.nan
    error = apart.std(ddof=1) / len(apart) ** 0.5
    return float(apart.mean()), float(student.ppf(0.975, len(apart) - 1) * error)


def difference(cells: Cells, target: str, row: str, key: str = "test", to: str = PLAIN) -> tuple[float, float] | None:
    """Return a row's mean difference from fine-tuning, or to another row, in points, and half of its 95 % interval."""
    mine, others = cells.get((target, row)), cells.get((target, to))
    if not mine or not others or key not in mine[0]:
        return None
    return interval(paired(cells, target, row, key, to))


def distance(cells: Cells, target: str) -> float | None:
    """Return how far a target is: the points by which fine-tuning is above a linear probe on validation images."""
    tuned, probed = cells.get((target, PLAIN)), cells.get((target, PROBE))
    if not tuned or not probed:
        return None
    return float(100 * (mean(cell["validation"] for cell in tuned) - mean(cell["validation"] for cell in probed)))


def gap(cells: Cells, target: str) -> float:
    """Return a target's mean domain gap."""
    return float(mean(cell["gap"] for cell in cells[target, PLAIN]))


def cost(cells: Cells, row: str) -> float:
    """Return CPU seconds divided by plain fine-tuning's on the same targets."""
    shared = [target for target, name in cells if name == row and (target, PLAIN) in cells]
    seconds = [sum(cell["seconds"] for target in shared for cell in cells[target, name]) for name in (row, PLAIN)]
    return float(seconds[0] / seconds[1])


def share_to_plain(cells: Cells, target: str, row: str) -> list[float]:
    """Return the share of steps after which each run reaches plain fine-tuning's last validation accuracy, if so."""
    reached = []
    for cell, other in zip(cells[target, row], cells[target, PLAIN], strict=True):
        looks = [place for place, value in enumerate(cell["curve"], start=1) if value >= other["curve"][-1]]
        reached += [looks[0] / len(cell["curve"])] if looks else []
    return reached


def settings(names: Sequence[str] = SHOTS) -> list[tuple[str, Cells]]:
    """Return every target of every file that exists: its name and its final runs."""
    found = []
    for name in names:
        if not (FOLDER / f"{name}.json").exists():
            continue
        report = read(name)
        cells = finals(report)
        found += [(target, cells) for target in report["targets"] if (target, PLAIN) in cells]
    return found


def shots(cells: Cells, target: str) -> float:
    """Return the training images of a class."""
    cell = cells[target, PLAIN][0]
    return float(cell["images"] / cell["classes"])


def steps(cells: Cells, target: str) -> float:
    """Return the steps of plain fine-tuning."""
    return float(cells[target, PLAIN][0]["steps"])


def labels(cells: Cells, target: str) -> str:
    """Return how many training images each class has, in words."""
    plain = cells[target, PLAIN][0]
    if not target.endswith(SKEWED):
        return f"{plain['shots']} of each"
    sizes = skewed(plain["shots"], plain["classes"])
    return f"{sizes[0]} of the first to {sizes[-1]} of the last"


def compared(names: Sequence[str], of: Callable[[Cells, str], Any]) -> dict[str, list[tuple[Any, str, Cells]]]:
    """Return the targets with more than one setting: by base name, the setting, its name and its runs."""
    found: dict[str, list[tuple[Any, str, Cells]]] = {}
    for name, cells in settings(names):
        found.setdefault(name.removesuffix(SKEWED), []).append((of(cells, name), name, cells))
    return {name: sorted(lines, key=itemgetter(0)) for name, lines in found.items() if len(lines) > 1}
