"""Show a run as one HTML page: what each method did, its losses, what was borrowed."""

import base64
import csv
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_transfer.datasets import known_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.naming import a_class
from lightning_transfer.reports.curves import COLORS, empty_figure, png_of, printable
from lightning_transfer.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTIONS = "transfer/"  # what the names of logged options and values begin with
SHARES = "weights and shares"
STYLES = ("-", "--", ":", "-.")
FEW = 4  # lines of one kind, such as one for each layer, that are drawn each
DRAWN = 1e300  # a larger value has no place on an axis, whose margins are beyond what a float holds
SHARE = 1.001  # a larger value is not a rounded share
MOST = 0.5  # share of a selection from which one class is said to give most of it (ours)
STYLE = """
:root { color-scheme: light dark; --ink: #2e3440; --paper: #ffffff; --line: #d8dee9; --soft: #5b6678; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9f0; --paper: #22262e; --line: #434c5e; --soft: #a3adbf; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 0 auto; padding: 1rem 1.2rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; font-weight: normal; }
.options { columns: 18rem; } th { color: var(--soft); } td.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; background: #ffffff; border-radius: 4px; } p.note { color: var(--soft); }
p.warning { border-left: 4px solid #d08770; padding-left: .8rem; }
"""

Series = dict[str, tuple[list[float], list[float]]]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads a tag of Python, such as that of a path or a class, as None: no object is built."""


_Loader.add_constructor(None, lambda loader, node: None)


class TransferReport:
    r"""Shows a run as a page, from the folder that Lightning's `CSVLogger` wrote.

    Args:
        folder: with `metrics.csv` and `hparams.yaml`, such as `trainer.logger.log_dir`.
        selection: `callback.selection` of a SelectiveJointFinetuning, or `Selection.load(path)`.
        pictures: figures or PNG files, by title, such as `selection.report`, `reports.gate_map` and
            `reports.layer_search` return or write.

    Raises:
        TransferConfigError: the folder holds no metrics, or they cannot be read; `selection` is not a Selection.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("step,train_loss\n0,1.5\n1,1.0\n")
        >>> TransferReport(folder).save(folder / "run.html")
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        selection: Any = None,
        pictures: "Mapping[str, Figure | str | os.PathLike[str]] | None" = None,
    ) -> None:
        if selection is not None and not hasattr(selection, "source_labels"):
            raise TransferConfigError(
                f"selection= is {reprlib.repr(selection)}; expected a Selection. Pass callback.selection, or "
                "Selection.load(path)."
            )
        self.folder, self.selection, self.pictures = Path(folder), selection, dict(pictures or {})
        runs = sorted(path.parent for path in self.folder.glob("*/metrics.csv"))
        if runs and not (self.folder / "metrics.csv").exists():
            raise TransferConfigError(
                f"{self.folder} holds {len(runs)} runs. Name one, such as the last: {printable(runs[-1])}."
            )
        # Lightning's own folder says nothing about a run
        parts = [part for part in self.folder.resolve().parts if part != "lightning_logs"]
        self.name = "/".join(parts[-2:])
        self.series = _series(self.folder / "metrics.csv")
        self.options = _options(self.folder / "hparams.yaml")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, which needs no other file.

        Raises:
            TransferConfigError: it cannot be written there, or the name is not of a page.
        """
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise TransferConfigError(f"{printable(path)} is not the name of a page. Let it end in .html.")
        page = "\n".join(self._page()).encode("utf-8")
        write_atomically(path, lambda file: file.write(page), what="the report", fix="Pass another path.")

    def _repr_html_(self) -> str:
        return "\n".join(self._content())

    def _page(self) -> Iterator[str]:
        yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
        yield f"<title>{_text(self.name)}</title><style>{STYLE}</style></head><body>"
        yield from self._content()
        yield "</body></html>"

    def _content(self) -> Iterator[str]:
        yield f"<h1>Transfer report: {_text(self.name)}</h1>"
        yield f'<p class="note">{_text(self.folder)}, lightning_transfer {__version__}</p>'
        yield from self._methods()
        if panels := _panels(self.series):
            yield f"<h2>Training</h2>{_image(_curves(panels), 'Losses, accuracies and weights by optimizer step')}"
        yield from self._last()
        if self.selection is not None:
            yield from _borrowed(self.selection)
        for title, figure in self.pictures.items():
            yield f"<h2>{_text(title)}</h2>{_image(figure, title)}"

    def _methods(self) -> Iterator[str]:
        yield "<h2>Methods</h2>"
        if not self.options:
            yield "<p>The run logged no options of lightning_transfer's callbacks: plain fine-tuning, or no logger.</p>"
        for name, options in self.options.items():
            yield f'<h3>{_text(name)}</h3><div class="options"><table>'
            for key, value in options.items():
                yield f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>"
            yield "</table></div>"

    def _last(self) -> Iterator[str]:
        yield "<h2>Values</h2><table><tr><th>name</th><th>last</th><th>least</th><th>most</th></tr>"
        for name, (_, values) in sorted(self.series.items()):
            known = [value for value in values if math.isfinite(value)] or [math.nan]
            cells = "".join(f'<td class="number">{value:.4g}</td>' for value in (values[-1], min(known), max(known)))
            yield f"<tr><td>{_text(name)}</td>{cells}</tr>"
        yield "</table>"
        for name, (steps, values) in self.series.items():
            if bad := [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]:
                yield f'<p class="warning">{_text(name)} is not finite at step {bad[0]} for the first time.</p>'


def _series(path: Path) -> Series:
    """Return steps and values by the name of each column."""
    found: Series = {}
    fix = "Train with Trainer(logger=CSVLogger('logs')), and name its folder, such as logs/lightning_logs/version_0."
    if not path.exists():
        raise TransferConfigError(f"There is no file of metrics at {path}. {fix}")
    with reading(path, what="file of metrics", fix=fix):
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in _rows(file):
                step = row.pop("step", "").strip()
                for name, value in row.items():
                    if name != "epoch" and value.strip():
                        steps, values = found.setdefault(name, ([], []))
                        steps.append(int(float(step)) if step else math.nan)
                        values.append(float(value))
        if not found:
            raise TransferConfigError(f"{path} holds no values. Log some, or name the folder of another run.")
    return found


def _rows(file: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of one or several appended files, each with its own header; a last row may be incomplete."""
    names: list[str] = []
    for row in csv.reader(file):
        if not names or row == names or "step" in row:
            names = row
        elif len(row) > len(names):
            raise ValueError(f"a row has {len(row)} values, and its header {len(names)} names")
        else:
            yield dict(zip(names, row, strict=False))


