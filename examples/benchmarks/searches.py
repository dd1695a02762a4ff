"""Compare a swarm, Parzen estimators and chance: how close each comes to the best with as many candidates.

One fitness is made up and has a known optimum. The other is real: every pair of depths of the quickstart's two networks
is trained and scored as a search does it, so each strategy is compared with the best of all pairs.

    PYTHONPATH=examples python examples/benchmarks/searches.py --out searches.json
"""

import argparse
import copy
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart import LR, SMALL, SOURCE, Digits, LitDigits, calm, pretrain, printed
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.glue.trials import trials_of
from lightning_transfer.methods.collaborative.search.candidates import Candidates
from lightning_transfer.methods.collaborative.search.strategies import STRATEGIES

PARTICLES, ITERATIONS, SEEDS = 10, 5, 10
IMAGES, BATCH = 500, 20  # with the few images of most users, most candidates would tie
Layers = tuple[int, ...]


class Chance:
    """Propose every candidate with the same probability and learn nothing: the baseline."""

    def __init__(self, most: Sequence[int], *, particles: int, iterations: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.most = np.asarray(most)

    def ask(self) -> Layers:
        """Return a candidate."""
        return tuple(self._random.integers(0, self.most, endpoint=True).tolist())

    def tell(self, fitness: float) -> None:
        """Ignore its score."""


PROPOSERS = {**STRATEGIES, "random": Chance}


def found_by(name: str, most: Sequence[int], fitness: Callable[[Layers], float], seed: int) -> list[float]:
    """Return the best fitness so far, candidate by candidate."""
    strategy = PROPOSERS[name](list(most), particles=PARTICLES, iterations=ITERATIONS, seed=seed)
    scores = []
    for _ in range(PARTICLES * (ITERATIONS + 1)):
        scores.append(fitness(strategy.ask()))
        strategy.tell(scores[-1])
    return list(itertools.accumulate(scores, max))


def valley(most: Sequence[int], seed: int) -> Callable[[Layers], float]:
    """Return a fitness that falls with the distance from its optimum, which the seed chooses."""
    optimum = np.random.default_rng(1000 + seed).integers(0, most, endpoint=True)
    return lambda layers: 1 - float((((np.array(layers) - optimum) / np.array(most)) ** 2).mean())


def table(capitals: Any, small: Any, seed: int, steps: Path) -> dict[Layers, float]:
    """Return the accuracy of every pair of depths on the digits of one seed; each is saved at once."""
    module = LitDigits(copy.deepcopy(capitals), LR)
    module.model.reset_classifier(10)  # type: ignore[operator]
    using = lt.CollaborativeFinetuning({"small": small})
    options = {"accelerator": "cpu", "devices": 1}
    images, labels = Digits(seed).val.tensors
    loader = DataLoader(TensorDataset(images[:IMAGES], labels[:IMAGES]), batch_size=BATCH, shuffle=True)
    search = lt.LayerSearch(proxy_epochs=3, validation=0.5)
    trials = trials_of(module, loader, options, unaugmented=None)
    candidates = Candidates(search, module, using.together, trials, using.with_options)
    known = json.loads(steps.read_text()) if steps.exists() else {}
    scores = {}
    for layers in itertools.product(*(range(number + 1) for number in candidates.most.values())):
        key = f"{seed}: {layers}"
        if key not in known:
            known[key] = candidates.evaluate(layers).accuracy
            steps.write_text(json.dumps(known))
        scores[layers] = known[key]
    return scores


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the strategies; return what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("searches.json"))
    parser.add_argument("--tables", type=int, default=2, help="draws of digits, each scored at all depths")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    tasks: dict[str, list[tuple[Sequence[int], Callable[[Layers], float], float, int]]] = {
        "valley, two ResNet-50s": [([48, 48], valley([48, 48], seed), 1.0, seed) for seed in range(SEEDS)],
        "valley, four ResNet-50s": [([48] * 4, valley([48] * 4, seed), 1.0, seed) for seed in range(SEEDS)],
    }
    with calm():
        capitals, small = (pretrain(printed(each, 300, seed=0), 600, lambda: None) for each in (SOURCE, SMALL))
        for number in range(options.tables):
            scores = table(capitals, small, number, options.out.with_suffix(".part"))
            most = [max(layers[each] for layers in scores) for each in range(2)]
            tasks[f"digits {number}, {len(scores)} pairs"] = [
                (most, scores.__getitem__, max(scores.values()), seed) for seed in range(SEEDS)
            ]
    rows: dict[str, dict[str, list[float]]] = {}
    for task, runs in tasks.items():
        rows[task] = {
            name: [top - found_by(name, most, fitness, seed)[-1] for most, fitness, top, seed in runs]
            for name in PROPOSERS
        }
        print(f"{task}, short of the best by: {summary(rows[task])}")
    report = {"candidates": PARTICLES * (ITERATIONS + 1), "short of the best": rows}
    options.out.write_text(json.dumps(report, indent=1))
    return report


def summary(short: dict[str, list[float]]) -> str:
    """Return means with standard errors, and how often the swarm was nearer than chance."""
    means = [
        f"{name} {np.mean(values):.4f} ± {np.std(values, ddof=1) / SEEDS**0.5:.4f}" for name, values in short.items()
    ]
    swarm, chance = np.array(short["swarm"]), np.array(short["random"])
    nearer, farther = int((swarm < chance).sum()), int((swarm > chance).sum())
    return f"{', '.join(means)}; of {SEEDS} seeds the swarm was nearer than chance in {nearer}, farther in {farther}"


if __name__ == "__main__":
    main()
