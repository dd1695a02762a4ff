"""Draw and caption the first picture of the README: what the recommended callbacks gain on the targets of the regime.

Figures and counts are of the committed cells; `transfer_report.py` writes both.
"""

from pathlib import Path
from textwrap import fill
from typing import Any

from regime import SHOTS
from regime_data import TARGETS
from regime_results import BEST, SHORT, Difference, average, cost, difference

from lightning_transfer.reports.curves import empty_figure

ALONE = "FrozenStatistics"
SHOWN = {ALONE: SHORT[ALONE], "with ProbeStart and a second network": BEST}  # rows, by their names in the picture
KINDS = {  # of images
    "flowers": "flowers",
    "dtd10": "textures (dtd10)",
    "scenes15": "scenes (scenes15)",
    "trashnet": "waste (trashnet)",
    "rsscn7": "remote sensing (rsscn7)",
    "brainmri": "brain scans (brainmri)",
}
STYLES = ("#0072b2", "o"), ("#d55e00", "D")  # blue and orange, which colour-blind readers can tell apart
APART = 0.19  # each of the two from the middle of its line
WORDS = "none", "one", "two", "three", "four", "five", "six"


def gains(row: str) -> tuple[list[Difference], tuple[float, float]]:
    """Return what a row gains on each target, and on average."""
    found = [difference(row, target, SHOTS) for target in TARGETS]
    mean = average(found)
    assert mean is not None, f"{row} is not measured on all targets"
    return [each for each in found if each], mean


def caption() -> str:
    """Return what is compared, on what, the mean gains and how many intervals of single targets exclude 0."""
    found, averages = zip(*map(gains, SHOWN.values()), strict=True)
    means = [f"{points:.1f} ({points - half:.1f} to {points + half:.1f})" for points, half in averages]
    shown = [in_words(sum(points > half for points, half, _ in each)) for each in found]
    seeds = sorted({number for each in found for _, _, number in each})
    numbers = " to ".join(dict.fromkeys(in_words(each) for each in (seeds[0], seeds[-1])))
    targets = in_words(len(TARGETS))
    text = (
        f"*Points of test accuracy above plain fine-tuning, 95 % intervals: EfficientNet-lite0, {targets} targets, ten "
        f"images of each class, {numbers} seeds. Mean: {means[0]} with `{ALONE}`; {means[1]} with `ProbeStart` and a "
        f"second network ({cost(BEST)} times the cost). Intervals above 0: {shown[0]} and {shown[1]} of {targets} "
        "targets.*"
    )
    return fill(text, 120, break_on_hyphens=False)


def in_words(number: int) -> str:
    """Return a number as prose has it."""
    return WORDS[number] if number < len(WORDS) else str(number)


def picture(path: Path) -> None:
    """Draw both rows' gains on each target, and above them their means."""
    figure = empty_figure(size=(8, 4.6))
    axes = figure.subplots()
    axes.axhspan(-0.5, 0.5, color="#eeeeee", linewidth=0)
    axes.axvline(0, color="black", linewidth=1.2)
    for (name, row), (color, marker), side in zip(SHOWN.items(), STYLES, (-APART, APART), strict=True):
        found, (mean, spread) = gains(row)
        style: dict[str, Any] = {"color": color, "solid_capstyle": "butt"}  # an interval ends where its line ends
        for line, (points, half, _) in enumerate(found, start=1):
            place = line + side
            axes.plot([points - half, points + half], [place, place], alpha=0.6, linewidth=1.8, **style)
            axes.plot(points, place, marker, color=color, markersize=6.5)
        axes.plot([mean - spread, mean + spread], [side, side], linewidth=3.5, **style)
        axes.plot(mean, side, marker, color=color, markersize=9, label=name)
        said = f"{mean:+.1f} ± {spread:.1f}"
        axes.text(mean + spread + 0.5, side, said, color=color, va="center", fontsize=11, fontweight="bold")
    axes.set_yticks(range(len(TARGETS) + 1), ["mean of the targets", *(KINDS[target] for target in TARGETS)])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(TARGETS) + 0.5, -0.5)
    axes.tick_params(labelsize=12, length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.text(0, -0.6, "plain fine-tuning", ha="center", fontsize=12)
    axes.set_xlabel("points of test accuracy above plain fine-tuning, with 95 % intervals", fontsize=12)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=12)
    figure.savefig(path, dpi=200)
