"""Draw one page of the source images that a selection borrows for the target images."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.reports.curves import COLORS, empty_figure, printable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
Thumbnail = Callable[[int], Array]
Names = Mapping[int, str] | Sequence[str]
Pairs = set[tuple[int, int]]

NUM_ROWS, NUM_NEAREST, NUM_MOST, NUM_CLASSES, NUM_DUPLICATE_ROWS = 10, 8, 12, 20, 3
MARK = COLORS[5]
PITCH = (1.12, 1.42)  # inches from one thumbnail to the next; a thumbnail is one inch, with its caption below


@dataclass(frozen=True)
class _Side:
    """Holds the images of the target or of the source, their labels (n,) and the names of the classes."""

    image: Thumbnail
    labels: Array | None
    names: Names | None

    def class_name(self, label: int) -> str:
        known = self.names or ()
        in_names = label in known if isinstance(known, Mapping) else 0 <= label < len(known)
        name = " ".join(printable(known[label] if in_names else f"class {label}").split())
        return "unknown" if label < 0 else name if len(name) <= 15 else f"{name[:14]}…"

    def caption(self, index: int) -> str:
        label = -1 if self.labels is None else int(self.labels[index])
        return f"image {index}" if label < 0 else self.class_name(label)


def borrowed_images(
    indices: Tensor,
    distances: Tensor,
    path: str | os.PathLike[str],
    *,
    target_image: Thumbnail,
    source_image: Thumbnail,
    target_labels: Tensor | None = None,
    source_labels: Tensor | None = None,
    duplicates: Tensor | Sequence[tuple[int, int]] = (),
    target_names: Names | None = None,
    source_names: Names | None = None,
) -> "Figure":
    """Draw target images beside the source images they borrow, the most borrowed ones and the classes drawn on.

    The rows are spread over the target classes, without randomness; some rows that borrow a duplicate are chosen
    first. The most borrowed images and the classes are counted over all target images, not only over the rows shown.

    Args:
        indices: the source images of each target image, nearest first, (n_target, K).
        distances: how far each one is, (n_target, K).
        path: the file to write; its suffix sets the format.
        target_image: returns the thumbnail of a target index, (height, width, 3) in [0, 1].
        source_image: the same for a source index.
        target_labels: classes (n_target,), -1 for an unknown class.
        source_labels: classes (n_source,), -1 for an unknown class.
        duplicates: [target, source] pairs (m, 2) of images that are equal or nearly equal.
        target_names: names of the target classes, by number.
        source_names: names of the source classes, by number.

    Returns:
        The figure that was written, to show or to change.

    Raises:
        TransferConfigError: shapes do not fit, a thumbnail is not an image in [0, 1], or matplotlib is missing.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "borrowed.png")
        >>> indices, distances = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.0, 0.4], [0.1, 0.3]])
        >>> gray = lambda index: np.full((8, 8, 3), index / 3)
        >>> page = borrowed_images(indices, distances, path, target_image=gray, source_image=gray, duplicates=[(0, 0)])
        >>> path.stat().st_size > 0
        True
    """
    _check(indices, distances)
    target = _Side(target_image, _array("target_labels", target_labels, len(indices)), target_names)
    num_source = int(indices.max()) + 1
    source = _Side(source_image, _array("source_labels", source_labels, num_source, more=True), source_names)
    marked = _pairs(duplicates, len(indices))
    figure = _page(indices.cpu().numpy(), distances.detach().cpu().double().numpy(), target, source, marked)
    return save_figure(figure, path)


def _check(indices: Tensor, distances: Tensor) -> None:
    if indices.ndim != 2 or not indices.numel() or indices.shape != distances.shape:
        shapes = f"indices has shape {tuple(indices.shape)} and distances {tuple(distances.shape)}"
        raise TransferConfigError(f"{shapes}; both take (n_target, K) with at least one image.")
    if indices.is_floating_point() or int(indices.min()) < 0:
        raise TransferConfigError("indices takes whole numbers from 0, the indices in the source dataset.")


def _array(argument: str, labels: Tensor | None, num_images: int, *, more: bool = False) -> Array | None:
    if labels is None:
        return None
    if labels.ndim != 1 or len(labels) < num_images or (len(labels) > num_images and not more):
        count = f"{'at least ' * more}{num_images}"
        raise TransferConfigError(
            f"{argument} has shape {tuple(labels.shape)}; it takes {count} labels, one for each image."
        )
    return labels.cpu().long().numpy()


def _pairs(duplicates: Tensor | Sequence[tuple[int, int]], num_target: int) -> Pairs:
    pairs = torch.as_tensor(duplicates)
    shaped = pairs.ndim == 2 and pairs.shape[1] == 2
    if pairs.numel() and not (shaped and 0 <= int(pairs[:, 0].min()) <= int(pairs[:, 0].max()) < num_target):
        raise TransferConfigError(f"duplicates takes pairs (m, 2): a target image below {num_target}, a source image.")
    return {(row, index) for row, index in pairs.tolist()}


def _page(indices: Array, distances: Array, target: _Side, source: _Side, marked: Pairs) -> "Figure":
    """Return the whole page, sized so that a thumbnail is about one inch."""
    rows = _rows(indices, target.labels, marked)
    borrowed, counts = np.unique(indices, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:NUM_MOST]
    shares = _shares(indices, source)
    widths = PITCH[0] * _num_columns(indices[0]), PITCH[0] * 4
    most_height, classes_height = PITCH[1] * -(-len(most) // 4), 0.7 + 0.4 * min(len(shares), NUM_CLASSES + 1)
    height = max(PITCH[1] * len(rows), most_height + classes_height + 0.1)
    figure = empty_figure(size=(sum(widths) + 0.6, height + 1.1))
    panels = figure.subplot_mosaic(
        [["rows", "most"], ["rows", "classes"], ["rows", "."]],
        width_ratios=widths,
        height_ratios=(most_height, classes_height, height - most_height - classes_height),
    )
    num_borrowed = sum(index in indices[row] for row, index in marked)
    found = f"{len(marked):,}, {num_borrowed:,} of them among the nearest" if marked else "none"
    title = (
        f"{len(indices):,} target images and the {indices.shape[1]:,} nearest of each, "
        f"{len(borrowed):,} distinct source images\n"
        f"duplicates, pairs of a target and a source image: {found}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    _draw_rows(panels["rows"], {row: (indices[row], distances[row]) for row in rows}, target, source, marked)
    _draw_most(panels["most"], dict(zip(borrowed[most].tolist(), counts[most].tolist(), strict=True)), source)
    _draw_classes(panels["classes"], shares)
    return figure


def _rows(indices: Array, labels: Array | None, marked: Pairs) -> list[int]:
    """Choose a few target images that borrow a duplicate, then one of each class in turn; sort them by class."""
    labels = np.zeros(len(indices), np.int64) if labels is None else labels
    turns = []
    for turn, label in enumerate(_spread(np.unique(labels))):
        turns += [(place, turn, row) for place, row in enumerate(_spread(np.flatnonzero(labels == label)))]
    order = [row for _, _, row in sorted(turns)]
    visible = {row for row, index in marked if index in indices[row, :NUM_NEAREST]}
    first = [row for row in order if row in visible][:NUM_DUPLICATE_ROWS]
    chosen = (first + [row for row in order if row not in first])[:NUM_ROWS]
    return sorted(chosen, key=lambda row: (labels[row], row))


def _spread(items: Array) -> list[int]:
    """Return the items in an order in which the first ones are always spread over all: 0, 4, 2, 6, 1, 5, 3, 7."""
    order = sorted(range(len(items)), key=lambda place: f"{place:032b}"[::-1])
    return [int(items[place]) for place in order]


def _num_columns(nearest: Array) -> float:
    """Return the width of the rows in thumbnails, at least that of their title."""
    return max(min(len(nearest), NUM_NEAREST) + 1.2, 3)


def _draw_rows(axes: "Axes", lists: dict[int, Any], target: _Side, source: _Side, marked: Pairs) -> None:
    for line, (row, (indices, distances)) in enumerate(lists.items()):
        # without a label the caption is already the number
        _tile(axes, target, row, (0, line), "\n".join(dict.fromkeys((target.caption(row), f"image {row}"))))
        for column, (index, distance) in enumerate(zip(indices[:NUM_NEAREST].tolist(), distances, strict=False)):
            digits = f"{distance:#.3g}".rstrip(".")  # three, of 2.8 too
            caption = f"{digits}\n{source.caption(index)}"
            _tile(axes, source, index, (column + 1.2, line), caption, mark=(row, index) in marked)
    axes.axvline(1.1 * PITCH[0] - 0.06, color=COLORS[0], linewidth=0.8)
    _frame(axes, _num_columns(indices), len(lists), "Target | nearest borrowed, distance")


def _draw_most(axes: "Axes", counts: dict[int, int], source: _Side) -> None:
    for place, (index, count) in enumerate(counts.items()):
        caption = f"by {count:,} target{'s' * (count > 1)}\n{source.caption(index)}"
        _tile(axes, source, index, (place % 4, place // 4), caption)
    _frame(axes, 4, -(-len(counts) // 4), "Most borrowed source images")


def _tile(
    axes: "Axes", side: _Side, index: int, place: tuple[float, float], caption: str, *, mark: bool = False
) -> None:
    """Draw a thumbnail in a unit square, with its caption below; mark a duplicate by a frame and the word."""
    image = np.asarray(side.image(index))
    if image.ndim != 3 or image.shape[2] != 3 or not (image.min() >= -0.001 and image.max() <= 1.001):
        kind = f"image {index} has shape {image.shape}, values from {image.min():.3g} to {image.max():.3g}"
        raise TransferConfigError(f"{kind}; target_image and source_image give (height, width, 3) in [0, 1].")
    x, y = place[0] * PITCH[0], place[1] * PITCH[1]
    half_height, half_width = np.array(image.shape[:2]) / max(image.shape[:2]) / 2
    extent = (x + 0.5 - half_width, x + 0.5 + half_width, y + 0.5 + half_height, y + 0.5 - half_height)
    # smoothing blurs a small image, and a large one needs it; values may leave [0, 1] by a rounding error
    interpolation = "nearest" if max(image.shape) <= 64 else None
    axes.imshow(image.clip(0, 1), extent=extent, interpolation=interpolation)
    axes.text(x + 0.5, y + 1.05, caption, ha="center", va="top", fontsize=8, parse_math=False)
    if mark:
        left, right, bottom, top = extent
        axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=MARK, linewidth=3)
        tag = {"facecolor": MARK, "edgecolor": "none", "pad": 1.5}
        axes.text(x + 0.5, top, "duplicate", ha="center", va="center", fontsize=8, color="white", bbox=tag)


def _frame(axes: "Axes", num_columns: float, num_lines: int, title: str) -> None:
    axes.set(xlim=(-0.06, num_columns * PITCH[0]), ylim=(num_lines * PITCH[1] - 0.02, -0.1), anchor="NW")
    axes.set_axis_off()
    axes.set_title(title, loc="left")


def _shares(indices: Array, source: _Side) -> list[tuple[str, float]]:
    """Return the source classes by name, with their share of everything borrowed, the largest first."""
    labels = np.array([-1]) if source.labels is None else source.labels[indices]
    classes, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: len(counts) if classes.max() >= 0 else 0]
    return [(source.class_name(int(classes[place])), counts[place] / counts.sum()) for place in order]


def _draw_classes(axes: "Axes", shares: list[tuple[str, float]]) -> None:
    axes.set_title("Source classes, share of everything borrowed", loc="left")
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])
    if not shares:
        axes.text(0, 0.98, "The classes of the source images are unknown.", va="top", transform=axes.transAxes)
        return
    names, values = [name for name, _ in shares[:NUM_CLASSES]], [100 * share for _, share in shares]
    bars = axes.barh(range(len(names)), values[: len(names)], color=COLORS[2])
    axes.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=8)
    if others := values[len(names) :]:
        # no bar: all rare classes together would dwarf the others
        axes.text(0, len(names), f" {sum(others):.1f} % together", va="center", fontsize=8)
        names.append(f"{len(others)} other")
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.tick_params(left=False)
    axes.set(xlim=(0, 1.2 * values[0]), ylim=(len(names) - 0.5, -0.5))
