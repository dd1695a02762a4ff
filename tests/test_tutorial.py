"""The tutorial runs cell by cell, here as short as it can be, and what is committed of it was run in order."""

import json
import pathlib
import re

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TUTORIAL = EXAMPLES / "tutorial.ipynb"
CODE = [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]
SIZES = "PRETRAINING_STEPS, STEPS = 200, 60\n"  # as a reader runs it


@pytest.mark.filterwarnings("ignore:The kept source head starts at a loss of")  # true after four steps
@pytest.mark.filterwarnings("ignore::lightning_transfer.NoEffectWarning")  # and so the source may be far
def test_every_cell_runs_in_order(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    source = "\n\n".join("".join(cell["source"]) for cell in CODE)
    assert source.count(SIZES) == 1
    names: dict[str, object] = {}
    exec(compile(source.replace(SIZES, "PRETRAINING_STEPS, STEPS = 4, 5\n"), TUTORIAL, "exec"), names)
    assert names["handed_on"].num_classes == 11
    assert names["steps"] == [1, 2, 3, 4, 5]
    printed = capsys.readouterr().out
    trained, loaded = (re.findall(f"{start}: test accuracy (.*)", printed) for start in ("soft fine-tuning", "alone"))
    assert trained == loaded


def test_what_is_committed_was_run_in_order_and_names_no_machine():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [cell for cell in CODE if cell["metadata"]]  # where Jupyter writes when a cell was run
    text = re.sub(r'"image/png": ".*"', "", TUTORIAL.read_text())
    assert not re.findall(r"/(?:home|root|tmp|work|usr|Users|mnt|opt)\b|[A-Z]:\\|site-packages", text)
    assert TUTORIAL.stat().st_size < 300_000
