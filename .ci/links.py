"""Lead the links of a page to the repository, where pages on another site do not have the files beside them.

python .ci/links.py README.md https://github.com/OWNER/NAME REVISION   rewrites the page
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_links(page: Path, repository: str, revision: str = "main") -> str:
    """Return a page's text whose links to other files, and its pictures, lead to the repository."""

    def lead(match: re.Match[str]) -> str:
        start, path = match[1], match[2]
        if path.startswith(("https:", "#")):
            return match[0]
        place, _, anchor = path.partition("#")
        kind = "raw" if start.startswith("!") else "blob"
        name = (page.resolve().parent / place).resolve().relative_to(ROOT).as_posix()
        return f"{start}({repository}/{kind}/{revision}/{name}{'#' if anchor else ''}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", lead, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_links(page, *sys.argv[2:]), encoding="utf-8")
