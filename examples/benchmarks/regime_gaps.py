"""Measure how far each target of the regime is from the source, as `weight="auto"` does before the first step."""

import json
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from regime import RESULTS, SHOTS, STEPS, Job, be_quiet, planned, setting
from regime_data import TARGETS, Photos
from regime_network import Rates, Tuning
from regime_rows import BATCH
from regime_training import QUIET, with_new_head
from torch.utils.data import DataLoader

import lightning_transfer as lt

PATH = RESULTS / "domain-gaps.json"
SEEDS = 1, 2, 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the gap of every target and draw, and write them into results/."""
    plan, _ = planned(argv)
    be_quiet()
    (plan.out / "made").mkdir(parents=True, exist_ok=True)
    gaps: dict[str, list[float]] = {}
    for name in TARGETS:
        for seed in SEEDS:
            job = Job("soft", name, SHOTS, STEPS[name][SHOTS], Rates(0.01, 1.0), seed)
            given = setting(plan, job)
            torch.manual_seed(seed)
            network = with_new_head(given, seed=seed, from_probe=False)
            images = Photos(given.draw.train.pixels, given.draw.train.targets, augmented=True)
            callback = lt.SoftFinetuning(given.task())  # measures by default
            often: dict[str, Any] = {"max_steps": 1, "log_every_n_steps": 1}
            trainer = L.Trainer(accelerator=plan.device, devices=1, callbacks=[callback], **often, **QUIET)
            trainer.fit(Tuning(network, Rates(0.01, 1.0)), DataLoader(images, BATCH, shuffle=True))
            gaps.setdefault(name, []).append(round(float(trainer.callback_metrics["transfer/domain_gap"]), 3))
        print(name, *gaps[name], flush=True)
    PATH.write_text(json.dumps({"network": plan.networks[0][0], "shots": SHOTS, "gaps": gaps}) + "\n")


if __name__ == "__main__":
    main()
