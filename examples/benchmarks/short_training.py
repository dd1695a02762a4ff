"""Measure the source methods as they come in short training, on the quickstart's near target.

A new user trains for few steps and changes no option. The network, the target and the learning rate are the
quickstart's; seeds differ in the images, their order and the head.

    PYTHONPATH=examples python examples/benchmarks/short_training.py
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from quickstart import LR, NEAR, PRETRAINING_STEPS, SOURCE, Characters, Run, calm, pretrain, printed, tune
from transfer_results import interval

import lightning_transfer as lt

PATH = Path(__file__).with_name("results") / "short-training.json"
STEPS, SEEDS = (60, 300), (0, 1, 2)
PLAIN = "fine-tuning"
METHODS: dict[str, Callable[[lt.SourceTask], list[L.Callback]]] = {
    PLAIN: lambda source: [],
    "SoftFinetuning(source)": lambda source: [lt.SoftFinetuning(source)],
    "SelectiveJointFinetuning(source)": lambda source: [lt.SelectiveJointFinetuning(source)],
}


def main() -> None:
    """Pretrain once, train every method with every seed and length, and write the test accuracies down."""
    torch.set_num_threads(1)
    cells: list[dict[str, Any]] = []
    with calm():
        characters = printed("".join(character for character in SOURCE if character not in NEAR), 150, seed=0)
        network = pretrain(characters, PRETRAINING_STEPS, lambda: None)
        source = lt.SourceTask.from_timm(network, characters)
        for steps in STEPS:
            for seed in SEEDS:
                for name, callbacks in METHODS.items():
                    run = tune(network, Characters(seed), LR, callbacks(source), steps, Run(lambda: None))
                    gap = None if np.isnan(run.gap) else round(run.gap, 3)
                    cell = {"steps": steps, "seed": seed, "name": name, "test": run.test_accuracy, "gap": gap}
                    cells.append(cell)
    PATH.write_text(json.dumps({"cells": cells}).replace(', {"steps": ', ',\n{"steps": ') + "\n")
    show(cells)


def show(cells: list[dict[str, Any]]) -> None:
    """Print differences from fine-tuning in points, paired by seed."""
    tests = {(cell["steps"], cell["name"], cell["seed"]): 100 * cell["test"] for cell in cells}
    for steps, name in product(STEPS, [*METHODS][1:]):
        apart = np.array([tests[steps, name, seed] - tests[steps, PLAIN, seed] for seed in SEEDS])
        print(f"{steps} steps, {name}: {apart.mean():+.1f} ± {interval(apart)[1]:.1f}")


if __name__ == "__main__":
    main()
