"""How a long look at all images is done: where its results are kept, who reads, what the user sees meanwhile."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_transfer.errors import check_count
from lightning_transfer.progress import Progress, no_progress, tqdm_progress


def _on_terminal(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class Scan:
    """How selection goes about its work; nothing here changes what it finds.

    Args:
        cache: file that keeps the selection and gives it back when everything it was made of is the same (a source is
            known by its length and 64 of its images); interrupted work resumes from a folder beside it.
        num_workers: processes that read images.
        device: where filters run.
        progress: makes a progress bar of a name and a total.
        say: what is done with a line of text; by default it goes to the terminal, beside the bars.
    """

    cache: str | Path | None = None
    num_workers: int = 0
    device: str | torch.device = "cpu"
    progress: Progress = tqdm_progress
    say: Callable[[str], None] = _on_terminal

    def __post_init__(self) -> None:
        check_count("num_workers", self.num_workers, least=0)

    def silent(self) -> "Scan":
        """The same work, of which nothing is seen; a bar of one's own may have more to do than to be seen."""
        progress = no_progress if self.progress is tqdm_progress else self.progress
        return replace(self, progress=progress, say=lambda _: None)
