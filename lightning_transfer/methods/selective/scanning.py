"""Define how all images are scanned: where results are kept, how images are read, and what is shown meanwhile."""

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
    """Holds the options of how a selection works; they do not change its result.

    Args:
        cache: file that keeps the selection; it is used again if everything it was made of is the same (a source is
            identified by its length, 64 of its images and what it lists about all). Interrupted work resumes from a
            folder next to the file.
        num_workers: processes that read images, for `select_neighbors`.
        device: where filters run, and with CUDA the exact search.
        progress: makes a progress bar from a name and a total.
        say: called with each line of text; by default it prints to the terminal.

    Example:
        >>> Scan(cache="selection.safetensors", num_workers=2).device
        'cpu'
    """

    cache: str | Path | None = None
    num_workers: int = 0
    device: str | torch.device = "cpu"
    progress: Progress = tqdm_progress
    say: Callable[[str], None] = _on_terminal

    def __post_init__(self) -> None:
        check_count("num_workers", self.num_workers, least=0)

    def silent(self) -> "Scan":
        """Return the same options without output; a bar of the user's is kept, because it may do more than show."""
        progress = no_progress if self.progress is tqdm_progress else self.progress
        return replace(self, progress=progress, say=lambda _: None)
