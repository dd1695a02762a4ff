"""Summarize what the regime benchmark has measured: differences from plain fine-tuning, paired by seed."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
from regime import RESULTS, SEEDS_FIRST, SHOTS, STEPS, Cell, chosen, committed, name_of, next_rates, tuning
from regime_data import TARGETS
from regime_network import Rates
from regime_rows import CLIPPED, PLAIN, PROBE, ROWS, STATISTICS
from transfer_results import interval

from lightning_transfer.reports.curves import COLORS, empty_figure
from lightning_transfer.source.gap import NEAR

NUMBERS = (SHOTS, 5, 0)
GAPS = json.loads((RESULTS / "domain-gaps.json").read_text())  # by regime_gaps.py
COSTS = json.loads((RESULTS / "step-costs.json").read_text())  # by regime_costs.py
# each callback without options, and its row; LP-FT starts as ProbeStart does; without a row the domain gap decides
DEFAULTS = {
    "SoftFinetuning": "",
    "SoftFinetuning(SourceKnowledge(network))": "knowledge",
    "SelectiveJointFinetuning": "",
    "GatedTransfer": "gated transfer",
    "AdaFilter": "AdaFilter",
    "CollaborativeFinetuning": "collaborative",
    "ProbeStart": "LP-FT",
    "FrozenStatistics": STATISTICS,
    "ProbeStart(), FrozenStatistics()": CLIPPED,
}
BEST = f"{CLIPPED}, two networks"
SHORT = {  # rows for the README, each by its callbacks
    PROBE: PROBE,
    "FrozenStatistics": STATISTICS,
    "ProbeStart": "LP-FT",
    "ProbeStart, FrozenStatistics": CLIPPED,
    "the same, with a second network": BEST,
    "SoftFinetuning, source kept": "soft",
    "SoftFinetuning, SourceKnowledge": "knowledge",
    "SelectiveJointFinetuning, source kept": "selective",
    "AdaFilter": "AdaFilter",
    "GatedTransfer": "gated transfer",
    "CollaborativeFinetuning": "collaborative",
}
WITH_MEAN = (*TARGETS, "all")  # columns
Runs = dict[int, Cell]  # by seed
Difference = tuple[float, float, int]  # in points, half its 95 % interval, and the number of seeds


def rates_of(row: str, target: str) -> Rates | None:
    """Return the rates that a row has on a target; None until the choice is made."""
    cells = {name_of(cell): cell for cell in committed()}
    known = tuning(cells, ROWS[row].tuned_as or row, target)
    return None if next_rates(known) else chosen(known)


def runs(row: str, target: str, shots: int, steps: int | None = None) -> Runs:
    """Return the runs that count, at the rates that were chosen."""
    steps = steps or STEPS[target][shots]
    rates = rates_of(row, target) if ROWS[row].is_trained else None
    wanted = row, target, shots, steps, rates and [*rates]
    names = "row", "target", "shots", "steps", "rates"
    return {
        cell["seed"]: cell for cell in committed() if "test" in cell and tuple(cell[name] for name in names) == wanted
    }


def difference(row: str, target: str, shots: int, steps: int | None = None, to: str = PLAIN) -> Difference | None:
    """Return a row's mean difference from another; None if they share no seed."""
    mine, other = (runs(each, target, shots, steps) for each in (row, to))
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        return None
    return *interval(np.array([100 * (mine[seed]["test"] - other[seed]["test"]) for seed in shared])), len(shared)


def differences(row: str, targets: Sequence[str], shots: int, to: str = PLAIN) -> list[str]:
    """Return a row's differences on targets as tables show them, and their mean if it is measured on all of them."""
    found = [difference(row, target, shots, to=to) for target in targets]
    over_all = average(found)
    return [*map(written, found), "{:+.1f} ± {:.1f}".format(*over_all) if over_all else ""]


def average(found: Sequence[Difference | None]) -> tuple[float, float] | None:
    """Return the mean of differences on targets, and half its 95 % interval over targets; None if one is missing."""
    points = [each[0] for each in found if each]
    return interval(np.array(points)) if len(points) == len(found) else None


