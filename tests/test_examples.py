"""The examples run, here as short as they can be."""

import json
import pathlib
import runpy

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def main(path):
    return runpy.run_path(str(EXAMPLES / path))["main"]


def test_quickstart_compares_the_methods_and_draws_them(tmp_path):
    rows = main("quickstart.py")(["--steps", "4", "--seeds", "1", "--out", str(tmp_path / "curves.png")])
    names = {"fine-tuning", "soft fine-tuning", "selective joint", "AdaFilter", "gated transfer", "collaborative"}
    assert set(rows) == names
    assert all(0 < row["test accuracy"] < 1 and 0 < row["general discrimination"] < 1 for row in rows.values())
    assert rows["fine-tuning"]["steps to plain"] <= 4
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_selective_borrows_and_draws_what_it_borrowed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    selection = main("selective.py")(["--steps", "4", "--out", str(tmp_path / "borrowed.png")])
    assert selection.indices.shape == (100, 500)
    assert (tmp_path / "borrowed.png").stat().st_size > 10_000


def test_adafilter_draws_its_gates_and_makes_plain_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    shares = main("adafilter.py")(["--steps", "4", "--out", str(tmp_path / "gates.png")])
    assert all(0 <= share <= 1 for share in shares.values())
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("plain with") == 3


def test_gated_transfer_compares_its_halves(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    found = main("gated_transfer.py")(["--steps", "4"])
    assert len(found) == 3
    assert all(0 < accuracy < 1 for accuracy in found.values())


def test_collaborative_searches_and_compares(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    arguments = ["--steps", "4", "--seeds", "2", "--particles", "1", "--out", str(tmp_path / "search.png")]
    found = main("collaborative.py")(arguments)
    assert len(found) == 5
    assert all(0 < accuracy < 1 for accuracy in found.values())
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_costs_measures_every_row_against_its_bar(tmp_path):
    costs = runpy.run_path(str(EXAMPLES / "benchmarks/costs.py"))
    settings = costs["Settings"](repetitions=1, batch_size=2, steps=1, empty_steps=2)
    report = costs["main"](["--out", str(tmp_path / "costs.json")], settings)
    assert len(report["rows"]) == len(costs["ROWS"]) >= 5
    assert all(len(row["costs"]) == 1 and row["passed"] in (True, False, None) for row in report["rows"])
    assert json.loads((tmp_path / "costs.json").read_text())["versions"]["torch"]


def test_advise_measures_and_says(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    advice = main("advise.py")(["--steps", "2"])
    assert advice.measured.scored == 100
    assert str(advice) in capsys.readouterr().out
