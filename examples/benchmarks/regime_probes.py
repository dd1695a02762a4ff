"""Compare linear probes of features that share one scale with probes of features that are each divided by their own.

Also measured is how sure the probe with one scale is of the images that it was fitted to, and of others.

python examples/benchmarks/regime_probes.py --data FOLDER --weights tf_efficientnet_lite0=FILE
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from regime import RESULTS, SHOTS, Cell, be_quiet
from regime_data import TARGETS, Draw, Photos, target
from regime_network import features, pooled, pretrained
from regime_results import by_target, of_seeds
from transfer_results import interval

from lightning_transfer.probing import fit_probe

PATH = RESULTS / "probes.json"
SEEDS = 1, 2, 3
SHOWN = "images it was fitted to", "random crops of them", "test images"
FEW = 1e-6  # added to standard deviations: a feature may never vary


def main(argv: Sequence[str] | None = None) -> None:
    """Fit both probes of every network, target and draw, and write down their test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of .npz files")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NETWORK=FILE", help="of timm, its state dict")
    options = parser.parse_args(argv)
    be_quiet()
    cells = []
    for name, _, path in (each.partition("=") for each in options.weights):
        network = pretrained(name, Path(path))
        for where in TARGETS:
            for seed in SEEDS[:1] if where == "flowers" else SEEDS:  # which has one draw
                draw = target(where, options.data, shots=SHOTS, seed=seed)
                found = measured(network, draw, seed)
                cells.append({"target": where, "network": name, "seed": seed, **found})
                print(cells[-1], flush=True)
    PATH.write_text(json.dumps({"cells": cells}).replace(', {"target": ', ',\n{"target": ') + "\n")


def measured(network: Any, draw: Draw, seed: int) -> Cell:
    """Return the test accuracies of a probe of features as they are, and of standardised ones, and the former's losses.

    These are the mean losses on the images that it was fitted to, on random crops of them, and on test images.
    """
    seen, others = (features(network, images) for images in (draw.train, draw.test))
    labels, right, scale = draw.train.targets, draw.test.targets, seen.std(0) + FEW
    one, each = (fit_probe(rows, labels, num_classes=draw.num_classes) for rows in (seen, seen / scale))
    scores = {"one": one(others), "each": each(others / scale)}
    crops = Photos(draw.train.pixels, labels, augmented=True, random=torch.Generator().manual_seed(seed))
    cropped = pooled(network, torch.stack([crops[index][0] for index in range(len(crops))]).split(100))
    shown = zip(SHOWN, (one(seen), one(cropped), scores["one"]), (labels, labels, right), strict=True)
    return {
        **{name: float((given.argmax(1) == right).float().mean()) for name, given in scores.items()},
        "losses": {name: float(F.cross_entropy(given, true)) for name, given, true in shown},
    }


def table() -> str:
    """Return the table of both and of their difference, by target."""
    cells = json.loads(PATH.read_text())["cells"]
    names = [*dict.fromkeys(cell["network"] for cell in cells)]
    lines = [f"| network | {' | '.join(TARGETS)} | all |", "|---" * (len(TARGETS) + 2) + "|"]
    for name in names:
        of = {
            where: [each for each in cells if (each["network"], each["target"]) == (name, where)] for where in TARGETS
        }
        apart = {where: np.array([100 * (each["one"] - each["each"]) for each in of[where]]) for where in TARGETS}
        shown = [f"{each.mean():+.1f}{of_seeds(len(each))}" for each in apart.values()]
        average, half = interval(np.array([each.mean() for each in apart.values()]))
        lines.append(f"| {name} | {' | '.join(shown)} | {average:+.1f} ± {half:.1f} |")
    return "\n".join(lines)


def sureness() -> str:
    """Return the table of the losses of the first network's probes, means over its draws."""
    cells = json.loads(PATH.read_text())["cells"]
    mine = [cell for cell in cells if cell["network"] == cells[0]["network"]]
    found = {
        name: [mean(cell["losses"][name] for cell in mine if cell["target"] == where) for where in TARGETS]
        for name in SHOWN
    }
    return by_target({name: [f"{loss:.2f}" for loss in losses] for name, losses in found.items()})


if __name__ == "__main__":
    main()