def written_rows(shots: int) -> list[str]:
    """Return the rows beside fine-tuning that have a result on any target."""
    return [row for row in ROWS if row != PLAIN and any(difference(row, target, shots) for target in TARGETS)]


def cost(row: str) -> str:
    """Return the cost of a row's step in steps of fine-tuning; empty if it is not measured."""
    return f"{median(COSTS[row]):.1f}" if row in COSTS else ""


def table(shots: int, named: Mapping[str, str] | None = None) -> str:
    """Return the table for a number of images per class: accuracies of fine-tuning, then differences of rows to it.

    Args:
        shots: images per class.
        named: rows by the names that they have in the table; by default all rows, with steps and domain gaps.
    """
    there = [target for target in TARGETS if runs(PLAIN, target, shots)]
    if not there:
        return "No run that counts has finished yet."
    lines = [f"| | {' | '.join(there)} | all | cost |", "|---" * (len(there) + 3) + "|"]
    if named is None:
        lines.append(f"| steps | {' | '.join(str(STEPS[target][shots]) for target in there)} | | |")
    said = [accuracy(runs(PLAIN, target, shots)) for target in there]
    if named is None and shots == GAPS["shots"]:
        gaps = [f"{mean(GAPS['gaps'][target]):.2f}" for target in there]
        lines.append(f"| domain gap | {' | '.join(gaps)} | | |")
    lines.append(f"| **{PLAIN}** | {' | '.join(said)} | | 1 |")
    for name, row in (named or {row: row for row in ROWS if row != PLAIN}).items():
        shown = differences(row, there, shots)
        if any(shown):
            lines.append(f"| {name} | {' | '.join(shown)} | {cost(row)} |")
    return "\n".join(lines)


def other_trainings() -> str:
    """Return the table of trainings with other images or steps, each target's beside the usual one."""
    there = []
    for target in TARGETS:
        lengths = sorted({cell["steps"] for cell in committed() if cell["target"] == target})
        trained = [(target, *each) for each in product(NUMBERS, lengths) if runs(PLAIN, target, *each)]
        there += trained if len(trained) > 1 else []
    others = [each for each in there if each[1:] != (SHOTS, STEPS[each[0]][SHOTS])]
    rows = [row for row in ROWS if row != PLAIN and any(difference(row, *each) for each in others)]
    lines = [f"| | images of a class | steps | {PLAIN} | {' | '.join(rows)} |", "|---" * (len(rows) + 4) + "|"]
    for target, shots, steps in there:
        shown = " | ".join(written(difference(row, target, shots, steps)) for row in rows)
        mine = accuracy(runs(PLAIN, target, shots, steps))
        lines.append(f"| {target} | {shots or 'all'} | {steps} | {mine} | {shown} |")
    return "\n".join(lines) if rows else "No other training has finished yet."


def combination(shots: int) -> str:
    """Return the table of the best combination, against each of what it is to be better than."""
    others = PLAIN, "LP-FT", STATISTICS, CLIPPED, "LP-FT, two networks", PROBE
    return in_columns(WITH_MEAN, {f"minus {other}": differences(BEST, TARGETS, shots, to=other) for other in others})


def optimizers(shots: int) -> str:
    """Return the table of fine-tuning with AdamW, and of what frozen statistics add to it."""
    adam, frozen = f"{PLAIN}, AdamW", f"{STATISTICS}, AdamW"
    pairs = (adam, PLAIN), (STATISTICS, PLAIN), (frozen, adam), (frozen, STATISTICS)
    return in_columns(WITH_MEAN, {f"{row} minus {to}": differences(row, TARGETS, shots, to=to) for row, to in pairs})


