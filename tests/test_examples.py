"""The examples run, here as short as they can be."""

import pathlib
import runpy

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def main(path):
    return runpy.run_path(str(EXAMPLES / path))["main"]


def test_quickstart_compares_the_methods_and_draws_them(tmp_path):
    rows = main("quickstart.py")(["--steps", "4", "--seeds", "1", "--out", str(tmp_path / "curves.png")])
    assert set(rows) == {"fine-tuning", "soft fine-tuning"}
    assert all(0 < row["test accuracy"] < 1 and 0 < row["general discrimination"] < 1 for row in rows.values())
    assert rows["fine-tuning"]["steps to plain"] <= 4
    assert (tmp_path / "curves.png").stat().st_size > 10_000
