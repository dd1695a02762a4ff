"""What `lightning_transfer.advise` measures on the targets of the matrix; how good its advice is, the report says.

Three draws of each setting, the learning rate that the matrix has chosen for plain fine-tuning. Needs the networks that
transfer.py has pretrained; what is measured is kept, and an interrupted run resumes.

    python examples/benchmarks/advice.py --data FOLDER --work FOLDER
"""

import argparse
import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache, partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transfer import Plan, be_quiet, material
from transfer_data import relatives, target
from transfer_networks import PRECISION, Classifier
from transfer_results import FOLDER, PLAIN, evidence, looks, settings, shots
from transfer_rows import BATCH, Setting

import lightning_transfer as lt
from lightning_transfer.advising.advise import LINES
from lightning_transfer.advising.evidence import MEASURED, Expected, expect, place
from lightning_transfer.advising.evidence import Setting as Known
from lightning_transfer.advising.measuring import Measured

SEEDS = (1, 2, 3)
ORDER = itemgetter("target", "images", "seed")
INDEPENDENT = [row for row in LINES if row not in MEASURED]


def look(job: tuple[str, int | None, int, float], plan: Plan) -> dict[str, Any]:
    """What is measured of one draw."""
    be_quiet()
    name, shots, seed, lr = job
    images, (network, second), _ = material(plan)
    draw = target(name, plan.data, shots=shots, seed=seed)
    setting = Setting(draw, images, network, second, plan.work, f"{name}-{seed}", plan.steps)
    torch.manual_seed(seed)
    mine: Any = copy.deepcopy(network)
    mine.reset_classifier(draw.num_classes)
    loader = DataLoader(draw.train, batch_size=BATCH, shuffle=True)
    options = {"accelerator": "cpu", "precision": PRECISION}
    given: Any = {"source": setting.task(), "unaugmented": setting.seen(), "trainer": options}
    return {"target": name, "seed": seed, "lr": lr, **asdict(lt.advise(Classifier(mine, lr), loader, **given).measured)}


Counts = Any  # (2, 3, 2) with and without a target's relatives; for and against a method, intervals; right, and all


@cache
def judged() -> dict[str, tuple[list[str], Counts, Counts]]:
    """How each setting's draws were placed, and how good the advice was that leaves the target out of what is known.

    A method that is recommended should have gained on average in the matrix, one that is advised against lost. Counted
    for each draw, and last for each method and setting once, whatever number of draws said the same.
    """
    known = [Known(**each) for each in evidence()]
    found: dict[str, tuple[list[str], Counts, Counts]] = {}
    for setting, (name, cells) in zip(known, settings(), strict=True):
        strangers = [each for each in known if each.target != setting.target]
        unrelated = [each for each in known if each.target not in relatives(setting.target)]
        counts, places, said = np.zeros((2, 3, 2), dtype=int), [], set()
        for each in looks(name, setting.shots, cells[name, PLAIN][0]["lr"]):
            measured = Measured(**{field.name: each[field.name] for field in fields(Measured) if field.name in each})
            places.append(place(measured.distance))
            judgements = right(setting, expect(measured, strangers, INDEPENDENT))
            without_relatives = right(setting, expect(measured, unrelated, INDEPENDENT))
            counts += [_counts(judgements), _counts(without_relatives)]
            said |= {*judgements}
        found[f"{setting.target}, {setting.shots:.0f} of a class"] = places, counts, _counts(said)
    return found


def hits() -> str:
    """The table of that."""
    heads = ["target", "said to be", "recommended and gained", "advised against and lost", "without its relatives"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = judged()
    for name, (places, counts, _) in found.items():
        said = ", ".join(f"{place} {places.count(place)}" for place in dict.fromkeys(places))
        lines.append(f"| {name} | {said} | {_counted(counts)} |")
    return "\n".join([*lines, f"| together | | {_counted(sum(counts for _, counts, _ in found.values()))} |"])


def hit_rate() -> str:
    """The same in a sentence."""
    found = judged().values()
    (gained, lost, inside), _ = sum(counts for _, counts, _ in found)
    gained_once, lost_once, _ = sum(once for *_, once in found)
    known = [setting["differences"] for setting in evidence()]
    runs = [seeds[row] for seeds in known for row in INDEPENDENT if row in seeds]
    gains = sum(mean(each) > 0 for each in runs), len(runs)
    return (
        f"On three draws of each of {len(known)} settings, whose targets were left out of what it knows in turn, "
        f"{_of(gained)} of its recommendations gained, and {_of(lost)} of what it advised against lost; "
        f"a method counted once in each setting, {_of(gained_once)} and {_of(lost_once)}. "
        f"{_of(inside)} changes lay inside the interval that it gave. Of all methods in all settings {_of(gains)} gain."
    )


def right(setting: Known, expected: Sequence[Expected]) -> list[tuple[str, int, bool]]:
    """Of each method what was said, for (0), against (1) or an interval (2), and whether that was right."""
    found = []
    for each in (each for each in expected if each.method in setting.differences):
        change = mean(setting.differences[each.method])
        found.append((each.method, 2, abs(change - each.points) <= each.interval))
        if each.verdict in ("recommended", "advised against"):
            is_against = each.verdict == "advised against"
            found.append((each.method, int(is_against), change < 0 if is_against else change > 0))
    return found


def _counts(judgements: Iterable[tuple[str, int, bool]]) -> Counts:
    """(3, 2) for, against, and intervals: how many were right, and how many were said."""
    counts = np.zeros((3, 2), dtype=int)
    for _, what, is_right in judgements:
        counts[what] += [is_right, 1]
    return counts


def _counted(counts: Any) -> str:
    (gained, lost), alone = [[_of(each) for each in side[:2]] for side in counts]
    return f"{gained} | {lost} | {', '.join(alone)}"


def _of(pair: Any) -> str:
    return f"{pair[0]} of {pair[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npz files; torchvision's sets are loaded without")
    parser.add_argument("--work", type=Path, default=Path("transfer_runs"), help="where transfer.py keeps its work")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    kept: list[dict[str, Any]] = []
    jobs: list[tuple[str, int | None, int, float]] = []
    for name, cells in settings():
        plain = cells[name, PLAIN][0]
        there = looks(name, shots(cells, name), plain["lr"])
        seeds = {*SEEDS} - {look["seed"] for look in there}
        kept += there
        jobs += [(name, plain["shots"], seed, plain["lr"]) for seed in sorted(seeds)]
    with get_context("spawn").Pool(options.workers) as pool:
        for found in pool.imap_unordered(partial(look, plan=Plan(options.data, options.work)), jobs):
            kept.append(found)
            (FOLDER / "advice.json").write_text(json.dumps(sorted(kept, key=ORDER), indent=1))
            print(found, flush=True)


if __name__ == "__main__":
    main()
