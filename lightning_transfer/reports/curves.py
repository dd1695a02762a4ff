"""Draw learning curves of several methods, with the annealed weight below."""

import io
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import reading, write_atomically
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
    num_steps: int | None = None,
    title: str = "",
) -> "Figure":
    """Draw each method's validation accuracy over training, mean and standard error, above the source weight.

    Args:
        curves: for each method one list of accuracies per seed, each as long as `steps`.
        steps: the optimizer steps at which accuracy was measured.
        path: the file to write; its suffix sets the format.
        schedule: the source weight, drawn below.
        num_steps: the length of training; by default the last of `steps`.
        title: of the picture.

    Returns:
        The figure that was written, to show or to change.

    Raises:
        TransferConfigError: matplotlib is missing.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "curves.png")
        >>> figure = learning_curves({"plain": [[0.2, 0.5]], "soft": [[0.3, 0.6]]}, [10, 20], path, schedule=Schedule())
        >>> path.stat().st_size > 0
        True
    """
    num_steps = num_steps or max(steps)
    figure = empty_figure()
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1.2)) if schedule else (figure.subplots(), None)
    for (name, runs), color in zip(curves.items(), cycle(COLORS), strict=False):
        values = 100 * np.asarray(runs)
        mean = values.mean(0)
        error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(mean)
        top.plot(steps, mean, color=color, label=name, linewidth=2)
        top.fill_between(steps, mean - error, mean + error, color=color, alpha=0.13, linewidth=0)
    top.set(ylabel="validation accuracy, %", xlim=(0, num_steps))
    top.set_title(title, loc="left", fontweight="bold")
    counts = sorted({len(runs) for runs in curves.values()})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    note = f"mean ± standard error, {seeds} seeds" if counts[-1] > 1 else None
    top.legend(title=note, frameon=False, loc="lower right", alignment="right", title_fontproperties={"size": "small"})
    if schedule is not None and below is not None:
        at = np.linspace(0, num_steps, 201)
        weight = [schedule.at(step, num_steps) for step in at]
        below.plot(at, weight, color=COLORS[1], linewidth=2)
        below.fill_between(at, weight, color=COLORS[1], alpha=0.13, linewidth=0)
        below.set(ylabel="source\nweight", ylim=(0, 1.05 * max(*weight, 1e-9)))
    top.locator_params(axis="x", integer=True)
    (below or top).set_xlabel("optimizer steps")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.align_ylabels()
    return save_figure(figure, path)


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> "Figure":
    """Write a figure and return it; the suffix of its path sets the format, PNG if there is none.

    Raises:
        TransferConfigError: the suffix is not a known format, or the file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if ending and ending not in known:
        raise TransferConfigError(f"A picture cannot end in .{ending}. Known: {', '.join(sorted(known))}.")
    path = path if ending else f"{os.fspath(path)}.png"
    # otherwise a PDF holds the time of day, so that no two are equal
    metadata = {"CreationDate": None} if ending == "pdf" else None

    def write(file: BinaryIO) -> None:
        figure.savefig(file, format=ending or "png", dpi=140, metadata=metadata)

    write_atomically(path, write, what="the picture", fix="Pass another path.")
    return figure


def png_of(picture: "Figure | str | os.PathLike[str]") -> bytes:
    """Return a figure, or a PNG file, as PNG.

    Raises:
        TransferConfigError: the file is not a PNG, or cannot be read.
    """
    if isinstance(picture, str | os.PathLike):
        with reading(picture, what="picture", fix="Name a PNG file."):
            data = Path(picture).read_bytes()
            if not data.startswith(b"\x89PNG"):
                raise TransferConfigError(f"{picture} is not a PNG file. Name one, or pass the figure.")
            return data
    written = io.BytesIO()
    picture.savefig(written, format="png", dpi=110)
    return written.getvalue()


def printable(name: object) -> str:
    """Return a name as text that a font can draw; a folder's name may hold bytes that are not text."""
    return str(name).encode("utf-8", "replace").decode()


def empty_figure(*, size: tuple[float, float] = (7, 5)) -> "Figure":
    """Return a figure that needs no display and does not touch the global state of pyplot."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TransferConfigError("Pictures need matplotlib: pip install 'lightning_transfer[report]'.") from None
    return Figure(figsize=size, layout="constrained")
