"""The README's code runs, and its table of modules is the list that the tests run over."""

import json
import pathlib
import re
import runpy

import pytest
import torch

from tests.field import table

README = pathlib.Path(__file__).parents[1] / "README.md"
BENCHMARKS = README.parent / "examples/benchmarks"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_blocks_run_in_the_order_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 4


def test_the_tables_of_the_matrix_are_made_of_its_results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "transfer_report.py"))
    shown = {}
    for page in (path.read_text() for path in made["PAGES"]):
        for name, text in made["tables"](page).items():
            shown[name] = made["place"](page, name)
            assert shown[name] == text != ""
    assert set(shown) == set(made["TABLES"])


def test_the_table_of_searches_is_made_of_its_results():
    results = json.loads((BENCHMARKS / "results/searches.json").read_text())["short of the best"]
    page = (BENCHMARKS / "README.md").read_text().partition("## Who finds the better layers")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and "±" in line]
    for row, short in zip(rows, results.values(), strict=True):
        for name in ("swarm", "tpe", "random"):
            values = torch.tensor(short[name], dtype=torch.float64)
            shown = f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}".replace("0.", ".")
            assert shown in row


def test_the_table_of_modules_is_the_field_suites():
    section = README.read_text().partition("### Modules it has been put into, unmodified")[2].partition("\n#")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == list(table.page())
