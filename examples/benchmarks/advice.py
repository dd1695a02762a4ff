"""What `lightning_transfer.advise` measures on the targets of the matrix; how good its advice is, the report says.

Three draws of each target, the learning rate that the matrix has chosen for plain fine-tuning. Needs the networks that
transfer.py has pretrained; what is measured is kept, and a run that is broken off goes on.

    python examples/benchmarks/advice.py --data FOLDER --work FOLDER
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transfer import Plan, be_quiet, material
from transfer_data import relatives, target
from transfer_results import EVIDENCE, FOLDER, PLAIN, evidence, finals, read
from transfer_rows import BATCH, Classifier, Setting

import lightning_transfer as lt
from lightning_transfer.advising.advise import LINES
from lightning_transfer.advising.evidence import Expected, expect, place
from lightning_transfer.advising.evidence import Setting as Known
from lightning_transfer.advising.measuring import Measured

SEEDS = (1, 2, 3)


def look(job: tuple[str, int, float], plan: Plan) -> dict[str, Any]:
    """What is measured of one draw."""
    be_quiet()
    name, seed, lr = job
    images, (network, second), _ = material(plan)
    draw = target(name, plan.data, shots=plan.shots, seed=seed)
    setting = Setting(draw, images, network, second, plan.work, f"{name}-{seed}", plan.steps)
    torch.manual_seed(seed)
    mine: Any = copy.deepcopy(network)
    mine.reset_classifier(draw.num_classes)
    loader = DataLoader(draw.train, batch_size=BATCH, shuffle=True)
    options = {"accelerator": "cpu", "precision": "bf16-mixed"}
    given: Any = {"source": setting.task(), "unaugmented": setting.seen(), "trainer": options}
    return {"target": name, "seed": seed, "lr": lr, **asdict(lt.advise(Classifier(mine, lr), loader, **given).measured)}


def hits(looks: list[dict[str, Any]]) -> str:
    """How good advice is on targets that are left out of what it knows, with their relatives or without.

    A method that is recommended should have gained on average in the matrix, one that is advised against lost.
    """
    known = [Known(**each) for each in evidence()]
    lines = [
        "| target | said to be | recommended and gained | advised against and lost | the same without its relatives |",
        "|---|---|---|---|---|",
    ]
    counts = np.zeros((2, 2, 2), dtype=int)  # with and without relatives; for and against; right, and all
    for setting in known:
        strangers = [each for each in known if each.target != setting.target]
        unrelated = [each for each in known if each.target not in relatives(setting.target)]
        mine, places = np.zeros((2, 2, 2), dtype=int), []
        for look in (look for look in looks if look["target"] == setting.target):
            measured = Measured(**{each.name: look[each.name] for each in fields(Measured)})
            places.append(place(measured.distance))
            for number, others in enumerate((strangers, unrelated)):
                mine[number] += right(setting, expect(measured, others, [*LINES]))
        said = ", ".join(f"{place} {places.count(place)}" for place in dict.fromkeys(places))
        lines.append(f"| {setting.target} | {said} | {_counted(mine)} |")
        counts += mine
    return "\n".join([*lines, f"| together | | {_counted(counts)} |"])


def right(setting: Known, expected: Sequence[Expected]) -> Any:
    """(2, 2) for and against: how many were right, and how many were said."""
    found = np.zeros((2, 2), dtype=int)
    for each in expected:
        if each.verdict != "no difference shown" and each.method in setting.differences:
            is_against = each.verdict == "advised against"
            gained = mean(setting.differences[each.method]) > 0
            found[int(is_against)] += [int(gained != is_against), 1]
    return found


def _counted(counts: Any) -> str:
    (gained, lost), alone = [[f"{yes} of {all_}" for yes, all_ in each] for each in counts]
    return f"{gained} | {lost} | {', '.join(alone)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npz files; torchvision's sets are loaded without")
    parser.add_argument("--work", type=Path, default=Path("transfer_runs"), help="where transfer.py keeps its work")
    parser.add_argument("--out", type=Path, default=FOLDER / "advice.json")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    cells = {key: runs for file in EVIDENCE for key, runs in finals(read(file)).items()}
    rates = {name: runs[0]["lr"] for (name, row), runs in cells.items() if row == PLAIN}
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    known = [each for each in known if each["lr"] == rates.get(each["target"])]
    there = {(each["target"], each["seed"]) for each in known}
    jobs = [(name, seed, lr) for name, lr in rates.items() for seed in SEEDS if (name, seed) not in there]
    with get_context("spawn").Pool(options.workers) as pool:
        for found in pool.imap_unordered(partial(look, plan=Plan(options.data, options.work)), jobs):
            known.append(found)
            options.out.write_text(json.dumps(sorted(known, key=lambda each: (each["target"], each["seed"])), indent=1))
            print(found, flush=True)


if __name__ == "__main__":
    main()
