"""Learning curves of several methods beside the weight that was annealed."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#4c566a", "#d08770", "#5e81ac", "#a3be8c", "#b48ead", "#bf616a", "#88c0d0")


def learning_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    steps: Sequence[int],
    path: str | os.PathLike[str],
    *,
    schedule: Schedule | None = None,
    title: str = "",
) -> None:
    """Draw each method's validation accuracy over training, mean and standard error, above the source weight.

    Args:
        curves: per method, one list of accuracies a seed, each as long as `steps`.
        steps: the optimizer steps of the measurements.
        path: where the picture goes; its ending says the format.
        schedule: the source weight, drawn below.
        title: what is shown.

    Raises:
        TransferConfigError: matplotlib is missing.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "curves.png")
        >>> learning_curves({"plain": [[0.2, 0.5]], "soft": [[0.3, 0.6]]}, [10, 20], path, schedule=Schedule())
        >>> path.stat().st_size > 0
        True
    """
    figure = _figure()
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1)) if schedule else (figure.subplots(), None)
    for (name, runs), color in zip(curves.items(), COLORS, strict=False):
        values = 100 * np.asarray(runs)
        mean = values.mean(0)
        error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(mean)
        top.plot(steps, mean, color=color, label=name, linewidth=2)
        top.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    top.set_ylabel("validation accuracy, %")
    top.set_title(title)
    top.legend(frameon=False, loc="lower right")
    if schedule is not None and below is not None:
        progress = np.linspace(0, 1, 201)
        last = max(steps)
        below.plot(progress * last, [schedule.at(round(share * last), last) for share in progress], color="#2e3440")
        below.set_ylabel("source weight")
        below.set_ylim(bottom=0)
    (below or top).set_xlabel("optimizer steps")
    for axes in (top, below):
        if axes is not None:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    figure.savefig(path, dpi=140)


def _figure() -> "Figure":
    """A figure that needs no display and touches no global state of pyplot."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TransferConfigError("Pictures need matplotlib: pip install 'lightning_transfer[report]'.") from None
    return Figure(figsize=(7, 5), layout="constrained")
