"""Progress bars for long work, of the kind that the Trainer shows."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """Takes how many more are done, and a note to show."""

    def __call__(self, more: int, note: str = "", /) -> object:
        """Advance the bar."""


class Progress(Protocol):
    """Makes a bar from the name of the work, its amount and its unit."""

    def __call__(self, name: str, total: int, /, unit: str = "images") -> AbstractContextManager[Step]:
        """Return the bar as a context."""


@contextmanager
def no_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show nothing."""
    yield lambda more, note="": None


@contextmanager
def tqdm_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show a bar on the terminal, removed when it is full."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:

        def step(more: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(more)

        yield step


@contextmanager
def rich_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Show a bar of rich's, removed when it is full."""
    from rich.errors import LiveError
    from rich.progress import Progress as Bars

    bars = Bars(transient=True)
    task = bars.add_task(name, total=total)
    try:
        bars.start()
    except LiveError:  # older ones show one display at a time, and the Trainer's is on
        yield lambda more, note="": None
        return
    try:
        yield lambda more, note="": bars.update(task, advance=more, description=f"{name}  {note}".strip())
    finally:
        bars.stop()
