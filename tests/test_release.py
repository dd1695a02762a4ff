"""What is published says what it needs and whom to cite."""

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import lightning_transfer
from lightning_transfer.cards import PAPERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"faiss": "faiss-cpu", "lightning_utilities": "lightning", "yaml": "pyyaml", "PIL": "pillow"}
WITH_OTHERS = {"pytorch_lightning", "rich"}  # only where the user has it, in place of what is declared


def declared(*extras):
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {Requirement(line).name for line in lines}


def imported(*, inside_functions):
    """The packages of others that modules import at once, or only when something is used."""
    found = set()
    for path in (ROOT / "lightning_transfer").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if inside_functions else tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in found - {*sys.stdlib_module_names, "lightning_transfer"}}


def test_what_is_imported_is_declared():
    assert imported(inside_functions=False) <= declared()
    assert imported(inside_functions=True) - WITH_OTHERS <= declared("report", "search", "cli")
    assert "tqdm" in imported(inside_functions=True)


def test_the_papers_of_all_methods_can_be_cited():
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = {paper.get("url", f"https://doi.org/{paper.get('doi')}") for paper in papers}
    assert cited == {*PAPERS.values()}
    for card in ROOT.glob("lightning_transfer/methods/*/README.md"):
        link = re.search(r"Paper: \[.*?\]\((.*?)\)", card.read_text())
        assert link[1] in cited, card


def test_the_newest_section_of_the_changelog_is_of_this_version_and_so_is_the_citation():
    """A version that is only in one of these places is published under a wrong name."""
    text = (ROOT / "CHANGELOG.md").read_text()
    newest, *_ = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (lightning_transfer.__version__, str(cited["date-released"]))
    assert cited["version"] == lightning_transfer.__version__
    assert text.count("## [Unreleased]\n") == 1
    assert PROJECT["dynamic"] == ["version"]  # read from lightning_transfer/version.py


def test_links_and_pictures_of_the_published_page_lead_to_the_release():
    """A page at a package index has no files beside it."""
    lead = runpy.run_path(str(ROOT / ".ci/links.py"))["with_links"]
    page, place = lead(ROOT / "README.md", "https://github.com/o/n", "v1"), "https://github.com/o/n/{}/v1/"
    links = re.findall(r"(!?)\[[^\[\]]*\]\((.*?)\)", page)
    assert len(links) > 20
    for picture, link in links:
        if not link.startswith(place.partition("{}")[0]):
            assert f"]({link})" in (ROOT / "README.md").read_text()  # to another site
            continue
        path = link.removeprefix(place.format("raw" if picture else "blob"))
        assert (ROOT / path.partition("#")[0]).exists()
    code = [re.findall(r"```.*?```", text, re.DOTALL) for text in (page, (ROOT / "README.md").read_text())]
    assert code[0] == code[1]
