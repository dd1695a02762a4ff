"""Show progress bars for long work, of the same kind as the Trainer's, and durations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """Takes how many more items are done, and a note to show."""

    def __call__(self, more: int, note: str = "", /) -> object:
        """Advance the bar."""


class Progress(Protocol):
    """Makes a bar from the name of the work, the number of items and their unit."""

    def __call__(self, name: str, total: int, /, unit: str = "images") -> AbstractContextManager[Step]:
        """Return the bar as a context."""


@contextmanager
def no_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show nothing."""
    yield lambda more, note="": None


@contextmanager
def tqdm_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show a bar of tqdm, removed when it is full."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:

        def step(more: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(more)

        yield step


@contextmanager
def rich_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show a bar of rich, removed when it is full."""
    from rich.errors import LiveError
    from rich.progress import Progress as Bars

    bars = Bars(transient=True)
    task = bars.add_task(name, total=total)
    try:
        bars.start()
    except LiveError:  # older versions show one display at a time, and the Trainer's is active
        yield lambda more, note="": None
        return
    try:
        yield lambda more, note="": bars.update(task, advance=more, description=f"{name}  {note}".strip())
    finally:
        bars.stop()


def duration(seconds: float) -> str:
    """Return a time in the unit in which it is easy to read.

    >>> duration(8), duration(300), duration(9000)
    ('8 s', '5.0 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
