"""Make the tables and figures of all pages from the JSON files in results/.

python examples/benchmarks/transfer_report.py           # all of them, from results/, into their pages
python examples/benchmarks/transfer_report.py mine.json # the table of one file, on the terminal
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import measuring
import numpy as np
import regime_advice
import regime_agreement
import regime_gains
import regime_probes
import regime_ranking
import regime_results
import regime_statistics
from transfer_figures import PICTURES
from transfer_results import (
    FOLDER,
    LABELS,
    PLAIN,
    PROBE,
    SHOTS,
    STEPS,
    TEN_SHOTS,
    Cells,
    compared,
    cost,
    difference,
    distance,
    finals,
    gap,
    interval,
    labels,
    paired,
    read,
    share_to_plain,
    shots,
    steps,
    tuning,
)
from transfer_rows import EVERY, ROWS

PAGES = *sorted(FOLDER.parent.glob("*.md")), FOLDER.parents[2] / "README.md"
END = "<!-- until here -->"
CAPTION = "<!-- caption: made by transfer_report.py -->"  # after the picture that the next paragraph explains
DEFAULTS = {  # what a user writes, by row
    "soft, measured weight": "SoftFinetuning(source)",
    "selective, measured weight": "SelectiveJointFinetuning(source, neighbors=100, target=images_without_augmentation)",
    "AdaFilter": "AdaFilter(gate_bias=0)",
    "transfer module alone": "GatedTransfer()",
    "collaborative": "CollaborativeFinetuning([another_pretrained_network])",
}
RIVALS = (
    ("soft", "linear probe"),
    ("joint, random source", "linear probe"),
    ("selective", "linear probe"),
    ("selective", "joint, random source"),
    ("selective, no rounds", "joint, random source"),
    ("selective, filters of the network", "joint, random source"),
    ("joint, taken for the target's", "joint, random source"),
    ("AdaFilter", "AdaFilter, random gates"),
    ("AdaFilter, first two stages", "AdaFilter"),
    ("gated transfer", "transfer module alone"),
    ("gated transfer", "dropout alone"),
    ("transfer module alone", "dropout alone"),
    ("collaborative", "ensemble of two"),
    ("ensemble of two", "fine-tuning, twice as long"),
    ("two networks, each selective", "ensemble of two"),
    ("two networks, each selective", "selective"),
    ("selective and gated transfer", "selective"),
)
COMBINED = (PLAIN, "selective", "ensemble of two", "selective and gated transfer", "two networks, each selective")
ANNEALED = (PLAIN, "selective", "selective, annealed")
RULED, RULES = ("soft", "joint, random source"), (0.75, 0.8, 0.85)


def whole(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without the rows that were not run on all of its targets."""
    cells, targets = finals(report), report["targets"]
    return {**report, "rows": [row for row in report["rows"] if all((name, row) in cells for name in targets)]}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of a file: accuracies of fine-tuning, then differences from it."""
    cells = finals(report)
    targets = [name for name in report["targets"] if (name, PLAIN) in cells]
    rows = [row for row in report["rows"] if any((name, row) in cells for name in targets)]
    lines = ["| | " + " | ".join(targets) + " | cost |", "|---|" + "---|" * (len(targets) + 1)]
    far = [distance(cells, name) for name in targets]
    if any(value is not None for value in far):
        lines.append("| fine-tuning - linear probe, validation | " + " | ".join(map(_signed, far)) + " | |")
    lines.append("| domain gap | " + " | ".join(f"{gap(cells, name):.2f}" for name in targets) + " | |")
    plain = [f"{100 * mean(cell['test'] for cell in cells[name, PLAIN]):.1f} %" for name in targets]
    lines.append(f"| **{PLAIN}** | " + " | ".join(plain) + " | 1 |")
    for row in rows:
        if row != PLAIN:
            found = [difference(cells, name, row) for name in targets]
            stopped = sum("stopped" in cell for name in targets for cell in cells.get((name, row), []))
            mark = f" ({stopped} runs diverged)" if stopped else ""
            lines.append(f"| {row}{mark} | " + " | ".join(map(_interval, found)) + f" | {cost(cells, row):.1f} |")
    return "\n".join(lines)


def qualities(report: dict[str, Any]) -> str:
    """Return the table of what else rows differ in, over all targets of a file."""
    cells = finals(report)
    targets = [name for name in report["targets"] if (name, PLAIN) in cells]
    unseen = [name for name in targets if "discrimination" in cells[name, PLAIN][0]]
    names = [f"general discrimination, {name}" for name in unseen]
    head = [
        "",
        "has fine-tuning's last accuracy",
        "after this share of steps",
        "lost at the worst rate, points",
        *names,
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in report["rows"]:
        shown = [name for name in targets if (name, row) in cells]
        if not shown or row == PROBE:
            continue
        shares = [share_to_plain(cells, name, row) for name in shown]
        reached, runs = sum(map(len, shares)), sum(len(cells[name, row]) for name in shown)
        when = f"{EVERY[row].length * mean(share for each in shares for share in each):.2f}" if reached else ""
        grid = report["settings"]["rates"]
        rates = [[tuning(report, name, row)[lr]["validation"] for lr in grid] for name in shown]
        worst = f"{mean(100 * (max(each) - min(each)) for each in rates):.1f}"
        plain = [f"{100 * mean(cell['discrimination'] for cell in cells[name, PLAIN]):.1f} %" for name in unseen]
        apart = [_interval(difference(cells, name, row, "discrimination")) for name in unseen]
        more = plain if row == PLAIN else apart
        lines.append(f"| {' | '.join([row, f'{reached} of {runs}', when, worst, *more])} |")
    return "\n".join(lines)


def rivals(report: dict[str, Any]) -> str:
    """Return the table of methods compared with the row nearest to each."""
    cells = finals(report)
    targets = [name for name in report["targets"] if (name, PLAIN) in cells]
    lines = ["| | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for row, other in RIVALS:
        if {row, other} <= {*report["rows"]}:
            found = [difference(cells, name, row, to=other) for name in targets]
            lines.append(f"| {row} - {other} | " + " | ".join(map(_interval, found)) + " |")
    return "\n".join(lines)


def varied(report: dict[str, Any]) -> str:
    """Return the table of variants against fine-tuning and the row that they vary, on the one target of a file."""
    cells, (name,) = finals(report), report["targets"]
    lines = [f"| {name} | from {PLAIN} | from the row that is varied | cost |", "|---|---|---|---|"]
    for row in report["rows"]:
        if row != PLAIN:
            gain, base = _interval(difference(cells, name, row)), EVERY[row].tuned_as
            more = _interval(difference(cells, name, row, to=base)) if base else ""
            lines.append(f"| {row} | {gain} | {more} | {cost(cells, row):.1f} |")
    return "\n".join(lines)


def defaults(report: dict[str, Any]) -> str:
    """Return the table of each method with its defaults."""
    cells = finals(report)
    lines = ["| | the row | " + " | ".join(report["targets"]) + " |", "|---" * (len(report["targets"]) + 2) + "|"]
    for row, call in DEFAULTS.items():
        found = [_interval(difference(cells, name, row)) for name in report["targets"]]
        lines.append(f"| `{call}` | {row} | {' | '.join(found)} |")
    return "\n".join(lines)


def rules() -> str:
    """Return the table of rules for using a source loss: the gain of each on each target, by every draw's own gap."""
    reports = [read(name) for name in TEN_SHOTS]
    cells = {key: runs for report in reports for key, runs in finals(report).items()}
    targets = sorted({name for name, row in cells if row == PLAIN}, key=lambda name: gap(cells, name))
    lines = ["| | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    lines.append("| domain gap | " + " | ".join(f"{gap(cells, name):.2f}" for name in targets) + " |")
    for row in RULED:
        shown = {"always": [difference(cells, name, row) for name in targets]}
        for most in RULES:
            shown[f"at a gap below {most}"] = [_below(cells, name, row, most) for name in targets]
        shown["where validation is better with it"] = [_validated(reports, cells, name, row) for name in targets]
        for rule, found in shown.items():
            says = ["off" if each == (0.0, 0.0) else _interval(each) for each in found]
            lines.append(f"| {row}, {rule} | {' | '.join(says)} |")
    return "\n".join(lines)


def side_by_side(heading: str, names: Sequence[str], of: Callable[[Cells, str], Any]) -> str:
    """Return a line for every target and setting, for targets with several settings and rows that all of them have."""
    found = compared(names, of)
    runs = [(name, cells) for lines in found.values() for _, name, cells in lines]
    rows = [row for row in ROWS if row != PLAIN and all((name, row) in cells for name, cells in runs)]
    table = [f"| | {heading} | {PLAIN} | {' | '.join(rows)} |", "|---" * (len(rows) + 3) + "|"]
    for base, lines in found.items():
        for value, name, cells in lines:
            accuracy = f"{100 * mean(cell['test'] for cell in cells[name, PLAIN]):.1f} %"
            apart = [_interval(difference(cells, name, row)) for row in rows]
            setting = value if isinstance(value, str) else f"{value:.0f}"
            table.append(f"| {' | '.join([base, setting, accuracy, *apart])} |")
    return "\n".join(table)


def _below(cells: Cells, target: str, row: str, most: float) -> tuple[float, float] | None:
    """Return the row's difference if only draws with a gap below `most` use it."""
    if (target, row) not in cells:
        return None
    near = np.array([cell["gap"] < most for cell in cells[target, PLAIN]])
    return interval(paired(cells, target, row) * near)


def _validated(reports: Sequence[dict[str, Any]], cells: Cells, target: str, row: str) -> tuple[float, float] | None:
    """Return the row's difference if it is better for the seed that chooses rates, otherwise 0."""
    if (target, row) not in cells:
        return None
    report = next(each for each in reports if target in each["targets"])
    mine, plain = (max(each["validation"] for each in tuning(report, target, name).values()) for name in (row, PLAIN))
    return difference(cells, target, row if mine > plain else PLAIN)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _interval(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "matrix": lambda: markdown(whole(read("transfer"))),
    "qualities": lambda: qualities(whole(read("transfer"))),
    "rivals": lambda: rivals(whole(read("transfer"))),
    "defaults": lambda: defaults(read("transfer")),
    "combined": lambda: markdown(read("combined")),
    "combined near": lambda: markdown({**read("transfer"), "targets": ["near"], "rows": COMBINED}),
    "combined rivals": lambda: rivals({**read("transfer"), "targets": ["near"], "rows": COMBINED}),
    "full": lambda: markdown(whole(read("full"))),
    "full near": lambda: varied({**read("full"), "targets": ["near"], "rows": ANNEALED}),
    "full, longer": lambda: markdown(read("full-longer")),
    "full, measured": lambda: markdown(read("full-measured")),
    "shots": lambda: side_by_side("images of a class", SHOTS, shots),
    "lengths": lambda: side_by_side("steps", STEPS, steps),
    "labels": lambda: side_by_side("images of the classes", LABELS, labels),
    "between": lambda: markdown(read("between")),
    "rules": rules,
    "tried": lambda: markdown(read("tried")),
    "variants": lambda: markdown(read("variants")),
    "near variants": lambda: varied(read("near")),
    "variants' rivals": lambda: rivals(read("variants")),
    "regime": lambda: regime_results.table(10),
    "regime short": lambda: regime_results.table(10, regime_results.SHORT),
    "regime best": lambda: regime_results.combination(10),
    "regime optimizers": lambda: regime_results.optimizers(10),
    "regime agreement": regime_agreement.table,
    "regime foretelling": lambda: regime_results.foretelling(10),
    "regime defaults": lambda: regime_results.defaults(10),
    "regime rates": regime_results.rates,
    "regime lengths": regime_results.lengths,
    "regime others": regime_results.other_trainings,
    "regime ranking": regime_ranking.table,
    "regime advice": regime_advice.table,
    "regime probes": regime_probes.table,
    "regime sureness": regime_probes.sureness,
    "regime statistics": regime_statistics.table,
    "costs": lambda: measuring.markdown(read("costs")["rows"]),
}


def tables(page: str) -> dict[str, str]:
    """Return the tables that a page has a place for, made of the results."""
    return {name: make() for name, make in TABLES.items() if begin(name) in page}


def begin(name: str) -> str:
    """Return the mark before a table's place."""
    return f"<!-- table: {name}; made by transfer_report.py -->"


def place(page: str, name: str) -> str:
    """Return the text in a table's place."""
    return page.partition(begin(name))[2].partition(END)[0].strip()


def insert(page: str, name: str, text: str) -> str:
    """Return a page with a table in its place."""
    before, mark, rest = page.partition(begin(name))
    return f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def with_caption(page: str) -> str:
    """Return a page with the caption of the gains as the paragraph after its mark, if it has the mark."""
    before, mark, rest = page.partition(CAPTION)
    _, end, after = rest.lstrip().partition("\n\n")
    return f"{before}{mark}\n\n{regime_gains.caption()}{end}{after}" if mark else page


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, or write all of them into their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?")
    options = parser.parse_args(argv)
    if options.report:
        report = json.loads(options.report.read_text())
        if "cells" not in report:
            parser.error(f"{options.report} was not written by transfer.py")
        print(markdown(report))
        return
    for path in PAGES:
        page = path.read_text()
        for name, text in tables(page).items():
            page = insert(page, name, text)
        path.write_text(with_caption(page))
    pictures = {**PICTURES, "regime.png": regime_results.picture, "gains.png": regime_gains.picture}
    for name, draw in pictures.items():
        draw(FOLDER / name)


if __name__ == "__main__":
    main()
