"""Measure on the first described source images how long a selection will take."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.search import Rows
from lightning_transfer.methods.selective.store import Stored

MEASURED = 16  # source images that are searched as if they were a target, to know what a pair takes


def search_seconds(
    target: Stored, rows: Stored, root: Tensor, *, k: int, num_rows: int, num_searches: float, device: torch.device
) -> float:
    """Return how long searches take at most, without pruning: one keeps k of each target image, others very few.

    Args:
        target: all target images.
        rows: some source images.
        root: (numbers,) root of the weights.
        k: neighbors of each target image.
        num_rows: of the source.
        num_searches: over the source, each of as many images as the target has.
        device: of the searches.
    """
    few, asked = Stored(rows.store, rows.images[:MEASURED]), min(k, len(rows))
    search = partial(_seconds, root=root, device=device)
    search(few, few, k=1)  # a device is started by the first product
    start = search(target, few, k=1)
    row = max(0.0, search(target, rows, k=1) - start) / max(1, len(rows) - len(few))
    pair = search(few, rows, k=asked, all_in_double=True) / (len(few) * asked)
    return num_searches * (start + row * num_rows) + pair * len(target) * k


def _seconds(queries: Rows, source: Rows, *, k: int, **options: Any) -> float:
    began = time.monotonic()
    exact_neighbors(queries, source, k=k, prune=False, **options)
    return time.monotonic() - began
