"""Measure when each method helps in the papers' regime: ImageNet network, photographs at 112 pixels, few labels.

Training is long enough for plain fine-tuning to be finished. A cell is one training: of a row, on a target, at two
learning rates, with a seed. A worker takes the next missing cell, the most informative first. The rates of a row are
chosen on a validation part, with a seed that is used for nothing else, at ten images of a class and the usual length;
then come the seeds that count. Finished cells are files in --out or committed results. If interrupted, a worker resumes
with the same command; several workers can share one folder.

    python examples/benchmarks/regime.py --data FOLDER --network tf_efficientnet_lite0 --weights FILE --out FOLDER
    python examples/benchmarks/regime.py --out FOLDER --gather    # what is finished, into results/
    python examples/benchmarks/regime.py --out FOLDER --list      # what is missing
"""

import argparse
import fcntl
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from regime_data import TARGETS, source, target
from regime_network import Rates, pretrained
from regime_rows import ROWS, Setting
from regime_training import train, wait

PROTOCOL = 1  # of everything that a cell depends on; cells of another protocol are not read
RESULTS = Path(__file__).with_name("results")
PACKAGES = ("lightning_transfer", "torch", "lightning", "timm", "numpy", "scikit-learn")
TUNING_SEED = 0
BODY, TIMES = (0.001, 0.003, 0.01, 0.03, 0.1), (1.0, 10.0)  # the grid: the backbone's rate, its multiple for the head
SHOTS = 10  # images of a class; rates are chosen with so many
SEEDS_FIRST = 3  # seeds of every row, before any row has more
TIERS = 3, 11  # the first 3 rows are measured on all targets, then the next 8, then the others
STEPS = {  # of training, by target and images of a class; 0 for all of them
    "flowers": {10: 750, 5: 450, 0: 750},
    "dtd10": {10: 450, 5: 300, 0: 600},
    "scenes15": {10: 450, 5: 300, 0: 750},
    "trashnet": {10: 300, 5: 300, 0: 450},
    "rsscn7": {10: 300, 5: 300, 0: 500},
    "brainmri": {10: 300, 5: 300, 0: 400},
}
Cell = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A cell that can be measured.

    Attributes:
        row: what is measured.
        target: on what.
        shots: images of a class.
        steps: of training.
        rates: of the backbone and the head; None for the linear probe.
        seed: of the draw, the head and the order of images.
    """

    row: str
    target: str
    shots: int
    steps: int
    rates: Rates | None
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its file."""
        rates = "" if self.rates is None else f"-{self.rates.body:g}x{self.rates.times:g}"
        words = self.row.replace(", ", "-").replace(" ", "_")
        return f"{self.target}-{self.shots}-{self.steps}-{words}{rates}-{self.seed}"

    @property
    def is_final(self) -> bool:
        """Return whether it counts; otherwise it chooses rates."""
        return self.seed != TUNING_SEED

    def described(self) -> Cell:
        """Return its attributes as its file has them."""
        return {**vars(self), "protocol": PROTOCOL}


@dataclass(frozen=True)
class Plan:
    """What is measured, and with what.

    Attributes:
        data: folder of .npz files.
        networks: names of the network and of the second one, with their weights.
        out: where cells are kept.
        rows: in this order.
        targets: in this order.
        shots: in this order.
        seeds: the number of seeds that count.
        steps: replaces the table's.
        device: trains on it.
        stop: measuring waits as long as this file exists.
    """

    data: Path
    networks: tuple[tuple[str, Path | None], tuple[str, Path | None]]
    out: Path
    rows: tuple[str, ...] = tuple(ROWS)
    targets: tuple[str, ...] = TARGETS
    shots: tuple[int, ...] = (SHOTS,)
    seeds: int = 5
    steps: int | None = None
    device: str = "cpu"
    stop: Path | None = None


