"""Ask `rank_networks` which network suits targets of the regime, and hold its order against test images.

Networks with weights are ranked beside networks with random ones, which have to come last, all at 112 pixels.

    python examples/benchmarks/regime_ranking.py --data FOLDER --targets dtd10 flowers \
        --weights tf_efficientnet_lite0=FILE tf_efficientnet_lite1=FILE --random resnet18
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from regime import RESULTS, SHOTS, be_quiet
from regime_data import SIDE, TARGETS, WHOLE, target
from regime_network import features, pretrained
from torch.utils.data import TensorDataset

import lightning_transfer as lt
from lightning_transfer.probing import fit_probe

PATH = RESULTS / "ranking.json"
SEED = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Rank the networks on every target, and write down what was said and what is true."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of .npz files")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["dtd10", "flowers"], metavar="TARGET")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE", help="of timm, and its state dict")
    parser.add_argument("--random", nargs="+", default=[], metavar="NETWORK", help="of timm, with random weights")
    options = parser.parse_args(argv)
    be_quiet()
    networks: dict[str, Any] = {}
    for name, _, path in (each.partition("=") for each in options.weights):
        networks[name] = pretrained(name, Path(path))
    for name in options.random:
        torch.manual_seed(0)
        networks[f"{name}, random"] = timm.create_model(name)
    for network in networks.values():
        network.pretrained_cfg |= {"input_size": (3, SIDE, SIDE), "crop_pct": SIDE / WHOLE}
    found = {name: ranked(networks, name, options.data) for name in options.targets}
    PATH.write_text(json.dumps({"shots": SHOTS, "pixels": SIDE, "targets": found}, indent=1) + "\n")


def ranked(networks: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return what is said of the networks, in its order, with the test accuracy of each one's linear probe."""
    draw = target(name, folder, shots=SHOTS, seed=SEED)
    began = time.process_time()
    ranking = lt.rank_networks(networks, TensorDataset(draw.train.pixels, draw.train.targets))
    took = time.process_time() - began
    print(f"{name}: {took:.0f} s\n{ranking}", flush=True)
    rows = [{**vars(row), "test": round(tested(networks[row.name], draw), 4)} for row in ranking.rows]
    return {"images": len(draw.train), "seconds": round(took, 1), "rows": rows}


def tested(network: Any, draw: Any) -> float:
    """Return the accuracy on test images of a linear probe of the training images."""
    says = fit_probe(features(network, draw.train), draw.train.targets, num_classes=draw.num_classes)
    return float((says(features(network, draw.test)).argmax(1) == draw.test.targets).float().mean())


def table() -> str:
    """Return the table of what was said, beside the accuracy on test images."""
    heads = "", "accuracy, %", "from the best", "test accuracy, %", "M parameters"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in json.loads(PATH.read_text())["targets"].items():
        lines.append(f"| **{name}**, {found['images']} images, {found['seconds']:.0f} CPU seconds | | | | |")
        for place, row in enumerate(found["rows"]):
            apart = f"{100 * row['difference']:+.1f} ± {100 * row['interval']:.1f}" if place else ""
            accuracy = f"{100 * row['accuracy']:.1f} ± {196 * row['error']:.1f}"
            others = (100 * row["test"], row["parameters"] / 1e6)
            lines.append(f"| {' | '.join([row['name'], accuracy, apart, *(f'{each:.1f}' for each in others)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
