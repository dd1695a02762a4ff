"""Draw which filters of a gated network are tuned: layer by layer, and class by class."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_transfer.datasets import known_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class
from lightning_transfer.reports.curves import empty_figure, printable, save_figure
from lightning_transfer.tracing import evaluating, images_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 200  # rows that a layer is drawn with, for any number of filters
NAMED = 40  # the most layers or classes that can be named side by side
SHADES = "RdYlBu_r"  # frozen is cold, tuned is warm

Shares = NDArray[np.float64]


def gate_map(
    module: nn.Module, loader: Iterable[Any], path: str | os.PathLike[str], *, class_names: Sequence[str] | None = None
) -> "Figure":
    """Draw how often each filter of an AdaFilter network is the tuned one.

    The upper part shows every layer's filters, the most tuned ones lowest, and each layer's mean; the lower part shows
    each layer's mean by class. The most and the least tuned layers are marked.

    Args:
        module: a gated network, or a module that holds one.
        loader: batches of (images, labels) as the forward takes them.
        path: the file to write; its suffix sets the format.
        class_names: of the labels; by default `loader.dataset.classes`, or their numbers if it has none.

    Returns:
        The figure that was written.

    Raises:
        TransferConfigError: the network is not gated, its gates do not learn, the loader is empty or a DataModule, or
            matplotlib is missing.

    Example:
        >>> import pathlib, tempfile
        >>> from lightning_transfer.functional import apply_adafilter
        >>> flat = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *flat)
        >>> report = apply_adafilter(network)
        >>> loader = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))]
        >>> figure = gate_map(network, loader, pathlib.Path(tempfile.mkdtemp(), "gates.png"))
        >>> figure.axes[0].get_title(loc="left")
        'How often each filter is the tuned one'
    """
    gates = next((child for child in module.modules() if hasattr(child, "last_gates")), None)
    if gates is None:
        raise TransferConfigError(f"{type(module).__name__} is not gated: pass a network that AdaFilter has trained.")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TransferConfigError(
            f"loader is {a_class(loader)}; expected batches of (images, labels). Pass a loader, such as "
            "datamodule.val_dataloader()."
        )
    by_class, counts = _count(module, gates, loader)
    if not by_class:
        raise TransferConfigError(
            f"The gates are {gates.estimator!r}, which has nothing to draw. Pass a network with learned gates."
        )
    totals = {name: rows.sum(0) / counts.sum() for name, rows in by_class.items()}
    seen = np.flatnonzero(counts)
    of_class = np.stack([rows[seen].mean(1) / counts[seen] for rows in by_class.values()], 1)
    if class_names is not None and len(class_names) < len(counts):
        raise TransferConfigError(
            f"class_names has {len(class_names)} names, but labels go up to {len(counts) - 1}. Pass one for each class."
        )
    listed = known_names(getattr(loader, "dataset", None)) or []
    if class_names is None and len(listed) >= len(counts):
        class_names = listed
    names = [printable(label if class_names is None else class_names[label]) for label in seen.tolist()]
    return save_figure(_draw(totals, of_class, names), path)


def _count(module: nn.Module, gates: Any, loader: Iterable[Any]) -> tuple[dict[str, Shares], NDArray[np.int64]]:
    """Count open gates, (classes, filters) for each layer, and images of each class."""
    device = next(module.parameters()).device
    chosen: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    with evaluating(module):
        for batch in loader:
            images, targets = images_and_labels(batch, device)
            module(images)
            labels.append(targets.cpu())
            for name, found in gates.last_gates().items():
                chosen.setdefault(name, []).append(found.cpu())
    if not labels:
        raise TransferConfigError("The loader gave no images.")
    of_images = torch.cat(labels)
    if of_images.ndim != 1 or of_images.is_floating_point() or int(of_images.min()) < 0:
        raise TransferConfigError("The loader's labels are not class numbers from 0. Pass batches of (images, labels).")
    counts = of_images.bincount()
    sums = {
        name: torch.zeros(len(counts), parts[0].shape[1]).index_add_(0, of_images, torch.cat(parts).float())
        for name, parts in chosen.items()
    }
    return {name: rows.double().numpy() for name, rows in sums.items()}, counts.numpy()


def _draw(totals: Mapping[str, Shares], of_class: Shares, class_names: Sequence[str]) -> "Figure":
    """Return the page."""
    layers, means = list(totals), np.array([shares.mean() for shares in totals.values()])
    is_named = len(class_names) <= NAMED
    tall = min(5.0, 1.2 + 0.22 * len(class_names))
    figure = empty_figure(size=(max(7.0, 2.5 + 0.32 * len(layers)), 5.4 + tall))
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, tall))
    columns = [_column(shares) for shares in totals.values()]
    extent = (-0.5, len(layers) - 0.5, 0, 100)
    shown = {"cmap": SHADES, "vmin": 0, "vmax": 1, "aspect": "auto"}
    image = top.imshow(np.stack(columns, 1), extent=extent, origin="lower", interpolation="nearest", **shown)
    top.plot(range(len(layers)), 100 * means, "o-", color="black", markersize=3, linewidth=1, label="mean of the layer")
    for number, word, away in ((int(means.argmax()), "most", 1), (int(means.argmin()), "least", -1)):
        top.annotate(
            f"{word} tuned\n{means[number]:.0%}",
            (number, 100 * means[number]),
            (0, 12 * away),
            textcoords="offset points",
            ha="left" if number == 0 else "right" if number == len(layers) - 1 else "center",
            va="bottom" if away > 0 else "top",
            fontsize="small",
            bbox={"boxstyle": "round", "facecolor": "white", "alpha": 0.85, "linewidth": 0},
            arrowprops={"arrowstyle": "-"},
        )
    # room for a label outside of the columns
    top.set(ylim=(-20 * bool(means.min() < 0.2), 100 + 20 * bool(means.max() > 0.8)), yticks=range(0, 101, 20))
    top.set(ylabel="filters of the layer, %, most tuned lowest")
    top.set_title("How often each filter is the tuned one", loc="left", fontweight="bold")
    top.legend(frameon=True, loc="best", fontsize="small")
    below.imshow(of_class, interpolation="nearest", **shown)
    below.set_yticks(
        range(len(class_names)) if is_named else [], class_names if is_named else [], fontsize="small", parse_math=False
    )
    below.set_ylabel("class" if is_named else f"{len(class_names)} classes")
    below.set_xlabel("layers, in the order of the network")
    step = -(-len(layers) // NAMED)
    ticks = range(0, len(layers), step)
    below.set_xticks(ticks, [layers[tick] for tick in ticks], rotation=90, fontsize="small")
    bar = figure.colorbar(image, ax=[top, below], shrink=0.6)
    bar.set_label("share of images")
    bar.set_ticks([0, 0.5, 1], labels=["0, frozen", "0.5", "1, tuned"])
    return figure


def _column(shares: Shares) -> Shares:
    """Return a layer's filters, the most tuned first, resampled to the height of all columns."""
    column: Shares = np.sort(shares)[::-1][np.arange(HEIGHT) * len(shares) // HEIGHT]
    return column