def next_rates(known: dict[Rates, float]) -> Rates | None:
    """Return the cell of the grid to measure next, by one rule for every row; None if the choice is made.

    The first is the backbone's middle rate at the usual ratio of ten. As long as the best cell has a neighbor in the
    grid that is not measured, that is the next: those of another rate first, then that of the other ratio.

    >>> next_rates({})
    Rates(body=0.01, times=10.0)
    >>> next_rates({Rates(0.01, 10.0): 0.5, Rates(0.003, 10.0): 0.4, Rates(0.03, 10.0): 0.3})
    Rates(body=0.01, times=1.0)
    """
    if not known:
        return Rates(0.01, 10.0)
    best = chosen(known)
    place = BODY.index(best.body)
    near = [Rates(body, best.times) for body in BODY[max(0, place - 1) : place + 2]]
    near += [Rates(best.body, times) for times in TIMES]
    return next((rates for rates in near if rates not in known), None)


def chosen(known: dict[Rates, float]) -> Rates:
    """Return the best rates by validation accuracy; of equals the first in the grid's order."""
    return max(sorted(known), key=known.__getitem__)


def finished(plan: Plan) -> dict[str, Cell]:
    """Read all cells of this protocol by name, from the committed results and from the folder."""
    found = {name_of(cell): cell for cell in committed()}
    for path in sorted((plan.out / "cells").glob("*.json")):
        cell = read_cell(path)
        if cell["protocol"] == PROTOCOL:
            found[name_of(cell)] = cell
    return found


@cache
def read_cell(path: Path) -> Cell:
    """Read a cell, which never changes once it is there."""
    cell: Cell = json.loads(path.read_text())
    return cell


@cache
def committed() -> tuple[Cell, ...]:
    """Read the cells of this protocol that results/ has."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("regime-*.json"))]
    return tuple(cell for report in reports for cell in report["cells"] if cell["protocol"] == PROTOCOL)


def name_of(cell: Cell) -> str:
    """Return the name of a cell."""
    rates = None if cell["rates"] is None else Rates(*cell["rates"])
    return Job(cell["row"], cell["target"], cell["shots"], cell["steps"], rates, cell["seed"]).name


def missing(plan: Plan, cells: dict[str, Cell]) -> Iterator[Job]:
    """Yield what can be measured now, the most informative first."""
    tiers = [plan.rows[low:high] for low, high in pairwise((0, *TIERS, len(ROWS)))]
    few_and_all = sorted({min(SEEDS_FIRST, plan.seeds), plan.seeds})
    for shots, seeds, tier, name in product(plan.shots, few_and_all, tiers, plan.targets):
        for row in tier:
            yield from of_row(plan, cells, row, name, shots, seeds)


def of_row(plan: Plan, cells: dict[str, Cell], row: str, name: str, shots: int, seeds: int) -> Iterator[Job]:
    """Yield what is missing of a row on a target: the next cell of the choice of its rates, or the seeds that count."""
    steps, rates = plan.steps or STEPS[name][shots], None
    if ROWS[row].is_trained:
        tuned = ROWS[row].tuned_as or row
        known = tuning(cells, tuned, name)
        if wanted := next_rates(known):
            yield tuning_job(tuned, name, wanted)
            return
        rates = chosen(known)
    finals = [Job(row, name, shots, steps, rates, seed) for seed in range(1, seeds + 1)]
    yield from (job for job in finals if job.name not in cells)


def tuning(cells: dict[str, Cell], row: str, name: str) -> dict[Rates, float]:
    """Return the validation accuracies that rates are chosen by."""
    jobs = {rates: tuning_job(row, name, rates).name for rates in (Rates(*each) for each in product(BODY, TIMES))}
    return {rates: float(cells[job]["validation"]) for rates, job in jobs.items() if job in cells}


def tuning_job(row: str, name: str, rates: Rates) -> Job:
    """Return the cell that tries rates."""
    return Job(row, name, SHOTS, STEPS[name][SHOTS], rates, TUNING_SEED)


@contextmanager
def claimed(plan: Plan, job: Job) -> Iterator[bool]:
    """Lock a cell for as long as this process lives; yields whether no other worker has it."""
    with (plan.out / "claims" / job.name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def work(plan: Plan) -> None:
    """Measure what is missing, until nothing is."""
    be_quiet()
    is_busy = True
    while is_busy:
        is_busy = False
        for job in missing(plan, finished(plan)):
            with claimed(plan, job) as is_mine:
                if is_mine and not cell_path(plan, job).exists():
                    wait(plan.stop)
                    cell = measure(plan, job)
                    shown = f"{cell['validation']:.1%}" + (f", test {cell['test']:.1%}" if job.is_final else "")
                    print(f"{job.name}: validation {shown}; {cell['seconds']:.0f} s", flush=True)
                    is_busy = True
            if is_busy:
                break


def cell_path(plan: Plan, job: Job) -> Path:
    """Return where a cell is kept."""
    return plan.out / "cells" / f"{job.name}-p{PROTOCOL}.json"


def measure(plan: Plan, job: Job) -> Cell:
    """Measure a cell and write it down, whole or not at all."""
    found = train(
        ROWS[job.row],
        setting(plan, job),
        seed=job.seed,
        rates=job.rates,
        is_final=job.is_final,
        device=plan.device,
        stop=plan.stop,
    )
    cell, path = {**job.described(), **found}, cell_path(plan, job)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(cell))
    part.replace(path)
    return cell


def setting(plan: Plan, job: Job) -> Setting:
    """Return the inputs of a cell's training."""
    network, second = plan.networks
    draw = target(job.target, plan.data, shots=job.shots, seed=job.seed)
    images, made = source(plan.data), plan.out / "made"
    return Setting(draw, images, of_timm(*network), partial(of_timm, *second), made, job.steps)


