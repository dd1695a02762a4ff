"""The code of all pages runs, their links lead somewhere, and their tables are made of results."""

import json
import pathlib
import re
import runpy

import pytest
import torch

from lightning_transfer.commands.line import parser
from tests.field import table

ROOT = pathlib.Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "examples/benchmarks"
CARDS = sorted(ROOT.glob("lightning_transfer/methods/*/README.md"))
GUIDES = [*sorted(ROOT.glob("examples/guides/*.md")), ROOT / "examples/your_own_method/README.md"]
WHOLE_PATH = ROOT / "examples/guides/from_a_folder.md"
PAGES = [README, *CARDS, *GUIDES, *sorted(BENCHMARKS.glob("*.md")), ROOT / "CONTRIBUTING.md"]


def run_blocks(page, names):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return len(blocks)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_blocks_run_in_the_order_of_the_pages(thin_resnets, tmp_path, monkeypatch):
    """A card's examples use what the README's made, and nothing of another card; the whole path is complete alone."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert run_blocks(README, names)
    assert all(run_blocks(card, dict(names)) for card in CARDS)
    assert sum(run_blocks(guide, {} if guide == WHOLE_PATH else dict(names)) for guide in GUIDES)


def anchors(page):
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_commands_have_the_arguments_that_they_take():
    text = " ".join(page.read_text().replace("\n", " ") for page in [*PAGES, ROOT / "examples/tutorial.ipynb"])
    commands = re.findall(r"`lightning-transfer (\w+ [^`]+)`", text)
    assert len(commands) >= 6
    for command in commands:
        parser().parse_args(command.split())


def test_the_front_page_is_short_and_every_method_has_a_card():
    assert len(README.read_text().splitlines()) <= 220
    methods = {path.parent.name for path in ROOT.glob("lightning_transfer/methods/*/callback.py")}
    assert {card.parent.name for card in CARDS} == methods
    for card in CARDS:
        assert f"({card.relative_to(ROOT)})" in README.read_text()


def test_the_tables_of_the_matrix_are_made_of_its_results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "transfer_report.py"))
    shown = {}
    for page in (path.read_text() for path in made["PAGES"]):
        for name, text in made["tables"](page).items():
            shown[name] = made["place"](page, name)
            assert shown[name] == text != ""
    assert set(shown) == set(made["TABLES"])


def test_the_caption_of_the_first_picture_is_made_of_results_and_is_short(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "transfer_report.py"))
    page = README.read_text()
    assert page.count(made["CAPTION"]) == 1
    assert made["with_caption"](page) == page
    caption = page.partition(made["CAPTION"])[2].strip().partition("\n\n")[0]
    assert caption.startswith("*")
    assert len(caption.splitlines()) <= 3


def test_the_table_of_searches_is_made_of_its_results():
    results = json.loads((BENCHMARKS / "results/searches.json").read_text())["short of the best"]
    page = (BENCHMARKS / "costs.md").read_text().partition("## Who finds the better layers")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and "±" in line]
    for row, short in zip(rows, results.values(), strict=True):
        for name in ("swarm", "tpe", "random"):
            values = torch.tensor(short[name], dtype=torch.float64)
            shown = f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}".replace("0.", ".")
            assert shown in row


def test_the_table_of_methods_says_what_the_field_suite_shows():
    """`TABLE` has a CNN and a vision transformer; rows of METHODS say who takes source images."""
    lines = WHOLE_PATH.read_text().partition("| method |")[2].splitlines()[2:]
    rows = {line.split("|")[1].strip(" `["): line.split("|")[2:6] for line in lines if "|" in line}
    names = {
        "soft": "Soft",
        "selective": "Selective",
        "adafilter": "Ada",
        "gated": "Gated",
        "aux": "its",
        "several": "Coll",
    }
    for method, start in names.items():
        cnn, transformer, source, second = next(cells for name, cells in rows.items() if name.startswith(start))
        for shape, cell in (("TimmClassifier", cnn), ("VisionTransformer", transformer)):
            expected = table.TABLE[shape][method]
            said = {"works": "yes", "senseless": "no", "refused": "with"}[expected.kind]
            assert cell.split()[0].strip(",") == said
            assert all(f"`{option}=`" in cell for option in expected.cure)
        assert ("needed" in source) == (method in ("soft", "selective"))
        assert ("needed" in second) == (method == "several")


def test_the_table_of_modules_is_the_field_suites():
    lines = (ROOT / "examples/guides/modules.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == list(table.page())
    assert f"{len(table.TABLE)} kinds of modules" in README.read_text()
