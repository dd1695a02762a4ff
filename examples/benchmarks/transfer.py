"""When does it help? Every method on targets near and far, against baselines that are tuned as much.

Networks are pretrained on 80 classes of CIFAR-100; targets are its other 20 classes (near), trashnet (middle), and
gtsrb and signdigits (far). Each row has the same grid of learning rates, chosen on a part of the training split with
a seed that counts for nothing else, the same steps, the same new heads and the same images. The test split is read
once for each cell. What is finished is kept, cell by cell, and a run that is broken off goes on.

    python examples/benchmarks/transfer.py --data FOLDER          # all of it: hours
    python examples/benchmarks/transfer.py --data FOLDER --quick  # three rows, near and far, two seeds: minutes
"""

import argparse
import json
import logging
import platform
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transfer_data import CHANGED, NEAR, Pictures, load, source, target
from transfer_rows import EVERY, ROWS, Classifier, Setting, accuracy, small_resnet, train

RATES = (0.003, 0.01, 0.03, 0.1)
TARGETS = ("near", "trashnet", "signdigits", "gtsrb")
QUICK = {"rows": ["fine-tuning", "soft", "gated transfer"], "targets": ["near", "signdigits"], "seeds": 2}
TUNING_SEED = 0
NETWORKS, PRETRAINING_LR, PRETRAINING_BATCH = 2, 0.2, 128


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        data: folder of .npz files; None for torchvision's.
        work: where networks, selections and finished cells are kept.
        shots: images of each class; None for all.
        steps: of plain fine-tuning.
        epochs: of pretraining.
        seeds: final runs of each row.
    """

    data: Path | None
    work: Path
    shots: int | None = 10
    steps: int = 600
    epochs: int = 12
    seeds: int = 5


def pretrain(plan: Plan, number: int) -> str:
    """Pretrain one of the networks, unless it is there."""
    be_quiet()
    path = plan.work / f"network{number}-{plan.epochs}.pt"
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
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: Any = {"accelerator": "cpu", "precision": "bf16-mixed", **dict.fromkeys(quiet, False)}
    L.Trainer(max_epochs=plan.epochs, **options).fit(module, loader)
    right = accuracy(module.model, unseen)
    torch.save({"weights": module.model.state_dict(), "test accuracy": right}, path)
    return f"{path.name}: {right:.1%} of the source's test images"


@cache
def material(plan: Plan) -> tuple[Pictures, list[torch.nn.Module], Pictures]:
    """Source images, networks, and images of classes that no pretraining has shown; once a process."""
    images, _ = source(plan.data)
    networks: list[torch.nn.Module] = []
    for number in range(NETWORKS):
        network = small_resnet(int(images.targets.max()) + 1)
        network.load_state_dict(
            torch.load(plan.work / f"network{number}-{plan.epochs}.pt", weights_only=True)["weights"]
        )
        networks.append(network)
    return images, networks, load("cifar100", plan.data)[1].of_classes(NEAR)


def run_row(plan: Plan, row: str, name: str) -> str:
    """Choose a row's learning rate, then its final runs; what is there already is not run again."""
    be_quiet()
    tuned = EVERY[row].tuned_as or row
    rates = {lr: cell(plan, tuned, name, seed=TUNING_SEED, lr=lr)["validation"] for lr in RATES}
    best = max(rates, key=rates.__getitem__)
    cell(plan, row, name, seed=TUNING_SEED, lr=best)
    tests = [cell(plan, row, name, seed=seed, lr=best)["test"] for seed in range(1, plan.seeds + 1)]
    return f"{name}, {plan.shots or 'all'} of a class, {row}: {sum(tests) / len(tests):.1%} at {best}"


def cell(plan: Plan, row: str, name: str, *, seed: int, lr: float) -> dict[str, Any]:
    """One training, or what was written down of it."""
    draw_name = f"{name}-{plan.shots or 'all'}"
    path = plan.work / "cells" / f"{draw_name}-{plan.steps}-{_file_name(row)}-{seed}-{lr}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit  # a run that was broken off
    images, (network, second), unseen = material(plan)
    draw = target(name, plan.data, shots=plan.shots, seed=seed)
    setting = Setting(draw, images, network, second, plan.work, f"{draw_name}-{seed}", plan.steps)
    is_final, shows_unseen = seed != TUNING_SEED, name.partition("-")[0] == "near" or name in CHANGED
    found = train(EVERY[row], setting, seed=seed, lr=lr, is_final=is_final, unseen=None if shows_unseen else unseen)
    if row == "fine-tuning" and is_final:
        found |= {"gap": setting.gap(), "images": len(draw.train), "classes": draw.num_classes}
    entry = {"target": name, "shots": plan.shots, "row": row, "seed": seed, "lr": lr, "steps": plan.steps, **found}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(entry))
    part.replace(path)
    return entry


def _file_name(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "_").replace("'", "")


def be_quiet() -> None:
    """One thread, and no lines of Lightning's."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain, run what is missing, write what is known; returns that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npz files; torchvision's sets are loaded without")
    parser.add_argument("--work", type=Path, default=Path("transfer_runs"), help="where finished work is kept")
    parser.add_argument("--out", type=Path, default=Path("transfer.json"))
    parser.add_argument("--rows", nargs="+", choices=[*EVERY], default=[*ROWS], metavar="ROW")
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], metavar="TARGET")
    parser.add_argument("--shots", type=int, default=10, help="of each class; 0 for all")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="three rows, near and far, two seeds, fewer steps")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK, steps=min(options.steps, 150), epochs=min(options.epochs, 2))
    (options.work / "cells").mkdir(parents=True, exist_ok=True)
    plan = Plan(options.data, options.work, options.shots or None, options.steps, options.epochs, options.seeds)
    jobs = [(row, name) for row in options.rows for name in options.targets]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for line in pool.map(pretrain, [plan] * NETWORKS, range(NETWORKS)):
            print(line, flush=True)
        waiting = [pool.submit(run_row, plan, *job) for job in jobs]
        for number, done in enumerate(as_completed(waiting), start=1):
            print(f"[{number}/{len(jobs)}] {done.result()}", flush=True)
            report(plan, options.rows, options.targets, options.out)
    return report(plan, options.rows, options.targets, options.out)


def report(plan: Plan, rows: Sequence[str], targets: Sequence[str], path: Path) -> dict[str, Any]:
    """What is finished of a plan, in one file."""
    cells = []
    for row, name in product(rows, targets):
        pattern = f"{name}-{plan.shots or 'all'}-{plan.steps}-{_file_name(row)}-*.json"
        read = [json.loads(each.read_text()) for each in sorted((plan.work / "cells").glob(pattern))]
        cells += [cell for cell in read if cell["row"] == row and cell["seed"] <= plan.seeds]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__}
    settings = {key: str(value) for key, value in asdict(plan).items() if key not in ("data", "work")}
    names = {"rows": [*rows], "targets": [*targets]}
    found = {"versions": versions, "settings": {**settings, "rates": RATES}, **names, "cells": cells}
    path.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
