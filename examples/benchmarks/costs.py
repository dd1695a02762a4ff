"""Measure what transfer learning costs compared with plain training, by interleaved variants, each against a bar.

`python examples/benchmarks/costs.py [--quick] [--wide]`; costs.md beside this file explains its output.
"""

import argparse
import ctypes
import json
import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import lightning
import torch
from rich.console import Console

from lightning_transfer import Schedule, SoftFinetuning, SourceTask

sys.path.insert(0, str(Path(__file__).parent))  # if another file runs this one
import collaborative_costs  # noqa: F401  (enters its rows)
import gating_costs  # noqa: F401
import peers  # noqa: F401
import selection_costs  # noqa: F401
from fits import WARMUP, Fit, empty_network, pictures, resnet18
from measuring import ROWS, Row, Run, Settings, table
from selection_data import remove_sources

SOURCE_CLASSES, SOURCE_IMAGES = 1000, 256


FULL = Settings(scale=1.0)
QUICK = Settings(repetitions=5, steps=2, empty_steps=150, scale=0.1)


def with_source(plain: Fit, forward: Literal["separate", "joint"], *, annealed: bool = False) -> Fit:
    """Add a source task to a fit; if it is annealed, its weight is 0 in the steps that count."""

    def callbacks(num_steps: int) -> list[lightning.Callback]:
        images = pictures(SOURCE_IMAGES, plain.image, SOURCE_CLASSES)
        source = SourceTask(images, num_classes=SOURCE_CLASSES, forward=forward)
        return [SoftFinetuning(source, weight=Schedule(until=WARMUP / num_steps if annealed else 1.0))]

    return replace(plain, callbacks=callbacks)


@Row("ResNet-18, source batch in a separate pass / plain step of as many images", bar=1.12)
def separate(settings: Settings) -> tuple[Run, Run]:
    """Compare two passes of B images with one of 2 B."""
    plain = resnet18(settings)
    return with_source(plain, "separate"), replace(plain, batch_size=2 * plain.batch_size)


@Row("ResNet-18, source batch in a joint pass / plain step of as many images", bar=1.03, is_slow=True)
def joint(settings: Settings) -> tuple[Run, Run]:
    """Compare one pass of B + B images with one of 2 B."""
    plain = resnet18(settings)
    return with_source(plain, "joint"), replace(plain, batch_size=2 * plain.batch_size)


@Row("ResNet-18, source weight at 0 / plain step", bar=1.01)
def annealed(settings: Settings) -> tuple[Run, Run]:
    """Measure what remains after the source is annealed away."""
    plain = resnet18(settings)
    return with_source(plain, "separate", annealed=True), plain


@Row("Empty network, source weight at 0 - plain step", unit="us", bar=40.0)
def empty_annealed(settings: Settings) -> tuple[Run, Run]:
    """Measure the callback itself."""
    plain = empty_network(settings)
    return with_source(plain, "separate", annealed=True), plain


@Row("Empty network, 32 + 32 images, source batch in a separate pass - plain step of 64", unit="us", bar=500.0)
def empty_separate(settings: Settings) -> tuple[Run, Run]:
    """Measure drawing and loading a source batch, one more pass and one more loss, with almost no arithmetic."""
    plain = replace(empty_network(settings), batch_size=64)
    return with_source(replace(plain, batch_size=32), "separate"), plain


def main(argv: Sequence[str] | None = None, settings: Settings | None = None) -> dict[str, Any]:
    """Measure every row, print the table, write and return the numbers; `settings` override --quick and --wide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes, without the slowest rows")
    parser.add_argument(
        "--wide", action="store_true", help="also the widest descriptors: a quarter of an hour, 5 GB of disk"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only rows that have these words in their names")
    parser.add_argument("--out", type=Path, default=Path("costs.json"), help="the report: %(default)s")
    args = parser.parse_args(argv)
    settings = settings or replace(QUICK if args.quick else FULL, wide=args.wide)
    named = [row for row in ROWS if args.only in row.name]
    rows = [row for row in named if (settings.wide or row.size != "wide") and not (args.quick and row.is_slow)]
    if named and not rows:
        parser.error(f"{named[0].name} runs only {'with --wide' if named[0].size == 'wide' else 'without --quick'}")
    if not rows:
        parser.error(f"no row has {args.only!r} in its name; the rows are: {'; '.join(row.name for row in ROWS)}")
    with ExitStack() as undo, warnings.catch_warnings():
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # CPU time is then what a step costs
        undo.callback(faiss.omp_set_num_threads, faiss.omp_get_max_threads())
        faiss.omp_set_num_threads(1)
        undo.callback(logging.disable, logging.NOTSET)
        logging.disable(logging.WARNING)  # Lightning's messages on every fit
        warnings.filterwarnings("ignore", module=r"lightning\.")
        settings = replace(settings, folder=undo.enter_context(tempfile.TemporaryDirectory()))
        undo.callback(remove_sources)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
        results: list[dict[str, Any]] = []
        machine = {"gpu": torch.cuda.is_available(), "instructions": torch.backends.cpu.get_cpu_capability()}
        sizes = {name: value for name, value in asdict(settings).items() if name != "folder"}
        about = {"versions": versions, **machine, "settings": sizes}
        for row in rows:  # written at once: kept if the rest is interrupted
            results.append(row.measure(settings))
            report = {**about, "is_complete": len(results) == len(rows), "rows": results}
            args.out.write_text(json.dumps(report, indent=1))
    Console().print(table(results))
    return report


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees; otherwise page faults depend on what ran before."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # the thresholds of trimming and of mmap
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


if __name__ == "__main__":
    keep_freed_memory()
    main()
