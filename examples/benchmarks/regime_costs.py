"""Measure what a step of each row costs, in steps of plain fine-tuning: all in turn, in one process."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from regime import RESULTS, SHOTS, STEPS, Job, be_quiet, planned, setting
from regime_network import Rates
from regime_results import COSTS, written_rows
from regime_rows import PLAIN, ROWS, Setting
from regime_training import fit

PATH = RESULTS / "step-costs.json"
TARGET, SEED, RATES = "trashnet", 1, Rates(0.001, 1.0)
SHORT, LONG, ROUNDS = 3, 11, 3  # steps of two trainings, whose difference has no part that is there once


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows that have a result, or only those of `--rows`, and write their ratios into results/."""
    plan, _ = planned(argv)
    be_quiet()
    given = setting(plan, Job(PLAIN, TARGET, SHOTS, STEPS[TARGET][SHOTS], RATES, SEED))
    given = replace(given, draw=replace(given.draw, validation=given.draw.validation.only([0])))
    names = [name for name in written_rows(SHOTS) if ROWS[name].is_trained and name in plan.rows]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        plain = seconds(PLAIN, given, plan.device)
        for name in names:
            ratios[name].append(round(seconds(name, given, plan.device) / plain, 3))
            print(name, ratios[name][-1], flush=True)
    PATH.write_text(json.dumps(COSTS | ratios) + "\n")


def seconds(name: str, given: Setting, device: str) -> float:
    """Return the CPU seconds of some steps of a row."""
    taken = []
    for steps in (SHORT, LONG):
        began = time.process_time()
        fit(ROWS[name], replace(given, steps=steps), seed=SEED, rates=RATES, device=device, stop=None)
        taken.append(time.process_time() - began)
    return taken[1] - taken[0]


if __name__ == "__main__":
    main()