of_timm = cache(pretrained)


def be_quiet() -> None:
    """Use one thread and silence Lightning."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def gather(plan: Plan) -> None:
    """Write what is finished into results/, a file for each target."""
    cells = finished(plan)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    settings = {"networks": [name for name, _ in plan.networks], "device": plan.device}
    for name in TARGETS:
        path = RESULTS / f"regime-{name}.json"
        mine = [cell for _, cell in sorted(cells.items()) if cell["target"] == name]
        before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": [], "settings": {}}
        if mine != before["cells"]:  # of several machines all are named
            kinds = dict.fromkeys(filter(None, [*before["settings"].get("machine", "").split("; "), machine()]))
            report = {"versions": versions, "settings": {**settings, "machine": "; ".join(kinds)}}
            lines = json.dumps({**report, "cells": [{"target": name, **cell} for cell in mine]})
            path.write_text(lines.replace(', {"target": ', ',\n{"target": ') + "\n")  # short diffs


def machine() -> str:
    """Return the kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, one thread"


def planned(argv: Sequence[str] | None) -> tuple[Plan, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npz files")
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="of timm: %(default)s")
    parser.add_argument("--weights", type=Path, help="its state dict; by default timm loads its own")
    parser.add_argument("--second", default="tf_efficientnet_lite1", help="of timm, for two networks: %(default)s")
    parser.add_argument("--second-weights", type=Path, help="its state dict")
    parser.add_argument("--out", type=Path, default=Path("regime_runs"), help="for finished cells: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="ROW", help="in this order")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET", help="in order")
    parser.add_argument(
        "--shots", nargs="+", type=int, choices=(SHOTS, 5, 0), default=[SHOTS], help="0 for all: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each row that count: %(default)s")
    parser.add_argument("--steps", type=int, help="of training; by default the table's")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--stop", type=Path, help="a file; measuring waits as long as it exists")
    parser.add_argument("--gather", action="store_true", help="write what is finished into results/ and exit")
    parser.add_argument("--list", action="store_true", help="print what is missing and exit")
    options = parser.parse_args(argv)
    if options.data is None and not (options.gather or options.list):
        parser.error("--data is missing: the folder of .npz files")
    networks = ((options.network, options.weights), (options.second, options.second_weights))
    sizes = tuple(options.rows), tuple(options.targets), tuple(options.shots), options.seeds, options.steps
    return Plan(options.data, networks, options.out, *sizes, options.device, options.stop), options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, gather or list."""
    plan, options = planned(argv)
    for folder in ("cells", "claims", "made"):
        (plan.out / folder).mkdir(parents=True, exist_ok=True)
    if options.gather:
        gather(plan)
    elif options.list:
        print("\n".join(job.name for job in missing(plan, finished(plan))))
    else:
        work(plan)


if __name__ == "__main__":
    main()
