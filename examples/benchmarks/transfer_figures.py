"""Draw the transfer matrix by distance, learning rate and steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transfer_results import (
    PLAIN,
    SHOTS,
    STEPS,
    TEN_SHOTS,
    Cells,
    compared,
    difference,
    distance,
    finals,
    gap,
    read,
    shots,
    steps,
    tuning,
)

from lightning_transfer.reports.curves import COLORS, empty_figure

SHOWN = (
    "soft",
    "joint, random source",
    "selective",
    "selective, measured weight",
    "AdaFilter",
    "gated transfer",
    "collaborative",
    "ensemble of two",
)
ASIDE = 1.04  # that points of equal images do not hide each other
CURVES = tuple(row for row in SHOWN if "measured" not in row)  # those are soft's and selective's, or fine-tuning's


def by_distance(path: Path) -> None:
    """Draw each method's difference from fine-tuning against the target's distance."""
    reports = [read(name) for name in TEN_SHOTS]
    cells = {key: runs for report in reports for key, runs in finals(report).items()}
    names = sorted({name for name, row in cells if row == PLAIN}, key=lambda name: gap(cells, name))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    figure, panels = _panels([row for row in SHOWN if any((name, row) in cells for name in names)], columns=4)
    for row, axes in panels.items():
        axes.axhline(0, color="black", linewidth=1)
        for name in names:
            far, found = distance(cells, name), difference(cells, name, row)
            if far is not None and found is not None:
                axes.errorbar(far, *found, marker="o", capsize=3, color=colors[name], label=name)
    _finish(figure, panels, path, x="fine-tuning above a linear probe, points", y="accuracy above fine-tuning, points")


def by_shots(path: Path) -> None:
    """Draw each method's difference from fine-tuning against the images of a class."""
    _by_setting(path, compared(SHOTS, shots), "images of a class")


def by_length(path: Path) -> None:
    """Draw each method's difference from fine-tuning against the steps that both have."""
    _by_setting(path, compared(STEPS, steps), "steps")


def _by_setting(path: Path, several: dict[str, list[tuple[float, str, Cells]]], across: str) -> None:
    figure, panels = _panels([*several], columns=2, width=4.6)
    for base, axes in panels.items():
        axes.axhline(0, color="black", linewidth=1)
        places: set[float] = set()
        for number, row in enumerate(CURVES):
            found = [(value, difference(cells, name, row)) for value, name, cells in several[base]]
            points = [(value, *apart) for value, apart in found if apart is not None]
            if len(points) > 1:
                values, means, halves = map(np.array, zip(*points, strict=True))
                style = {"marker": "o", "capsize": 3, "label": row, **_style(row)}
                axes.errorbar(values * ASIDE**number, means, halves, **style)
                places |= {*values.tolist()}
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(sorted(places), [f"{place:.0f}" for place in sorted(places)])
    _finish(figure, panels, path, x=across, y="accuracy above fine-tuning, points")


def by_rate(path: Path) -> None:
    """Draw validation accuracy against the learning rate."""
    report = read("transfer")
    figure, panels = _panels([name for name in report["targets"] if tuning(report, name, PLAIN)], columns=4)
    for name, axes in panels.items():
        for row in (PLAIN, *CURVES):
            found = sorted((lr, 100 * cell["validation"]) for lr, cell in tuning(report, name, row).items())
            if found:
                axes.plot(*zip(*found, strict=True), label=row, marker="o", markersize=3, **_style(row))
        axes.set_xscale("log")
    _finish(figure, panels, path, x="learning rate", y="validation accuracy, %", is_shared=False)


def by_step(path: Path) -> None:
    """Draw validation accuracy during training, the mean over seeds."""
    report = read("transfer")
    cells = finals(report)
    figure, panels = _panels([name for name in report["targets"] if (name, PLAIN) in cells], columns=4)
    for name, axes in panels.items():
        for row in (PLAIN, *CURVES):
            if (name, row) in cells:
                curve = 100 * np.mean([cell["curve"] for cell in cells[name, row]], 0)
                steps = np.arange(1, len(curve) + 1) / len(curve)
                axes.plot(steps, curve, label=row, **_style(row))
    _finish(figure, panels, path, x="share of training", y="validation accuracy, %", is_shared=False)


PICTURES: dict[str, Callable[[Path], None]] = {
    "distance.png": by_distance,
    "shots.png": by_shots,
    "lengths.png": by_length,
    "rates.png": by_rate,
    "steps.png": by_step,
}


def _style(row: str) -> dict[str, Any]:
    """Return the line style of a row; plain fine-tuning's is thick and black."""
    if row == PLAIN:
        return {"color": "black", "linewidth": 2.5}
    if row == "ensemble of two":
        return {**_style("collaborative"), "linestyle": "--"}
    return {"color": COLORS[1:][CURVES.index(row)], "linewidth": 1.3}


def _panels(names: Sequence[str], columns: int, width: float = 3.1) -> tuple[Any, dict[str, Any]]:
    """Return a figure with a panel for each name."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = empty_figure(size=(width * columns, 2.7 * rows + 0.6))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    panels = dict(zip(names, axes, strict=False))
    for name, panel in panels.items():
        panel.set_title(name, loc="left", fontsize="medium", fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    for empty in axes[len(names) :]:
        empty.set_visible(False)
    return figure, panels


def _finish(figure: Any, panels: dict[str, Any], path: Path, *, x: str, y: str, is_shared: bool = True) -> None:
    """Label the axes once and add one legend."""
    if is_shared:
        across, along = ([getattr(panel, f"get_{side}lim")() for panel in panels.values()] for side in "xy")
        for panel in panels.values():
            panel.set_xlim(min(low for low, _ in across), max(high for _, high in across))
            panel.set_ylim(min(low for low, _ in along), max(high for _, high in along))
    pairs = [panel.get_legend_handles_labels() for panel in panels.values()]
    labels = {label: handle for pair in pairs for handle, label in zip(*pair, strict=True)}
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    figure.legend(labels.values(), labels, frameon=False, ncols=5, loc="outside upper center", fontsize="small")
    figure.savefig(path, dpi=110)
