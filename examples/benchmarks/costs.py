"""What transfer learning costs beside plain training: ratios, measured in one process and held against bars.

`python examples/benchmarks/costs.py [--quick]`; README.md beside this file says how to read what it prints.
"""

import argparse
import gc
import json
import logging
import platform
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import lightning
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_transfer import Schedule, SoftFinetuning, SourceTask

WARMUP = 3  # steps of a fit that do not count: first allocations, the first source batch, the schedule's way to 0
TARGET_CLASSES, SOURCE_CLASSES, SOURCE_IMAGES = 10, 1000, 256


@dataclass(frozen=True)
class Settings:
    """How much is run; every field is an option of the command line too."""

    repetitions: int = 9
    batch_size: int = 16
    image_size: int = 64
    steps: int = 8  # that count, in a fit of ResNet-18
    empty_steps: int = 300  # that count, in a fit of the empty network


QUICK = Settings(repetitions=5, batch_size=8, steps=5, empty_steps=150)

Run = Callable[[], float]  # runs a variant for a short while and gives its seconds a step
Unit = Literal["x", "us"]
Variants = Callable[[Settings], tuple[Run, Run]]


@dataclass(frozen=True)
class Row:
    """A line of the table: variant A held against variant B, as A / B ("x") or as microseconds on top of B ("us")."""

    name: str
    unit: Unit
    bar: float | None
    variants: Variants

    def compare(self, a: float, b: float) -> float:
        """What one repetition says."""
        return a / b if self.unit == "x" else 1e6 * (a - b)


ROWS: list[Row] = []


def row(name: str, *, unit: Unit = "x", bar: float | None = None) -> Callable[[Variants], Variants]:
    """Enter a function that gives (A, B) as a row of the table."""

    def enter(variants: Variants) -> Variants:
        ROWS.append(Row(name, unit, bar, variants))
        return variants

    return enter


class Classifier(lightning.LightningModule):
    """Anybody's plain project."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on every parameter."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(lightning.Callback):
    """Marks the end of every step; between two marks lies a whole step: loading, hooks, passes, optimizer."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Mark, in CPU time of this process or by an event on the GPU."""
        if pl_module.device.type == "cpu":
            self.marks.append(time.process_time())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def seconds(self) -> float:
        """The median over the steps behind the warm-up."""
        counted = self.marks[WARMUP - 1 :]
        if isinstance(counted[0], float):
            return median(after - before for before, after in pairwise(counted))
        torch.cuda.synchronize()
        return median(before.elapsed_time(after) / 1e3 for before, after in pairwise(counted))


@dataclass(frozen=True)
class Fit:
    """A short `Trainer.fit` of its own, made anew at each call.

    Whole fits are interleaved, not steps: nothing but the user's own `fit` decides what a step does, and no variant
    runs on what the other left in the loop. A fit is short, so that both of a pair meet the same machine.
    """

    network: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch_size: int
    steps: int
    forward: Literal["separate", "joint"] | None = None  # None: without the callback
    annealed: bool = False  # the source weight is 0 in all steps that count
    accelerator: str = "cpu"

    def __call__(self) -> float:
        """Seconds a step."""
        gc.collect()  # of what the run before left
        torch.manual_seed(0)
        num_steps, clock = WARMUP + self.steps, Clock()
        loader = DataLoader(
            self._images(num_steps * self.batch_size, TARGET_CLASSES), batch_size=self.batch_size, shuffle=True
        )
        callbacks: list[lightning.Callback] = [clock]
        if self.forward:
            source = SourceTask(
                self._images(SOURCE_IMAGES, SOURCE_CLASSES), num_classes=SOURCE_CLASSES, forward=self.forward
            )
            until = WARMUP / num_steps if self.annealed else 1.0
            callbacks = [SoftFinetuning(source, weight=Schedule(until=until)), clock]
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator=self.accelerator,
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(self.network()), loader)
        return clock.seconds()

    def _images(self, number: int, classes: int) -> TensorDataset:
        return TensorDataset(torch.rand(number, *self.image), torch.randint(classes, (number,)))


