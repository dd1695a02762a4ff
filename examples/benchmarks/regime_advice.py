"""Ask `advise` about targets of the regime, to hold what it says against the differences that the table measured.

It gets ten images of each class, the rates of plain fine-tuning and a third of its steps. Its minutes are of CPU time,
since the machine may be shared. A draw that is in results/advice.json is not asked about again.

    python examples/benchmarks/regime_advice.py --data FOLDER --weights FILE --targets dtd10 flowers --seeds 1
"""

import importlib
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from regime import RESULTS, SHOTS, STEPS, Cell, Job, Plan, be_quiet, planned, setting
from regime_data import Photos
from regime_network import Tuning
from regime_results import difference, rates_of, written
from regime_rows import BATCH, PLAIN
from regime_training import with_new_head
from torch.utils.data import DataLoader

import lightning_transfer as lt

PATH = RESULTS / "advice.json"
MINUTES = 6.0
PART = 3  # by which the steps of plain fine-tuning are divided
ADVISING: Any = importlib.import_module("lightning_transfer.advising.advise")  # lt.advise is the function in it
CANDIDATES: dict[str, Any] = {
    "frozen statistics, clipped": lambda: [lt.FrozenStatistics()],
    "gated transfer": lambda: [lt.GatedTransfer()],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Ask about every target and draw that is missing."""
    plan, _ = planned(argv)
    be_quiet()
    for seed in range(1, plan.seeds + 1):
        for name in plan.targets:
            draws = json.loads(PATH.read_text())["draws"] if PATH.exists() else []
            if (name, seed) not in {(each["target"], each["seed"]) for each in draws}:
                draws.append(ask(plan, name, seed))
                report = {"network": plan.networks[0][0], "shots": SHOTS, "draws": draws}
                lines = json.dumps(report).replace(', {"target": ', ',\n{"target": ')  # a line for each draw
                PATH.write_text(lines + "\n")


def ask(plan: Plan, name: str, seed: int) -> Cell:
    """Return what is said about a draw, and how long it took."""
    steps, rates = (plan.steps or STEPS[name][SHOTS]) // PART, rates_of(PLAIN, name)
    assert rates is not None, f"the rates of plain fine-tuning on {name} are not chosen yet"
    given = setting(plan, Job(PLAIN, name, SHOTS, steps, rates, seed))
    module = Tuning(with_new_head(given, seed=seed, from_probe=False), rates)
    clean = given.draw.train
    images = Photos(clean.pixels, clean.targets, augmented=True)
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=len(images) >= BATCH)
    began = time.process_time()
    with patch.object(ADVISING, "compare", partial(ADVISING.compare, clock=time.process_time)):
        advice = lt.advise(
            module,
            loader,
            candidates=CANDIDATES,
            steps=steps,
            minutes=MINUTES,
            unaugmented=clean,
            trainer={"accelerator": plan.device, "enable_progress_bar": False},
        )
    took = (time.process_time() - began) / 60
    print(f"{name}, draw {seed}: {took:.1f} minutes\n{advice}\n", flush=True)
    seen = advice.measured
    measured = {"tuned": seen.tuned, "probe": seen.probe, "parts": seen.folds, "scored": seen.scored}
    return {
        **{"target": name, "seed": seed, "steps": steps, "rates": rates},
        **{"minutes": MINUTES, "took": round(took, 2)},
        **measured,
        "best": advice.best and advice.best.name,
        "candidates": [said(each) for each in advice.candidates],
    }


def said(compared: Any) -> Cell:
    """Return what is said of a candidate."""
    found: Cell = {"name": compared.name, "verdict": compared.verdict, "parts": compared.folds}
    if compared.difference is not None:
        found |= {"points": round(compared.difference.points, 2), "half": round(compared.difference.half, 2)}
    return {**found, "cost": round(compared.cost, 2), **({"reason": compared.reason} if compared.reason else {})}


def table() -> str:
    """Return the table of what was said, beside what the trainings of the table above have shown."""
    heads = "", "parts", "advice: difference, points", "advice", "table: difference, points"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for draw in json.loads(PATH.read_text())["draws"]:
        name = draw["target"]
        took = f"{draw['took']:.1f} of {draw['minutes']:g} minutes"
        plain = f"fine-tuning has {draw['tuned']:.1%} of {draw['scored']} images right"
        lines.append(
            f"| **{name}**, draw {draw['seed']}, {draw['steps']} steps | {draw['parts']} | {plain} | {took} | |"
        )
        for each in draw["candidates"]:
            points = f"{each['points']:+.1f} ± {each['half']:.1f}" if "points" in each else ""
            shown = written(difference(each["name"], name, SHOTS))
            lines.append(f"| {each['name']} | {each['parts']} | {points} | {each['verdict']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
