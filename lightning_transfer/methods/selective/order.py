"""Order the draws of borrowed images: one neighbor of each target image in turn (the authors' code)."""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_transfer.randomness import seed_of
from lightning_transfer.source.stream import in_turns


class NeighborOrder:
    """Draws one neighbor of every target image in turn, uniformly (the authors' code).

    It depends only on (seed, position). Every turn has the target images in a new order; those without neighbors are
    skipped.

    Args:
        pool: neighbors of all target images, one list after the other.
        counts: (targets,) how many neighbors each has.
        times: (targets,) how many neighbors of each are drawn in a turn.
        seed: of the order.
    """

    def __init__(self, pool: Tensor, counts: Tensor, times: Tensor, seed: int) -> None:
        self.pool = pool
        self.counts = counts
        self.starts = counts.cumsum(0) - counts
        self.turns = torch.arange(len(counts)).repeat_interleave(torch.where(counts > 0, times, 0))
        self.seed = seed

    def __call__(self, positions: range) -> list[int]:
        """Return the source images at positions of the endless order."""
        found: list[int] = []
        for turn, part in in_turns(positions, len(self.turns)):
            order, draws = _turn(len(self.turns), self.seed, turn)
            targets = self.turns[order[part]]
            places = self.starts[targets] + (draws[part] * self.counts[targets]).long()
            found += self.pool[places].tolist()
        return found


@lru_cache(maxsize=4)
def _turn(num: int, seed: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return (num,) numbers in the order of a turn, and (num,) draws from 0 up to 1."""
    generator = torch.Generator().manual_seed(seed_of(seed, turn))
    return torch.randperm(num, generator=generator), torch.rand(num, dtype=torch.float64, generator=generator)
