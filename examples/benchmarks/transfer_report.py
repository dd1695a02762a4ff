"""Tables, figures and the evidence of `lightning_transfer.advise`, from the JSON files of the transfer matrix.

python examples/benchmarks/transfer_report.py examples/benchmarks/results/transfer.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import t as student  # type: ignore[import-untyped]

from lightning_transfer.reports.curves import COLORS, empty_figure

PLAIN, PROBE = "fine-tuning", "linear probe"
BEGIN, END = "<!-- made by transfer_report.py -->", "<!-- until here -->"
EVIDENCE = ("transfer.json",)  # the results that advise() knows
Cells = dict[tuple[str, str], list[dict[str, Any]]]  # by target and row, final runs in the order of seeds


def finals(report: dict[str, Any]) -> Cells:
    """Final runs of rows that have all their seeds; the tuning seed counts for nothing but the rate."""
    found: Cells = {}
    for cell in sorted(report["cells"], key=lambda cell: cell["seed"]):
        if "test" in cell:
            found.setdefault((cell["target"], cell["row"]), []).append(cell)
    num_seeds = int(report["settings"]["seeds"])
    return {key: cells for key, cells in found.items() if len(cells) == num_seeds}


def paired(cells: Cells, target: str, row: str, key: str = "test") -> Any:
    """(seeds,) differences of a row to plain fine-tuning, in points."""
    return np.array([100 * (a[key] - b[key]) for a, b in zip(cells[target, row], cells[target, PLAIN], strict=True)])


def difference(cells: Cells, target: str, row: str, key: str = "test") -> tuple[float, float] | None:
    """A row's mean difference to plain fine-tuning in points, paired by seed, and half of its 95 % interval."""
    mine, plain = cells.get((target, row)), cells.get((target, PLAIN))
    if not mine or not plain or key not in mine[0]:
        return None
    apart = paired(cells, target, row, key)
    if len(apart) == 1:
        return float(apart[0]), np.nan
    error = apart.std(ddof=1) / len(apart) ** 0.5
    return float(apart.mean()), float(student.ppf(0.975, len(apart) - 1) * error)


def distance(cells: Cells, target: str) -> float | None:
    """How far a target lies: by how many points fine-tuning is above a linear probe, on validation images."""
    tuned, probed = cells.get((target, PLAIN)), cells.get((target, PROBE))
    if not tuned or not probed:
        return None
    return float(100 * (mean(cell["validation"] for cell in tuned) - mean(cell["validation"] for cell in probed)))


def markdown(report: dict[str, Any]) -> str:
    """The table: accuracies of fine-tuning, then differences to it."""
    cells = finals(report)
    targets = [name for name in report["targets"] if (name, PLAIN) in cells]
    rows = [row for row in report["rows"] if any((name, row) in cells for name in targets)]
    lines = ["| | " + " | ".join(targets) + " | cost |", "|---|" + "---|" * (len(targets) + 1)]
    far = [distance(cells, name) for name in targets]
    lines.append("| fine-tuning - linear probe, validation | " + " | ".join(_signed(value) for value in far) + " | |")
    plain = [f"{100 * mean(cell['test'] for cell in cells[name, PLAIN]):.1f} %" for name in targets]
    lines.append(f"| **{PLAIN}** | " + " | ".join(plain) + " | 1 |")
    for row in rows:
        if row != PLAIN:
            found = [difference(cells, name, row) for name in targets]
            lines.append(f"| {row} | " + " | ".join(map(_interval, found)) + f" | {_cost(cells, row):.1f} |")
    return "\n".join(lines)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _interval(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def _cost(cells: Cells, row: str) -> float:
    """CPU seconds, in those of plain fine-tuning on the same targets."""
    shared = [target for target, name in cells if name == row and (target, PLAIN) in cells]
    seconds = [sum(cell["seconds"] for target in shared for cell in cells[target, name]) for name in (row, PLAIN)]
    return float(seconds[0] / seconds[1])


def evidence(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What `lightning_transfer.advise` knows of each target."""
    cells, found = finals(report), []
    for name in report["targets"]:
        far, plain = distance(cells, name), cells.get((name, PLAIN), [])
        if far is None:
            continue
        rows = [row for row in report["rows"] if row != PLAIN and (name, row) in cells]
        found.append(
            {
                "target": name,
                "shots": plain[0]["images"] / plain[0]["classes"],
                "gap": round(mean(cell["gap"] for cell in plain), 4),
                "distance": round(far, 2),
                "differences": {row: [round(float(value), 2) for value in paired(cells, name, row)] for row in rows},
                "costs": {row: round(_cost(cells, row), 2) for row in rows},
            }
        )
    return found


def steps_to_plain(cells: Cells, target: str, row: str) -> float | None:
    """The share of steps after which a row has plain fine-tuning's final validation accuracy, where it ever has."""
    mine, plain = cells.get((target, row)), cells.get((target, PLAIN))
    if not mine or not plain:
        return None
    reached = []
    for cell, other in zip(mine, plain, strict=True):
        looks = [place for place, value in enumerate(cell["curve"], start=1) if value >= other["curve"][-1]]
        reached.append(looks[0] / len(cell["curve"]) if looks else np.nan)
    return float(np.mean(reached))


def figure(report: dict[str, Any], path: Path) -> None:
    """Each method's difference to fine-tuning against how far the target lies."""
    cells = finals(report)
    targets = sorted((far, name) for name in report["targets"] if (far := distance(cells, name)) is not None)
    rows = [row for row in report["rows"] if row not in (PLAIN, PROBE) and (targets[0][1], row) in cells]
    drawing = empty_figure(size=(8, 5))
    axes = drawing.subplots()
    axes.axhline(0, color="black", linewidth=1)
    for number, row in enumerate(rows):
        found = [(far, difference(cells, name, row)) for far, name in targets]
        known = [(far, value) for far, value in found if value is not None]
        places = np.array([far for far, _ in known]) + 0.25 * (number - len(rows) / 2)
        style: Any = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[number // len(COLORS) % 3]}
        heights, errors = ([value[part] for _, value in known] for part in (0, 1))
        axes.errorbar(places, heights, errors, marker="o", capsize=2, linewidth=1.2, label=row, **style)
    for far, name in targets:
        axes.annotate(name, (far, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="small")
    axes.set(
        xlabel="distance of the target: fine-tuning above a linear probe, points",
        ylabel="test accuracy above fine-tuning, points",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    drawing.savefig(path, dpi=140)


def insert(text: str, page: Path) -> None:
    """Put a table in its place on a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and put it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--figure", type=Path, help="where the picture goes")
    parser.add_argument("--page", type=Path, help="a page with the two marks that the table goes between")
    parser.add_argument("--evidence", type=Path, help="where what advise() knows goes, from the files beside")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text())
    print(markdown(report))
    cells = finals(report)
    for target, row in cells:
        if (seen := difference(cells, target, row, "discrimination")) is not None:
            steps = steps_to_plain(cells, target, row)
            print(f"{target}, {row}: general discrimination {_interval(seen)}, steps to plain {steps:.2f}")
    if options.evidence:
        known = [json.loads(options.report.with_name(name).read_text()) for name in EVIDENCE]
        settings = [setting for each in known for setting in evidence(each)]
        options.evidence.write_text(json.dumps(settings, indent=1) + "\n")
    if options.figure:
        figure(report, options.figure)
    if options.page:
        insert(markdown(report), options.page)


if __name__ == "__main__":
    main()
