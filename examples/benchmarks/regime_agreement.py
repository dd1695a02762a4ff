"""Measure whether what lowers the loss of source images lowers that of the target's held-out images, too.

Of each source image it is the slope of its loss along the gradient of the target's: positive if the two agree. The
network is the pretrained one, with its classifier for the source and the linear probe for the target.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from regime import RESULTS, SHOTS, STEPS, Job, be_quiet, planned, setting
from regime_data import TARGETS, Photos, centre
from regime_network import HEAD, Rates, body, features
from regime_results import WITH_MEAN, differences, in_columns
from torch import Tensor, nn

PATH = RESULTS / "agreement.json"
SEED = 1
STEP = 0.02  # length by which weights are moved to either side; their norm is some hundreds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the mean slopes of all source images, of the nearest and of the others, and write them into results/."""
    plan, _ = planned(argv)
    be_quiet()
    (plan.out / "made").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in TARGETS:
        given = setting(plan, Job("soft", name, SHOTS, STEPS[name][SHOTS], Rates(0.01, 1.0), SEED))
        each = slopes(given.network, given.source, gradient(given.network, given.probe(), given.draw.validation))
        is_near = torch.zeros(len(each), dtype=torch.bool).index_fill(0, given.nearest(), value=True)
        groups = {"all source images": each, "the nearest": each[is_near], "the others": each[~is_near]}
        found[name] = {group: (round(float(some.mean()), 3), round(half(some), 3)) for group, some in groups.items()}
        print(name, found[name], flush=True)
    PATH.write_text(json.dumps({"network": plan.networks[0][0], "shots": SHOTS, "slopes": found}) + "\n")


def half(some: Tensor) -> float:
    """Return half of the 95 % interval of a mean over many."""
    return float(1.96 * some.std() / len(some) ** 0.5)


def gradient(network: Any, head: nn.Module, images: Photos) -> list[Tensor]:
    """Return the gradient of the images' mean loss for the parameters before the head, in eval mode, of length 1."""
    network = copy.deepcopy(network).eval()
    params = body(network)
    total = [torch.zeros_like(param) for param in params]
    for pixels, labels in zip(images.pixels.split(50), images.targets.split(50), strict=True):
        rows = network.forward_head(network.forward_features(centre(pixels)), pre_logits=True)
        loss = F.cross_entropy(head(rows), labels, reduction="sum")
        total = [torch.add(*pair) for pair in zip(total, torch.autograd.grad(loss, params), strict=True)]
    length = torch.stack([part.norm() for part in total]).norm()
    return [part / length for part in total]


def slopes(network: nn.Module, images: Photos, along: list[Tensor]) -> Tensor:
    """Return the slope of each image's loss along a direction of the parameters before the head."""
    losses = []
    for step in (STEP, -STEP):
        moved: Any = copy.deepcopy(network)
        for param, direction in zip(body(moved), along, strict=True):
            param.data.add_(direction, alpha=step)
        with torch.no_grad():
            logits = moved.get_submodule(HEAD)(features(moved, images))
            losses.append(F.cross_entropy(logits.double(), images.targets, reduction="none"))
    return (losses[0] - losses[1]) / (2 * STEP)


def table() -> str:
    """Return the table of the mean slopes, beside what the source gains."""
    found = json.loads(PATH.read_text())["slopes"]
    rows = {
        group: [*("{:+.1f} ± {:.1f}".format(*found[name][group]) for name in TARGETS), ""]
        for group in found[TARGETS[0]]
    }
    gains = {f"*{row}* minus fine-tuning": differences(row, TARGETS, SHOTS) for row in ("soft", "joint, random source")}
    nearest = {"*selective* minus *random*": differences("selective", TARGETS, SHOTS, to="joint, random source")}
    return in_columns(WITH_MEAN, rows | gains | nearest)


if __name__ == "__main__":
    main()
