"""Measure a row of the table: two variants in turn, each pair compared by itself, the median against a bar."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from rich.progress import track
from rich.table import Table


@dataclass(frozen=True)
class Settings:
    """How much is run; `steps` are those that count."""

    repetitions: int = 21  # fits of one variant scatter by 2 %, so fewer do not decide a bar of 1.01
    batch_size: int = 16
    steps: int = 5
    empty_steps: int = 300
    scale: float = 0.01  # of the searched sources: 1 is the size in a row's name, the default almost nothing
    wide: bool = True  # also the rows that take a quarter of an hour
    folder: str = ""  # where sources are written


Run = Callable[[], float]  # runs a variant briefly and returns its seconds per step, or what else is compared
Variants = Callable[[Settings], tuple[Run, Run]]
ROWS: dict["Row", Variants] = {}
HEADS = ["cost", "median", "lowest .. highest", "bar", ""]
FORMS = {"x": "{:.3f}", "us": "{:+.0f} us", "%": "{:.1f} %", "GB": "{:.2f} GB"}


@dataclass(frozen=True)
class Row:
    """A line of the table; decorates the function that returns A and B.

    Args:
        name: what is compared.
        bar: the most that passes.
        least: the least that passes.
        unit: A / B as it is ("x"), in hundredths ("%") or billions of bytes ("GB"); or A - B in microseconds ("us").
        most: repetitions; fewer if the settings say so.
        size: whether the bar holds at "any" scale of the settings or at "full" size; "wide" rows run only on request.
        is_slow: whether a quick run leaves it out.
    """

    name: str
    bar: float | None = None
    least: float | None = None
    unit: Literal["x", "us", "%", "GB"] = "x"
    most: int | None = None
    size: Literal["any", "full", "wide"] = "any"
    is_slow: bool = False

    def __call__(self, variants: Variants) -> Variants:
        """Enter the variants into the table."""
        ROWS[self] = variants
        return variants

    def measure(self, settings: Settings) -> dict[str, Any]:
        """Run A B A B ..., compare each pair by itself, and return the median of these costs."""
        repetitions = min(settings.repetitions, self.most or settings.repetitions)
        a, b = ROWS[self](settings)
        pairs = [(a(), b()) for _ in track(range(repetitions), self.name, transient=True)]
        costs = [self._cost(*pair) for pair in pairs]
        passed = self.passes(median(costs)) if self.size == "any" or settings.scale >= 1 else None
        return {**asdict(self), "median": median(costs), "passed": passed, "costs": costs, "pairs": pairs}

    def _cost(self, a: float, b: float) -> float:
        return 1e6 * (a - b) if self.unit == "us" else (100 if self.unit == "%" else 1) * a / b

    def passes(self, cost: float) -> bool | None:
        """Return whether a cost passes its bar; None if there is no bar."""
        if self.bar is None and self.least is None:
            return None
        return (self.bar is None or cost <= self.bar) and (self.least is None or cost >= self.least)


def table(results: list[dict[str, Any]]) -> Table:
    """Return the rows as a table for the terminal."""
    shown = Table(*HEADS)
    for result in results:
        *words, verdict = _columns(result)
        shown.add_row(*words, f"[{'green' if result['passed'] else 'red'}]{verdict}" if verdict else "")
    return shown


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADS, ["---"] * len(HEADS), *map(_columns, results)]
    return "\n".join(f"| {' | '.join(words)} |" for words in lines)


def _columns(result: dict[str, Any]) -> list[str]:
    form = FORMS[result["unit"]]
    low, high = form.format(min(result["costs"])), form.format(max(result["costs"]))
    bars = [(sign, result[key]) for sign, key in (("<=", "bar"), (">=", "least")) if result[key] is not None]
    bar = " ".join(f"{sign} {form.format(value)}" for sign, value in bars)
    verdict = {True: "pass", False: "MISS", None: ""}[result["passed"]]
    return [result["name"], form.format(result["median"]), f"{low} .. {high}", bar, verdict]
