"""Draw which layers a search tried to freeze, with what accuracy, and which were frozen in the end."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.reports.curves import COLORS, empty_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = "viridis"  # of accuracy, from dark (low) to bright (high)
FROZEN, TUNED, BEST = COLORS[2], COLORS[1], COLORS[5]


def layer_search(plan: Any, path: str | os.PathLike[str]) -> "Figure":
    """Draw a search: each candidate's accuracy, how many layers of each network it froze, and the final choice.

    Args:
        plan: a LayerPlan of a search.
        path: the file to write; its suffix sets the format.

    Returns:
        The figure that was written, to show or to change.

    Raises:
        TransferConfigError: the plan is not of a search, or matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from lightning_transfer.methods.collaborative.search.plan import Evaluation, LayerPlan
        >>> tried = (Evaluation((1, 4), 0.5), Evaluation((2, 0), 0.7), Evaluation((3, 2), None, "no memory"))
        >>> plan = LayerPlan({"own": 2, "source1": 0}, {"own": 4, "source1": 9}, tried)
        >>> figure = layer_search(plan, tempfile.mkdtemp() + "/search.png")
    """
    if not getattr(plan, "evaluations", None):
        raise TransferConfigError(
            f"{'This LayerPlan' if hasattr(plan, 'frozen') else repr(plan)} holds no search to draw. Pass "
            "callback.plan after a fit with search=..., or LayerPlan.load(path)."
        )
    names = list(plan.num_layers)
    layers = np.array([evaluation.layers for evaluation in plan.evaluations])
    scores = 100 * np.array([np.nan if e.accuracy is None else e.accuracy for e in plan.evaluations], dtype=float)
    at, failed = np.arange(1, len(scores) + 1), np.isnan(scores)
    heights = [2.4, *[1.5] * len(names), 0.4 + 0.3 * len(names)]
    figure = empty_figure(size=(8, 1.2 + sum(heights)))
    top, *rows, below = figure.subplots(len(names) + 2, 1, height_ratios=heights)
    shown: dict[str, Any] = {"c": scores, "cmap": SHADES, "s": 22, "zorder": 3}
    points = top.scatter(at, scores, **shown)
    shown["norm"] = points.norm  # one colour bar holds for all
    _mark_best_and_failed(top, at, scores)
    for number, (axes, name) in enumerate(zip(rows, names, strict=True)):
        axes.scatter(at, layers[:, number], **shown)
        axes.plot(at[failed], layers[failed, number], "x", color=BEST)
        axes.axhline(plan.frozen[name], color=BEST, linewidth=1, linestyle="--")
        axes.set(ylabel=f"{name}\nfrozen", ylim=(-0.5, plan.num_layers[name] - 0.5))
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in (top, *rows):
        axes.set_xlim(0.5, len(at) + 0.5)
        axes.tick_params(labelbottom=axes is rows[-1])
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if not failed.all():
        figure.colorbar(points, ax=[top, *rows], label="accuracy of the candidate, %")
    rows[-1].set_xlabel("candidates, in the order in which they were tried")
    _cuts(below, plan)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return save_figure(figure, path)


def _mark_best_and_failed(axes: Any, at: Any, scores: Any) -> None:
    """Draw the best accuracy so far, and the failed candidates at the bottom."""
    axes.step(at, np.fmax.accumulate(scores), where="post", color=BEST, linewidth=2, label="best so far")
    if (failed := np.isnan(scores)).any():
        floor = np.nanmin(scores) if not failed.all() else 0
        axes.plot(at[failed], np.full(failed.sum(), floor), "x", color=BEST, label="failed")
    axes.set(ylabel="accuracy on\nheld-out images, %")
    axes.set_title("How many layers to freeze", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, fontsize="small")


def _cuts(axes: Any, plan: Any) -> None:
    """Draw how much of each network is frozen."""
    names = list(plan.num_layers)
    frozen = np.array([plan.frozen[name] for name in names])
    total = np.array([plan.num_layers[name] for name in names])
    axes.barh(names, frozen, color=FROZEN, label="frozen")
    axes.barh(names, total - frozen, left=frozen, color=TUNED, label="tuned")
    for place, (part, whole) in enumerate(zip(frozen, total, strict=True)):
        axes.text(whole, place, f"  {part} of {whole} frozen", va="center", fontsize="small")
    axes.set(xlabel="convolutions, from the input on", xlim=(0, 1.25 * total.max()))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, fontsize="small")
