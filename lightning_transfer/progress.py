"""What a user sees of long work: a bar of the kind that is in use."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """Told how many more are done, and what is worth saying of it."""

    def __call__(self, more: int, note: str = "", /) -> object:
        """Go on."""


class Progress(Protocol):
    """Makes a bar: of what work, how much there is, and of what things."""

    def __call__(self, name: str, total: int, /, unit: str = "images") -> AbstractContextManager[Step]:
        """The bar, while it lasts."""


@contextmanager
def no_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """Nothing to be seen."""
    yield lambda more, note="": None


@contextmanager
def tqdm_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """A bar on the terminal, gone when it is full."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:

        def step(more: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(more)

        yield step


@contextmanager
def rich_progress(name: str, total: int, /, unit: str = "images") -> Iterator[Step]:
    """A bar of rich's, gone when it is full."""
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
