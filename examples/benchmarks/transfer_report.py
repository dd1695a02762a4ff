"""Tables, figures and the evidence of `lightning_transfer.advise`, from the JSON files of the transfer matrix.

python examples/benchmarks/transfer_report.py           # all of them, from results/, into the pages they belong to
python examples/benchmarks/transfer_report.py mine.json # the table of one file, on the terminal
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from transfer_figures import PICTURES
from transfer_results import (
    FOLDER,
    PLAIN,
    PROBE,
    Cells,
    cost,
    difference,
    distance,
    evidence,
    finals,
    gap,
    read,
    share_to_plain,
    tuning,
)

PAGES = FOLDER.parent / "README.md", FOLDER.parents[2] / "README.md"
KNOWN = FOLDER.parents[2] / "lightning_transfer/advising/evidence.json"
END = "<!-- until here -->"
SURE = 0.75  # gap from which the on/off rule keeps nothing of the source


def markdown(report: dict[str, Any]) -> str:
    """The table of a file: accuracies of fine-tuning, then differences to it."""
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
    """What else rows differ in, over all targets of a file."""
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
        when = f"{mean(share for each in shares for share in each):.2f}" if reached else ""
        rates = [[cell["validation"] for cell in tuning(report, name, row).values()] for name in shown]
        worst = mean(100 * (max(each) - min(each)) for each in rates)
        more = [_interval(difference(cells, name, row, "discrimination")) for name in unseen]
        lines.append(f"| {' | '.join([row, f'{reached} of {runs}', when, f'{worst:.1f}', *more])} |")
    return "\n".join(lines)


def rules(report: dict[str, Any]) -> str:
    """How the weight of a source term may be chosen: what each rule would have gained on each target."""
    cells = finals(report)
    targets = [name for name in report["targets"] if (name, PLAIN) in cells]
    lines = ["| rule | " + " | ".join(targets) + " |", "|---|" + "---|" * len(targets)]
    lines.append("| domain gap | " + " | ".join(f"{gap(cells, name):.2f}" for name in targets) + " |")
    for row in (row for row in report["rows"] if row in RULED):
        shown = {
            "always": [difference(cells, name, row) for name in targets],
            f"if the gap is below {SURE}": [
                difference(cells, name, row if gap(cells, name) < SURE else PLAIN) for name in targets
            ],
            "chosen on validation": [_validated(report, cells, name, row) for name in targets],
        }
        if f"{row}, measured weight" in report["rows"]:
            shown["by the gap's formula"] = [difference(cells, name, f"{row}, measured weight") for name in targets]
        lines += [f"| {row}, {rule} | " + " | ".join(map(_interval, found)) + " |" for rule, found in shown.items()]
    return "\n".join(lines)


RULED = ("soft", "joint, random source", "selective")


def _validated(report: dict[str, Any], cells: Cells, target: str, row: str) -> tuple[float, float] | None:
    """Of plain fine-tuning, the row and the same with smaller weights, the one that is best for the tuning seed."""
    names = [PLAIN, *(name for name in report["rows"] if name in (row, f"{row}, start .3", f"{row}, start .1"))]
    best = {name: max((c["validation"] for c in tuning(report, target, name).values()), default=0.0) for name in names}
    return difference(cells, target, max(best, key=best.__getitem__))


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _interval(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


# name of a table: what makes it, of which file
TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "matrix": (markdown, "transfer"),
    "qualities": (qualities, "transfer"),
}


def tables(page: str) -> dict[str, str]:
    """The tables that a page has a place for, as they are made of the results."""
    return {name: make(read(file)) for name, (make, file) in TABLES.items() if begin(name) in page}


def begin(name: str) -> str:
    """The mark in front of a table's place."""
    return f"<!-- table: {name}; made by transfer_report.py -->"


def place(page: str, name: str) -> str:
    """What stands in a table's place."""
    return page.partition(begin(name))[2].partition(END)[0].strip()


def insert(page: str, name: str, text: str) -> str:
    """A page with a table in its place."""
    before, mark, rest = page.partition(begin(name))
    return f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, or put all of them where they belong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?")
    options = parser.parse_args(argv)
    if options.report:
        print(markdown(json.loads(options.report.read_text())))
        return
    for path in PAGES:
        page = path.read_text()
        for name, text in tables(page).items():
            page = insert(page, name, text)
        path.write_text(page)
    KNOWN.write_text(json.dumps(evidence(), indent=1) + "\n")
    for name, draw in PICTURES.items():
        draw(FOLDER / name)


if __name__ == "__main__":
    main()