def _options(path: Path) -> dict[str, dict[str, Any]]:
    """Return the options of each callback that were logged, without those that are None."""
    if not path.exists():
        return {}
    with reading(path, what="file of hyperparameters", fix="Name the folder of another run."):
        logged = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        if not isinstance(logged, dict):
            raise TransferConfigError(
                f"{path} holds {a_class(logged)}; expected hyperparameters by name. Name the folder of another run."
            )
    found: dict[str, dict[str, Any]] = {}
    for key, value in logged.items():
        if isinstance(key, str) and key.startswith(OPTIONS) and value is not None:
            name, _, option = key.removeprefix(OPTIONS).partition("/")
            found.setdefault(name, {})[option.replace("/", ".")] = value
    return found


def _panels(series: Series) -> dict[str, Series]:
    """Return what is drawn together: losses, accuracies, and other values of this package, those above 1 apart."""
    kinds = {name: next((kind for kind in ("loss", "acc") if kind in name.lower()), "") for name in series}
    for name, (_, values) in series.items():
        if not kinds[name] and name.startswith(OPTIONS):
            kinds[name] = "large" if any(abs(value) > SHARE for value in values) else "other"
    titles = {"loss": "loss", "acc": "accuracy", "other": SHARES, "large": "larger values"}
    panels = {title: {name: series[name] for name in series if kinds[name] == kind} for kind, title in titles.items()}
    return {title: inside for title, inside in panels.items() if inside}


