"""The README's code runs, and its table of modules is the list that the tests run over."""

import pathlib
import re

import pytest

from tests.contracts.test_user_modules import CASES

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_blocks_run_in_the_order_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module.__name__)
def test_every_tested_module_is_in_the_table(case):
    says = case.module.__doc__.rstrip(".")
    row = next(line for line in README.read_text().splitlines() if line.startswith(f"| {says} |"))
    assert row.endswith("| yes | yes |" if case.joint else "| yes | refused by name |")
