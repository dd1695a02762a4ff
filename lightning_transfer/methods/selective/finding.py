"""Find the nearest source images, exactly or nearly so. Several processes each search their own share of the source."""

from functools import cached_property

import torch
from torch import Tensor

from lightning_transfer import ranks
from lightning_transfer.methods.selective.approximate import ApproximateIndex
from lightning_transfer.methods.selective.exact import exact_neighbors, merged
from lightning_transfer.methods.selective.pictures import spread
from lightning_transfer.methods.selective.search import InMemory, Rows

CHECKED = 32  # queries whose exact neighbors are found too, to measure the recall


class Finder:
    """Finds the nearest among the shares of all processes; exact ones do not depend on the shares.

    Args:
        rows: the share of this process.
        mine: (rows,) their numbers among all source images, rising.
        root: (numbers,) root of the weights.
        device: where an exact search computes, if it is a GPU.
        is_approximate: whether `nearest` uses an index, which is built once.
    """

    def __init__(
        self, rows: Rows, mine: Tensor, *, root: Tensor, device: torch.device, is_approximate: bool = False
    ) -> None:
        self.rows, self.mine, self.root, self.device = rows, mine, root, device
        self.is_approximate = is_approximate

    @cached_property
    def _index(self) -> ApproximateIndex:
        return ApproximateIndex(self.rows, self.root)

    def nearest(self, queries: Rows, k: int, *, all_in_double: bool = False) -> tuple[Tensor, Tensor]:
        """Return the distances and indices, each (n, k), of the k nearest source images of every query."""
        return self._search(queries, k, is_approximate=self.is_approximate, all_in_double=all_in_double)

    def recall(self, queries: Rows, indices: Tensor) -> float:
        """Return which share of the true nearest is in (n, k) indices, measured on some queries."""
        asked = torch.tensor(spread(len(queries), CHECKED))
        some = InMemory(queries.take(asked), queries.shape)
        true = self._search(some, indices.shape[1], is_approximate=False)[1]
        pairs = zip(true.tolist(), indices[asked].tolist(), strict=True)
        return sum(len({*a} & {*b}) for a, b in pairs) / true.numel()

    def _search(
        self, queries: Rows, k: int, *, is_approximate: bool, all_in_double: bool = False
    ) -> tuple[Tensor, Tensor]:
        def search() -> tuple[Tensor, Tensor]:
            if not len(self.mine):
                return torch.empty(len(queries), 0, dtype=torch.float64), torch.empty(len(queries), 0).long()
            own = min(k, len(self.mine))
            if is_approximate:
                distances, local = self._index.nearest(queries, own)
            else:
                distances, local = exact_neighbors(
                    queries, self.rows, k=own, root=self.root, all_in_double=all_in_double, device=self.device
                )
            return distances, self.mine[local]

        return merged(*ranks.together(search), k)
