"""Write the table of a result, as text and as HTML."""

from collections.abc import Iterable, Sequence
from html import escape


def text_table(rows: Sequence[Sequence[str]], *, is_right: bool = False) -> list[str]:
    """Return the lines of a table; its columns after the first are aligned to the left, or to the right.

    >>> text_table([("network", "ms"), ("a", "1.5")], is_right=True)
    ['network   ms', 'a        1.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = str.rjust if is_right else str.ljust
    return ["  ".join([first.ljust(widths[0]), *map(align, cells, widths[1:])]).rstrip() for first, *cells in rows]


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first row is its header."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    header, *others = rows
    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in others)}</table>"
