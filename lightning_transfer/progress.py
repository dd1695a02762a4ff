"""What a user sees of long work: a bar of the kind that is in use."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Step: TypeAlias = Callable[[int], object]  # told how many more are done
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Step]]  # of what, and how many there are


@contextmanager
def no_progress(name: str, total: int) -> Iterator[Step]:
    """Nothing to be seen."""
    yield lambda _: None


@contextmanager
def tqdm_progress(name: str, total: int) -> Iterator[Step]:
    """A bar on the terminal, gone when it is full."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=" images", dynamic_ncols=True, leave=False) as bar:
        yield bar.update


@contextmanager
def rich_progress(name: str, total: int) -> Iterator[Step]:
    """A bar of rich's, gone when it is full."""
    from rich.errors import LiveError
    from rich.progress import Progress as Bars

    bars = Bars(transient=True)
    task = bars.add_task(name, total=total)
    try:
        bars.start()
    except LiveError:  # older ones show one display at a time, and the Trainer's is on
        yield lambda _: None
        return
    try:
        yield lambda more: bars.advance(task, more)
    finally:
        bars.stop()
