"""Measure when each method helps: on targets near and far, against baselines that are tuned as much.

Networks are pretrained on 80 classes of CIFAR-100. Targets are its other 20 classes (near), trashnet (middle), and
gtsrb and signdigits (far). Every row has the same grid of learning rates (combinations take borrowing's choice), chosen
on a part of the training split with a seed that is used for nothing else. Steps, new heads and images are the same. The
test split is read once for each cell. Finished cells are kept, and an interrupted run resumes.

    python examples/benchmarks/transfer.py --data FOLDER          # all of it: hours
    python examples/benchmarks/transfer.py --data FOLDER --quick  # three rows, near and far, two seeds: minutes
"""

import argparse
import json
import logging
import os
import platform
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transfer_data import NEAR, Pictures, check_there, load, relatives, set_of, source, target
from transfer_networks import PRECISION, QUIET, Classifier, accuracy, small_resnet
from transfer_rows import EVERY, ROWS, Setting
from transfer_training import LOOKS, train

RATES = (0.003, 0.01, 0.03, 0.1)
BEYOND = {0.003: 0.001, 0.1: 0.3}
TARGETS = ("near", "trashnet", "signdigits", "gtsrb")
QUICK = {"rows": ["fine-tuning", "soft", "gated transfer"], "targets": ["near", "signdigits"], "seeds": 2}
TUNING_SEED = 0
INTERRUPTS_IGNORED = (signal.SIGINT, signal.SIG_IGN)  # by workers: the main process ends them
PACKAGES = ("lightning_transfer", "torch", "lightning", "timm", "numpy")
NETWORKS, PRETRAINING_LR, PRETRAINING_BATCH = 2, 0.2, 128


@dataclass(frozen=True)
class Plan:
    """What is run, and where its results are kept.

    Attributes:
        data: folder of .npz files; None for torchvision's.
        work: where networks, selections and finished cells are kept.
        shots: images of each class; None for all.
        steps: of plain fine-tuning.
        epochs: of pretraining.
        seeds: final runs of each row.
        rates: an earlier report, whose learning rates are used; without it they are chosen.
    """

    data: Path | None
    work: Path
    shots: int | None = 10
    steps: int = 600
    epochs: int = 12
    seeds: int = 5
    rates: Path | None = None

    @property
    def networks(self) -> list[Path]:
        """Return the files of the pretrained networks."""
        return [self.work / f"network{number}-{self.epochs}-{PRECISION}.pt" for number in range(NETWORKS)]

    @property
    def cells(self) -> Path:
        """Return the folder of finished trainings of these networks."""
        return self.work / f"cells-{self.epochs}-{PRECISION}"


