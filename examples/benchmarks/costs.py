"""What transfer learning costs beside plain training: variants interleaved in one process, held against bars.

`python examples/benchmarks/costs.py [--quick] [--wide]`; README.md beside this file says how to read what it prints.
"""

import argparse
import ctypes
import gc
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import faiss
import lightning
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_transfer import Schedule, SoftFinetuning, SourceTask

sys.path.insert(0, str(Path(__file__).parent))  # where this file is run by another
import selection_costs  # noqa: F401  (enters its rows)
from measuring import ROWS, Row, Run, Settings, table
from selection_data import remove_sources

WARMUP = 3  # steps of a fit that do not count: first allocations, the first source batch, the way to weight 0
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
TARGET_CLASSES, SOURCE_CLASSES, SOURCE_IMAGES = 10, 1000, 256


FULL = Settings(scale=1.0)
QUICK = Settings(repetitions=5, steps=4, empty_steps=150, scale=0.25)


class Classifier(lightning.LightningModule):
    """Anybody's plain project."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

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
            event = torch.cuda.Event(enable_timing=True)
            self.marks.append(torch.cuda.current_stream().record_event(event))

    def seconds(self) -> float:
        """The median over the steps behind the warm-up."""
        marks = self.marks[WARMUP - 1 :]
        if not isinstance(marks[0], float):
            torch.cuda.synchronize()
            marks = [marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        return float(median(after - before for before, after in pairwise(marks)))


@dataclass(frozen=True)
class Fit:
    """A short `Trainer.fit`, made anew at each call.

    Whole fits take turns, not the steps of two fits: so each step is exactly the user's own, in a loop that nothing
    else has touched. They are short, so that both of a pair meet the same state of the machine.
    """

    network: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch_size: int
    steps: int
    accelerator: str = "cpu"
    forward: Literal["separate", "joint"] | None = None  # None: without the callback
    annealed: bool = False  # the source weight is 0 in the steps that count

    def __call__(self) -> float:
        """Seconds a step."""
        gc.collect()  # of what the run before left
        torch.manual_seed(0)
        num_steps, clock = WARMUP + self.steps, Clock()
        callbacks: list[lightning.Callback] = [clock]
        if self.forward:
            images = self._images(SOURCE_IMAGES, SOURCE_CLASSES)
            source = SourceTask(images, num_classes=SOURCE_CLASSES, forward=self.forward)
            weight = Schedule(until=WARMUP / num_steps if self.annealed else 1.0)
            callbacks = [SoftFinetuning(source, weight=weight), clock]
        images = self._images(num_steps * self.batch_size, TARGET_CLASSES)
        loader = DataLoader(images, batch_size=self.batch_size, shuffle=True)
        options: Any = {"accelerator": self.accelerator, "devices": 1, **dict.fromkeys(SILENT, False)}
        lightning.Trainer(max_epochs=1, callbacks=callbacks, **options).fit(Classifier(self.network()), loader)
        return clock.seconds()

    def _images(self, number: int, classes: int) -> TensorDataset:
        return TensorDataset(torch.rand(number, *self.image), torch.randint(classes, (number,)))


def resnet18(settings: Settings) -> Fit:
    """Plain training of a ResNet-18, on the GPU if there is one."""
    network = partial(timm.create_model, "resnet18", num_classes=TARGET_CLASSES)
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    return Fit(network, (3, 64, 64), settings.batch_size, settings.steps, accelerator)


def empty_network(settings: Settings) -> Fit:
    """Plain training with next to nothing to compute, so that a step is all Trainer; on the CPU, like every hook."""
    network = lambda: nn.Sequential(OrderedDict(body=nn.Linear(4, 4), fc=nn.Linear(4, TARGET_CLASSES)))  # noqa: E731
    return Fit(network, (4,), settings.batch_size, settings.empty_steps)


@Row("ResNet-18, source batch in a separate pass / plain step of as many images", bar=1.12)
def separate(settings: Settings) -> tuple[Run, Run]:
    """Two passes of B against one of 2 B."""
    plain = resnet18(settings)
    return replace(plain, forward="separate"), replace(plain, batch_size=2 * plain.batch_size)


@Row("ResNet-18, source batch in a joint pass / plain step of as many images", bar=1.03)
def joint(settings: Settings) -> tuple[Run, Run]:
    """One pass of B + B against one of 2 B."""
    plain = resnet18(settings)
    return replace(plain, forward="joint"), replace(plain, batch_size=2 * plain.batch_size)


@Row("ResNet-18, source weight at 0 / plain step", bar=1.01)
def annealed(settings: Settings) -> tuple[Run, Run]:
    """What is left when the source is annealed away."""
    plain = resnet18(settings)
    return replace(plain, forward="separate", annealed=True), plain


@Row("Empty network, source weight at 0 - plain step", unit="us", bar=40.0)
def empty_annealed(settings: Settings) -> tuple[Run, Run]:
    """The callback itself."""
    plain = empty_network(settings)
    return replace(plain, forward="separate", annealed=True), plain


@Row("Empty network, with a source batch - plain step", unit="us")
def empty_separate(settings: Settings) -> tuple[Run, Run]:
    """Drawing and loading a source batch, one more pass and one more loss, each without arithmetic to speak of."""
    plain = empty_network(settings)
    return replace(plain, forward="separate"), plain


def main(argv: Sequence[str] | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Measure every row, print the table, write and return the numbers; `settings` go before --quick and --wide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument(
        "--wide", action="store_true", help="also the widest descriptors: a quarter of an hour, 5 GB of disk"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only rows that have these words in their names")
    parser.add_argument("--out", type=Path, default=Path("costs.json"))
    args = parser.parse_args(argv)
    settings = settings or replace(QUICK if args.quick else FULL, wide=args.wide)
    rows = [row for row in ROWS if args.only in row.name and (settings.wide or row.size != "wide")]
    with ExitStack() as undo, warnings.catch_warnings():
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # CPU time is then what a step costs
        undo.callback(faiss.omp_set_num_threads, faiss.omp_get_max_threads())
        faiss.omp_set_num_threads(1)
        undo.callback(logging.disable, logging.NOTSET)
        logging.disable(logging.WARNING)  # Lightning's remarks on every fit
        warnings.filterwarnings("ignore", module=r"lightning\.")
        settings = replace(settings, folder=undo.enter_context(tempfile.TemporaryDirectory()))
        undo.callback(remove_sources)
        results = [row.measure(settings) for row in rows]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    report = {"versions": versions, "gpu": torch.cuda.is_available(), "settings": asdict(settings), "rows": results}
    args.out.write_text(json.dumps(report, indent=1))
    Console().print(table(results))
    return report


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees; else page faults tell what ran before, not what runs."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # the thresholds of trimming and of mmap
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


if __name__ == "__main__":
    keep_freed_memory()
    main()
