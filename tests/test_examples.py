"""The examples run, here as short as they can be."""

import contextlib
import copy
import functools
import gc
import io
import json
import multiprocessing
import pathlib
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def main(path):
    return runpy.run_path(str(EXAMPLES / path))["main"]


@pytest.fixture(scope="module")
def made():
    """What the quickstart draws and pretrains, made once for all examples."""
    names = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    return {name: functools.cache(names[name]) for name in ("printed", "pretrain", "load_digits")}


@pytest.fixture(autouse=True)
def few_images(made, monkeypatch):
    """Whatever example asks the quickstart for images gets few of them, and a network that is pretrained already."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import quickstart

    def printed(characters, num_each, seed):
        return made["printed"](characters, min(num_each, 40), seed)

    def pretrain(characters, steps, advance):
        return copy.deepcopy(made["pretrain"](characters, steps, int))

    def load_digits():
        digits = made["load_digits"]()
        return SimpleNamespace(images=digits.images[:500], target=digits.target[:500])

    for change in (printed, pretrain, load_digits):
        monkeypatch.setattr(quickstart, change.__name__, change)


def test_quickstart_keeps_a_near_source_leaves_out_a_far_one_and_draws_both(tmp_path, capsys):
    import quickstart

    rows = quickstart.main(["--steps", "4", "--seeds", "1", "--out", str(tmp_path / "curves.png")])
    near, far = rows.values()
    assert set(near) == set(far) == {"plain fine-tuning", "soft fine-tuning", "selective joint"}
    for method in ("soft fine-tuning", "selective joint"):
        assert near[method]["domain gap"] < 0.8 <= far[method]["domain gap"]
        assert far[method]["test accuracy"] == far["plain fine-tuning"]["test accuracy"]
    assert near["soft fine-tuning"]["test accuracy"] != near["plain fine-tuning"]["test accuracy"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    assert "Warning" not in printed.out + printed.err
    assert "You defined" not in printed.out + printed.err


def test_selective_borrows_and_draws_what_it_borrowed(tmp_path):
    page = tmp_path / "run.html"
    selection = main("selective.py")(["--steps", "4", "--out", str(tmp_path / "borrowed.png"), "--page", str(page)])
    assert "<h3>SelectiveJointFinetuning</h3>" in page.read_text()
    assert selection.indices.shape == (100, 500)
    assert (tmp_path / "borrowed.png").stat().st_size > 10_000


def test_adafilter_draws_its_gates_and_makes_plain_networks(tmp_path, capsys):
    tuned = main("adafilter.py")(["--steps", "4", "--out", str(tmp_path / "gates.png")])
    assert 0 <= tuned <= 1
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("plain with") == 3


def test_gated_transfer_compares_its_halves():
    found = main("gated_transfer.py")(["--steps", "4"])
    assert len(found) == 4
    assert all(0 < accuracy < 1 for accuracy in found.values())


@pytest.mark.filterwarnings("ignore:.*so it makes their mean worse")  # true after four steps
def test_collaborative_searches_and_compares(tmp_path):
    arguments = ["--steps", "4", "--seeds", "2", "--particles", "1", "--out", str(tmp_path / "search.png")]
    found = main("collaborative.py")(arguments)
    assert len(found) == 5
    assert all(0 < accuracy < 1 for accuracy in found.values())
    assert (tmp_path / "search.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "D=35,200"], "D=35,200, k=20 runs only with --wide"),
        (["--only", "half of each", "--quick"], "half of each frozen / one plain step runs only without --quick"),
        (["--only", "nothing like it"], "no row has 'nothing like it' in its name; the rows are:"),
    ],
)
def test_costs_says_how_a_row_is_run(capsys, options, says):
    costs = runpy.run_path(str(EXAMPLES / "benchmarks/costs.py"))
    with pytest.raises(SystemExit):
        costs["main"](options)
    assert says in capsys.readouterr().err


def test_costs_measures_every_row_against_its_bar(tmp_path, thin_resnets, monkeypatch):
    """With thin networks, few images, and in this process, whose garbage is left alone."""
    costs = runpy.run_path(str(EXAMPLES / "benchmarks/costs.py"))
    selection_costs = sys.modules["selection_costs"]
    monkeypatch.setattr(gc, "collect", int)
    for numbers in (selection_costs.TOGETHER, selection_costs.AT_ONCE):
        for pixels in numbers:
            monkeypatch.setitem(numbers, pixels, 4)

    def run(command, **options):
        monkeypatch.setattr(sys, "argv", command[1:])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(command[1], run_name="__main__")
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(subprocess, "run", run)
    settings = costs["Settings"](repetitions=1, batch_size=2, steps=1, empty_steps=2)
    report = costs["main"](["--out", str(tmp_path / "costs.json")], settings)
    assert len(report["rows"]) == len(costs["ROWS"]) >= 5
    assert all(len(row["costs"]) == 1 and row["passed"] in (True, False, None) for row in report["rows"])
    assert json.loads((tmp_path / "costs.json").read_text())["versions"]["torch"]


def test_advise_measures_and_says(capsys):
    advice = main("advise.py")(["--steps", "2"])
    assert (advice.measured.images, advice.measured.steps) == (100, 2)
    assert str(advice) in capsys.readouterr().out


def test_the_matrix_goes_on_where_it_was_left_and_takes_earlier_rates(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    import transfer

    monkeypatch.setattr(transfer, "get_context", lambda how: multiprocessing.get_context("fork"))  # imports nothing
    random = np.random.default_rng(0)
    made = {
        f"{name}_{split}": values
        for split, each in (("train", 8), ("test", 2))
        for name, values in {
            "x": random.integers(0, 256, (100 * each, 32, 32, 3), np.uint8),
            "y": np.repeat(np.arange(100), each),
        }.items()
    }
    np.savez(tmp_path / "cifar100_32.npz", **made)

    def run(*options):
        sizes = ["--targets", "near", "--shots", "2", "--steps", "6", "--epochs", "1", "--workers", "1"]
        folders = ["--data", str(tmp_path), "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
        transfer.main([*sizes, *folders, *options])
        return json.loads((tmp_path / "out.json").read_text())

    rows = ["--rows", "fine-tuning", "soft"]
    first = run(*rows, "--seeds", "1")
    finals = [cell for cell in first["cells"] if "test" in cell]
    assert [cell["row"] for cell in finals] == ["fine-tuning", "soft"]
    assert len(first["cells"]) >= 2 * 5  # four rates each, and one run that counts

    soft = next(cell for cell in finals if cell["row"] == "soft")
    earlier = {"cells": [finals[0], {**soft, "lr": 0.02}]}  # not of the grid
    (tmp_path / "rates.json").write_text(json.dumps(earlier))
    more = run(*rows, "--seeds", "2", "--rates", str(tmp_path / "rates.json"))
    again = [cell for cell in more["cells"] if "test" in cell]
    assert [cell["lr"] for cell in again] == [finals[0]["lr"]] * 2 + [0.02] * 2
    assert again[0] == finals[0]  # to the second that it took: not run again