def foretelling(shots: int) -> str:
    """Return the table of how well the gain of each row can be predicted before the test.

    It has correlations of the gain with the domain gap, with what the probe gains on validation images, and with what
    the row gains on them; then the share of runs in which the last has the sign of the gain. Rows on fewer than four
    targets are left out.
    """
    found = {}
    for row in written_rows(shots):
        gains, known = [], []
        there = [name for name in TARGETS if difference(row, name, shots)]
        for name in there:
            mine, plain, probe = (runs(each, name, shots) for each in (row, PLAIN, PROBE))
            for seed in sorted(mine.keys() & plain.keys() & probe.keys()):
                gains.append(mine[seed]["test"] - plain[seed]["test"])
                validated = (each[seed]["validation"] - plain[seed]["validation"] for each in (probe, mine))
                known.append((mean(GAPS["gaps"][name]), *validated))
        if len(there) >= len(TARGETS) - 2:
            each = np.array(known).T
            shown = [f"{np.corrcoef(one, gains)[0, 1]:+.2f}" for one in each]
            agree = (np.sign(each[-1]) == np.sign(gains)).mean()
            found[row] = [*shown, f"{100 * agree:.0f} %", str(len(gains))]
    columns = ["domain gap", "probe on validation", "itself on validation", "sign agrees", "runs"]
    return in_columns(columns, found)


def defaults(shots: int) -> str:
    """Return the table of what each callback changes if it is given no options."""
    off = ["off" if mean(GAPS["gaps"][target]) > NEAR else "" for target in TARGETS]
    found = {f"`{name}`": differences(row, TARGETS, shots) if row else [*off, ""] for name, row in DEFAULTS.items()}
    return in_columns(WITH_MEAN, found)


def by_target(rows: dict[str, list[str]], corner: str = "") -> str:
    """Return a table with a column for each target, of the cells of named rows."""
    return in_columns(TARGETS, rows, corner)


def in_columns(columns: Sequence[str], rows: dict[str, list[str]], corner: str = "") -> str:
    """Return a table of the cells of named rows."""
    lines = [f"| {corner}{' ' if corner else ''}| {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def written(found: Difference | None) -> str:
    """Return a difference as tables show it; of one seed without an interval."""
    if found is None:
        return ""
    apart, half, seeds = found
    return f"{apart:+.1f}{'' if np.isnan(half) else f' ± {half:.1f}'}{of_seeds(seeds)}"


def accuracy(found: Runs) -> str:
    """Return the mean test accuracy of runs as tables show it."""
    return f"{100 * mean(cell['test'] for cell in found.values()):.1f} %{of_seeds(len(found))}"


def of_seeds(number: int) -> str:
    """Return the number of seeds as tables show it: only if it is not the usual one."""
    return "" if number == SEEDS_FIRST else f" ({number})"


def rates() -> str:
    """Return the table of chosen rates: that of the backbone, and by how much the head's is multiplied."""
    rows = [row for row in ROWS if ROWS[row].is_trained and not ROWS[row].tuned_as]
    found = {row: [rates_of(row, target) for target in TARGETS] for row in rows}
    shown = {
        row: ["" if each is None else f"{each.body:g} x {each.times:g}" for each in chosen_ones]
        for row, chosen_ones in found.items()
        if any(chosen_ones)
    }
    return by_target(shown)


def lengths() -> str:
    """Return the table of the steps of training."""
    rows = {f"{shots or 'all'} of a class": [str(STEPS[target][shots]) for target in TARGETS] for shots in NUMBERS}
    return by_target(rows, "steps")


def picture(path: Path) -> None:
    """Draw each row's difference from fine-tuning on each target, at ten images of a class."""
    rows = written_rows(10)[::-1]
    figure = empty_figure(size=(11, 1.2 + 0.28 * len(rows)))
    for target, axes in zip(TARGETS, figure.subplots(1, len(TARGETS), sharey=True), strict=True):
        axes.axvline(0, color="black", linewidth=1)
        for place, row in enumerate(rows):
            if each := difference(row, target, 10):
                color = COLORS[0] if row == PROBE else COLORS[2]
                axes.errorbar(each[0], place, xerr=np.nan_to_num(each[1]), marker="o", capsize=3, color=color)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(target, fontsize="medium", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.supxlabel("accuracy above fine-tuning, points", fontsize="medium")
    figure.savefig(path, dpi=90)