def _labels(inside: Series) -> dict[str, str]:
    """Return the lines to draw, and their labels: of many of one kind those of the least and the largest mean."""
    labels = {name: printable(name.removeprefix(OPTIONS)) for name in inside}
    of_kind: dict[str, list[str]] = {}
    for name, label in labels.items():
        if name.startswith(OPTIONS) and "/" in label:
            of_kind.setdefault(label.partition("/")[0], []).append(name)
    for kind, names in of_kind.items():
        if len(names) > FEW:
            least, *others, most = sorted(names, key=lambda name: _mean(inside[name][1]))
            labels = {name: label for name, label in labels.items() if name not in others}
            labels[least] += f", least of {len(names)}"
            labels[most] += f", most of {len(names)}"
            if (mean := OPTIONS + kind) in labels:
                labels[mean] += ", mean"
    return labels


def _mean(values: list[float]) -> float:
    """Return the mean of what is finite; of a run that diverged, NaN would be in no order."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / max(1, len(finite))


def _curves(panels: dict[str, Series]) -> "Figure":
    figure = empty_figure(size=(8, 0.6 + 2.4 * len(panels)))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, inside) in zip(rows, panels.items(), strict=True):
        labels = _labels(inside)
        drawn: list[tuple[list[float], list[float]]] = []
        for number, name in enumerate(labels):
            steps, values = inside[name]
            shown = [value if abs(value) < DRAWN else math.nan for value in values]
            # a solid line would hide an equal one, and colours come again
            style = STYLES[(drawn.count((steps, values)) + number // len(COLORS)) % len(STYLES)]
            drawn.append((steps, values))
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, shown, style, color=color, marker="o", markersize=2, linewidth=1.5)
        axes.set_ylabel(title)
        if title == SHARES:  # otherwise a weight that never changes is drawn in the middle of hundredths
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        columns = max(1, min(4, 90 // (8 + max(map(len, labels.values())))))  # about 90 letters fit side by side
        legend = axes.legend(axes.lines, [""] * len(labels), frameon=False, fontsize="small", ncols=columns, **place)
        for text, label in zip(legend.get_texts(), labels.values(), strict=True):
            text.set(text=label, parse_math=False)  # otherwise "$" is math, and "_" hides a name
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    rows[-1].set_xlabel("optimizer steps")
    figure.align_ylabels()
    return figure


def _borrowed(selection: Any) -> Iterator[str]:
    """Yield what was borrowed in numbers, and what to look at in it."""
    images = selection.indices.unique()
    labels = selection.source_labels[selection.indices].flatten()
    yield f"<h2>Borrowed source images</h2><p>{_text(selection)}</p>"
    known = labels[labels >= 0]
    if len(known):
        classes, counts = known.unique(return_counts=True)
        share, place = counts.max().item() / len(labels), int(classes[counts.argmax()])
        name = _text(dict(enumerate(known_names(selection.source) or ())).get(place, place))
        yield f"<p>Of {len(classes):,} classes; the most, {share:.0%} of all entries, are of class {name}.</p>"
        if share > MOST and len(selection.source_labels.unique()) > 2:
            yield (
                f'<p class="warning">One class, {name}, gives most of what is borrowed: look whether your images have '
                "a colour or a border in common with it.</p>"
            )
    for count, what in (
        (len(selection.duplicates), "pairs of a target and a source image show the same"),
        (len(selection.dropped[:, 1].unique()), "source images were left out, because they show a protected image"),
        (len(selection.unreadable), "source images could not be read"),
    ):
        if count:
            yield f'<p class="warning">{count:,} {what}.</p>'
    yield f'<p class="note">{len(images):,} different source images in lists of {selection.indices.shape[1]:,}.</p>'


def _image(picture: Any, title: str) -> str:
    """Return a figure or a PNG file as a part of a page."""
    return f'<img alt="{_text(title)}" src="data:image/png;base64,{base64.b64encode(png_of(picture)).decode()}">'


def _text(thing: object) -> str:
    return escape(printable(thing))