def pretrain(plan: Plan, number: int) -> str:
    """Pretrain one of the networks, unless its file exists."""
    be_quiet()
    path = plan.networks[number]
    if path.exists():
        return f"{path.name} was there"
    images, unseen = source(plan.data)
    torch.manual_seed(number)
    module = Classifier(small_resnet(int(images.targets.max()) + 1), PRETRAINING_LR)
    augmented = Pictures(images.pixels, images.targets, augmented=True, mirrored=True)
    loader = DataLoader(augmented, batch_size=PRETRAINING_BATCH, shuffle=True, drop_last=True)
    steps = plan.epochs * len(loader)
    warm_up = torch.optim.lr_scheduler.OneCycleLR

    class Pretraining(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
            schedule = {"scheduler": warm_up(optimizer, self.lr, total_steps=steps), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    module.__class__ = Pretraining
    L.Trainer(max_epochs=plan.epochs, **QUIET).fit(module, loader)
    right = accuracy(module.model, unseen)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save({"weights": module.model.state_dict(), "test accuracy": right}, part)
    part.replace(path)
    return f"{path.name}: {right:.1%} of the source's test images"


@cache
def material(plan: Plan) -> tuple[Pictures, list[torch.nn.Module], Pictures]:
    """Load source images, networks, and images of classes that no pretraining has shown; once a process."""
    images, _ = source(plan.data)
    networks: list[torch.nn.Module] = []
    for path in plan.networks:
        network = small_resnet(int(images.targets.max()) + 1)
        network.load_state_dict(torch.load(path, weights_only=True)["weights"])
        networks.append(network)
    return images, networks, load("cifar100", plan.data)[1].of_classes(NEAR)


def run_row(plan: Plan, row: str, name: str) -> str:
    """Choose a row's learning rate, then do its final runs; what is finished is not run again."""
    be_quiet()
    tuned = EVERY[row].tuned_as or row
    best = earlier_rate(plan, tuned, name) or chosen_rate(
        lambda lr: float(cell(plan, tuned, name, seed=TUNING_SEED, lr=lr)["validation"])
    )
    if plan.rates is None:
        cell(plan, row, name, seed=TUNING_SEED, lr=best)
    tests = [cell(plan, row, name, seed=seed, lr=best)["test"] for seed in range(1, plan.seeds + 1)]
    return f"{name}, {plan.shots or 'all'} of a class, {row}: {sum(tests) / len(tests):.1%} at {best}"


def chosen_rate(accuracy_at: Callable[[float], float]) -> float:
    """Return the best rate of the grid, which is extended by one if its end is the best."""
    rates = {lr: accuracy_at(lr) for lr in RATES}
    best = max(rates, key=rates.__getitem__)
    if best in BEYOND:
        rates[BEYOND[best]] = accuracy_at(BEYOND[best])
    return max(rates, key=rates.__getitem__)


def earlier_rate(plan: Plan, row: str, name: str) -> float | None:
    """Return the rate that an earlier report has chosen, if the plan has one."""
    if plan.rates is None:
        return None
    cells = [each for each in read_cells(plan.rates) if (each["row"], each["target"]) == (row, name)]
    found = [float(each["lr"]) for each in cells if "test" in each]
    if not found:
        raise SystemExit(f"{plan.rates} has no finished run of {row!r} on {name!r}, so no learning rate to take.")
    return found[0]


@cache
def read_cells(path: Path) -> list[dict[str, Any]]:
    """Read the trainings of a report; once."""
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return cells


def cell_path(plan: Plan, row: str, name: str, *, seed: int, lr: float) -> Path:
    """Return the file of a training."""
    words = row.replace(", ", "-").replace(" ", "_").replace("'", "")
    return plan.cells / f"{name}-{plan.shots or 'all'}-{plan.steps}-{words}-{seed}-{lr}.json"


def known(plan: Plan, row: str, name: str, *, seed: int, lr: float) -> dict[str, Any] | None:
    """Read the result of a training, if it is finished."""
    path = cell_path(plan, row, name, seed=seed, lr=lr)
    return json.loads(path.read_text()) if path.exists() else None


def cell(plan: Plan, row: str, name: str, *, seed: int, lr: float) -> dict[str, Any]:
    """Train once, or read the result if it is finished."""
    if there := known(plan, row, name, seed=seed, lr=lr):
        return there
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit  # interrupted
    images, (network, second), unseen = material(plan)
    draw = target(name, plan.data, shots=plan.shots, seed=seed)
    draw_name = f"{name}-{plan.shots}-{seed}" if plan.shots else f"{name}-all"  # the same images for every seed
    setting = Setting(draw, images, network, second, plan.work, draw_name, plan.steps)
    is_final, shows_unseen = seed != TUNING_SEED, relatives(name) == relatives("near")
    found = train(EVERY[row], setting, seed=seed, lr=lr, is_final=is_final, unseen=None if shows_unseen else unseen)
    if row == "fine-tuning" and is_final:
        found |= {"gap": setting.gap(), "images": len(draw.train), "classes": draw.num_classes}
    entry = {"target": name, "shots": plan.shots, "row": row, "seed": seed, "lr": lr, "steps": plan.steps, **found}
    path = cell_path(plan, row, name, seed=seed, lr=lr)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(entry))
    part.replace(path)
    return entry


def cannot_run(plan: Plan, workers: int) -> str:
    """Return what is wrong with a plan; empty if it can be run."""
    if min(plan.seeds, workers, plan.shots or 1) < 1:
        return "--seeds and --workers take 1 or more, --shots 0 or more"
    if plan.rates is not None and not plan.rates.exists():
        return f"--rates {plan.rates}: there is no such report"
    if plan.steps < LOOKS:
        return f"--steps {plan.steps}; expected {LOOKS} at least, the points of a learning curve."
    return ""


def be_quiet() -> None:
    """Use one thread and silence Lightning."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain, run what is missing, write and return all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npz files; without it torchvision's sets are downloaded")
    parser.add_argument("--work", type=Path, default=Path("transfer_runs"), help="for finished work: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("transfer.json"), help="the report: %(default)s")
    some = "by default all but those that were tried for better defaults"
    parser.add_argument("--rows", nargs="+", choices=[*EVERY], default=[*ROWS], metavar="ROW", help=some)
    where = f"by default {', '.join(TARGETS)}"
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], metavar="TARGET", help=where)
    parser.add_argument("--shots", type=int, default=10, help="of each class; 0 for all: %(default)s")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of fine-tuning: %(default)s")
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="of pretraining: %(default)s")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="final runs of each row: %(default)s")
    parser.add_argument("--rates", type=Path, help="an earlier report, whose learning rates are used")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three rows, near and far, two seeds, fewer steps")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK, steps=min(options.steps, 100), epochs=min(options.epochs, 1))
    sizes = options.shots or None, options.steps, options.epochs, options.seeds
    plan = Plan(options.data, options.work, *sizes, options.rates)
    if wrong := cannot_run(plan, options.workers):
        parser.error(wrong)
    for data in {"cifar100", *map(set_of, options.targets)}:
        check_there(data, plan.data)  # before hours are lost
    plan.cells.mkdir(parents=True, exist_ok=True)
    rows = [*dict.fromkeys(["fine-tuning", *options.rows])]  # which all others are compared with
    jobs = [(row, name) for row in rows for name in options.targets]
    for row, name in jobs:
        earlier_rate(plan, EVERY[row].tuned_as or row, name)  # fails before any of them starts
    with ProcessPoolExecutor(options.workers, get_context("spawn"), signal.signal, INTERRUPTS_IGNORED) as pool:
        try:
            for line in pool.map(pretrain, [plan] * NETWORKS, range(NETWORKS)):
                print(line, flush=True)
            waiting = [pool.submit(run_row, plan, *job) for job in jobs]
            for number, done in enumerate(as_completed(waiting), start=1):
                print(f"[{number}/{len(jobs)}] {done.result()}", flush=True)
                report(plan, rows, options.targets, options.out)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.kill()  # Lightning would continue a training on a request to end
            report(plan, rows, options.targets, options.out)
            raise SystemExit(f"Interrupted. What is finished is in {options.out}; the same command resumes.") from None
    if options.quick:
        print("These few short runs show that everything works; their differences mean nothing.")
    return report(plan, rows, options.targets, options.out)


def report(plan: Plan, rows: Sequence[str], targets: Sequence[str], path: Path) -> dict[str, Any]:
    """Write what is finished of a plan into one file and return it."""
    cells = []
    for row, name in product(rows, targets):
        tuned, grid = EVERY[row].tuned_as or row, sorted({*RATES, *BEYOND.values()})
        rates = {lr: each["validation"] for lr in grid if (each := known(plan, tuned, name, seed=TUNING_SEED, lr=lr))}
        cells += [each for lr in grid if (each := known(plan, row, name, seed=TUNING_SEED, lr=lr))]
        if plan.rates is not None or rates.keys() >= {*RATES}:
            best = earlier_rate(plan, tuned, name) or chosen_rate(defaultdict(lambda: -1.0, rates).__getitem__)
            seeds = range(1, plan.seeds + 1)
            cells += [each for seed in seeds if (each := known(plan, row, name, seed=seed, lr=best))]
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    pretrained = [torch.load(path, weights_only=True)["test accuracy"] for path in plan.networks if path.exists()]
    sizes = {key: str(getattr(plan, key)) for key in ("shots", "steps", "epochs", "seeds")}
    names = {"rows": [*rows], "targets": [*targets]}
    origin = RATES if plan.rates is None else f"those of {plan.rates.name}"
    settings = {**sizes, "precision": PRECISION, "rates": origin, "source test accuracy": pretrained}
    found = {"versions": versions, "settings": settings, **names, "cells": cells}
    path.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
