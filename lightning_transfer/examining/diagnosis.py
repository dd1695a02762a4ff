"""Hold what an examination has found, and print it as a page in plain words."""

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 5  # names, classes or images that a finding lists


@dataclass(frozen=True)
class Finding:
    """Holds one thing that will go wrong, and its fix.

    Attributes:
        name: of the kind of finding.
        where: the layers, options, datasets or files that it concerns.
        found: what was seen there.
        fix: how to fix it, usually code.
    """

    name: str
    where: str
    found: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """Holds what was found in a project; `print` shows it, with the fix of each finding.

    Attributes:
        subject: what was examined.
        findings: what will go wrong.
        not_checked: what could not be checked, or only in part, and why.
    """

    subject: str
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()

    def __str__(self) -> str:
        number = len(self.findings)
        lines = [f"{number or 'No'} finding{'s' * (number != 1)} in {self.subject}."]
        for place, each in enumerate(self.findings, 1):
            lines += ["", f"{place}. {each.name}: {each.where}", f"   Found: {each.found}", f"   Fix: {each.fix}"]
        if self.not_checked:
            lines += ["", "Not checked:", *(f" - {each}" for each in self.not_checked)]
        return "\n".join(lines)


def listed(items: Sequence[object]) -> str:
    """Return the first few items, and how many more there are.

    >>> listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
