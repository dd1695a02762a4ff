"""Write the API pages, which are made of docstrings, and the methods' cards, to a folder.

python .ci/pages.py FOLDER https://github.com/OWNER/NAME
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc
from links import ROOT, with_links

import lightning_transfer


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
