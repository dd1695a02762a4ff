"""Measure what the statistics of small batches do to pretrained features, as BatchNorm uses them in training.

A linear probe of the target's images is scored on validation images, with features by the pretrained statistics, by
those of each batch, and by those of all training images, which training would keep. Knowledge loss is how far the
pretrained classifier is from itself with the statistics of the batch.
"""

import copy
import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from regime import RESULTS, SHOTS, STEPS, Job, be_quiet, planned, setting
from regime_data import TARGETS, Photos, centre
from regime_network import Rates
from regime_results import by_target
from regime_rows import BATCH
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import lightning_transfer as lt
from lightning_transfer.probing import fit_probe

PATH = RESULTS / "statistics.json"
SEEDS = 1, 2, 3
KEPT, BATCHES, FITTED = "pretrained statistics", "statistics of the batch", "the same, probe fitted with them"
TARGETS_OWN = "statistics of all training images, probe fitted with them"
LOSS = "knowledge loss"
ROWS = {KEPT: "{:.1f} %", BATCHES: "{:.1f} %", FITTED: "{:.1f} %", TARGETS_OWN: "{:.1f} %", LOSS: "{:.1f}"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every target and draw, and write means over draws into results/."""
    plan, _ = planned(argv)
    be_quiet()
    (plan.out / "made").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    for name in TARGETS:
        jobs = [Job("soft", name, SHOTS, STEPS[name][SHOTS], Rates(0.01, 1.0), seed) for seed in SEEDS]
        draws = [measured(setting(plan, job)) for job in jobs[: 1 if name == "flowers" else None]]  # which has one draw
        found[name] = {row: round(mean(draw[row] for draw in draws), 3) for row in ROWS}
        print(name, found[name], flush=True)
    report = {"network": plan.networks[0][0], "shots": SHOTS, "batch": BATCH, "found": found}
    PATH.write_text(json.dumps(report) + "\n")


def measured(given: Any) -> dict[str, float]:
    """Return the accuracies of probes on validation images, in percent, and the knowledge loss on training images."""
    kept, learned, held = given.network.eval(), mixed(given.draw.train), mixed(given.draw.validation)
    by_batch = normalizing_by_batch(kept)
    networks = {KEPT: kept, FITTED: by_batch, TARGETS_OWN: with_statistics_of(learned, kept)}
    rows = {name: [run(each, some, pre_logits=True) for some in (learned, held)] for name, each in networks.items()}
    probes = {
        name: fit_probe(known, learned.targets, num_classes=given.draw.num_classes) for name, (known, _) in rows.items()
    }
    said = {name: probe(rows[name][1]) for name, probe in probes.items()} | {BATCHES: probes[KEPT](rows[FITTED][1])}
    return {
        **{row: 100 * float((logits.argmax(1) == held.targets).float().mean()) for row, logits in said.items()},
        LOSS: float(lt.functional.knowledge_loss(run(by_batch, learned), run(kept, learned))),
    }


def mixed(images: Photos) -> Photos:
    """Return images in random order, so that a batch has several classes; those of whole batches."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.only(order[: len(images) // BATCH * BATCH])


def normalizing_by_batch(network: Any) -> Any:
    """Return a copy whose BatchNorm layers use the statistics of each batch, as in training, and keep none."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats, layer.training = False, True
    return network


@torch.no_grad()
def with_statistics_of(images: Photos, network: Any) -> Any:
    """Return a copy with the mean of the batches' statistics, as training keeps them if no weight changes."""
    network = copy.deepcopy(network)
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True  # a plain mean
    run(network, images)
    return network.eval()


@torch.no_grad()
def run(network: Any, images: Photos, *, pre_logits: bool = False) -> Tensor:
    """Return the logits of images' centres, or the inputs of the head, a batch at a time."""
    some = (network.forward_features(centre(pixels)) for pixels in images.pixels.split(BATCH))
    return torch.cat([network.forward_head(each, pre_logits=pre_logits) for each in some])


def table() -> str:
    """Return the table by target."""
    found = json.loads(PATH.read_text())["found"]
    return by_target({row: [shown.format(found[name][row]) for name in TARGETS] for row, shown in ROWS.items()})


if __name__ == "__main__":
    main()
