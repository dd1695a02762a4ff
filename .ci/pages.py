"""Write the API pages, which are made of docstrings, and the methods' cards, to a folder.

python .ci/pages.py FOLDER https://github.com/OWNER/NAME
"""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc

import lightning_transfer

ROOT = Path(__file__).resolve().parents[1]


def with_links(card: Path, repository: str) -> str:
    """Return a card's text whose links to other files lead to the repository."""

    def lead(match: re.Match[str]) -> str:
        start, path = match[1], match[2]
        if path.startswith(("https:", "#")):
            return match[0]
        place, _, anchor = path.partition("#")
        kind = "raw" if start.startswith("!") else "blob"
        name = (card.parent / place).resolve().relative_to(ROOT).as_posix()
        return f"{start}({repository}/{kind}/main/{name}{'#' if anchor else ''}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", lead, card.read_text(encoding="utf-8"))


def main(out: Path, repository: str) -> None:
    """Write a page for each public module and one for each card, and name the cards on the first page."""
    cards = {path.parent.name: path for path in sorted(ROOT.glob("lightning_transfer/methods/*/README.md"))}
    texts = {name: with_links(path, repository) for name, path in cards.items()}
    links = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name}.html)" for name, text in texts.items()]
    about = [lightning_transfer.__doc__ or "", "The methods, each with its options and figures:", "", *links]
    lightning_transfer.__doc__ = "\n".join(about)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("lightning_transfer", output_directory=out)
    for name, text in texts.items():
        page: Any = ModuleType(name, text)
        page.__docformat__ = "markdown"
        html = pdoc.render.html_module(pdoc.doc.Module(page), all_modules={})
        (out / f"{name}.html").write_text(html, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