def resnet18(settings: Settings) -> Fit:
    """Plain training of a ResNet-18."""
    return Fit(
        lambda: timm.create_model("resnet18", num_classes=TARGET_CLASSES),
        image=(3, settings.image_size, settings.image_size),
        batch_size=settings.batch_size,
        steps=settings.steps,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
    )


def empty_network(settings: Settings) -> Fit:
    """Plain training with so little to compute that a step is all Trainer; on the CPU, where callbacks run."""
    return Fit(
        lambda: nn.Sequential(OrderedDict(body=nn.Linear(4, 4), fc=nn.Linear(4, TARGET_CLASSES))),
        image=(4,),
        batch_size=settings.batch_size,
        steps=settings.empty_steps,
    )


@row("ResNet-18 step with a source batch, separate / plain step of as many images", bar=1.12)
def separate(settings: Settings) -> tuple[Run, Run]:
    """Two passes of B against one of 2 B."""
    plain = resnet18(settings)
    return replace(plain, forward="separate"), replace(plain, batch_size=2 * plain.batch_size)


@row("ResNet-18 step with a source batch, joint / plain step of as many images", bar=1.03)
def joint(settings: Settings) -> tuple[Run, Run]:
    """One pass of B + B against one of 2 B."""
    plain = resnet18(settings)
    return replace(plain, forward="joint"), replace(plain, batch_size=2 * plain.batch_size)


@row("ResNet-18 step after `until` / plain step", bar=1.01)
def annealed(settings: Settings) -> tuple[Run, Run]:
    """The weight is 0: what is left of the callback."""
    plain = resnet18(settings)
    return replace(plain, forward="separate", annealed=True), plain


@row("Empty network, step after `until` - plain step", unit="us", bar=40.0)
def empty_annealed(settings: Settings) -> tuple[Run, Run]:
    """The callback alone."""
    plain = empty_network(settings)
    return replace(plain, forward="separate", annealed=True), plain


@row("Empty network, step with a source batch - plain step", unit="us")
def empty_separate(settings: Settings) -> tuple[Run, Run]:
    """Drawing and loading a source batch, its pass and its loss, with next to no arithmetic."""
    plain = empty_network(settings)
    return replace(plain, forward="separate"), plain


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """One row: A B A B ..., each pair compared by itself, and the median of what the pairs say."""
    a, b = row.variants(settings)
    pairs = [(a(), b()) for _ in track(range(settings.repetitions), row.name, transient=True)]
    compared = [row.compare(*pair) for pair in pairs]
    value = median(compared)
    passed = None if row.bar is None else value <= row.bar
    result = {"name": row.name, "unit": row.unit, "bar": row.bar, "value": value, "passed": passed}
    return {**result, "compared": compared, "seconds_per_step": pairs}


@contextmanager
def one_quiet_thread() -> Iterator[None]:
    """One thread, so that CPU time is what a step costs; and none of Lightning's remarks between the lines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.disable(logging.NOTSET)


def table(results: list[dict[str, Any]]) -> Table:
    """The rows as they are printed."""
    shown = Table("cost", "median", "lowest .. highest", "bar", "")
    for result in results:
        form = "{:.3f}" if result["unit"] == "x" else "{:+.0f} us"
        value, low, high = (form.format(n) for n in (result["value"], min(result["compared"]), max(result["compared"])))
        bar = "" if result["bar"] is None else "<= " + form.format(result["bar"])
        verdict = {True: "[green]pass", False: "[red]MISS", None: ""}[result["passed"]]
        shown.add_row(result["name"], value, f"{low} .. {high}", bar, verdict)
    return shown


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    """Settings, those of --quick with single ones replaced, and where the numbers go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--out", type=Path, default=Path("costs.json"))
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    given = vars(parser.parse_args(argv))
    settings, out = (QUICK if given.pop("quick") else Settings()), given.pop("out")
    return replace(settings, **{name: value for name, value in given.items() if value is not None}), out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every row, print the table, write and return the numbers."""
    settings, out = parse(argv)
    with one_quiet_thread():
        results = [measure(row, settings) for row in ROWS]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    report = {"versions": versions, "gpu": torch.cuda.is_available(), "settings": asdict(settings), "rows": results}
    out.write_text(json.dumps(report, indent=1))
    Console().print(table(results))
    return report


if __name__ == "__main__":
    main()
