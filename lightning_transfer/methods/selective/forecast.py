"""Measure on the first described source images how long a selection will take."""

import time

from torch import Tensor

from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.store import Stored

MEASURED = 16  # source images that are searched as if they were a target, to know what a pair takes


def search_seconds(target: Stored, rows: Stored, root: Tensor, *, k: int, num_rows: int, num_searches: float) -> float:
    """Return how long searches take at most, without pruning: one keeps k of each target image, others very few.

    Args:
        target: all target images.
        rows: some source images.
        root: (numbers,) root of the weights.
        k: neighbors of each target image.
        num_rows: of the source.
        num_searches: over the source, each of as many images as the target has.
    """
    began = time.monotonic()
    exact_neighbors(target, rows, k=1, root=root, prune=False)
    scan = time.monotonic() - began
    few, asked = Stored(rows.store, rows.images[:MEASURED]), min(k, len(rows))
    began = time.monotonic()
    exact_neighbors(few, rows, k=asked, root=root, prune=False, all_in_double=True)
    pair = (time.monotonic() - began) / (len(few) * asked)
    return scan * num_searches * num_rows / len(rows) + pair * len(target) * k
