"""Find nearly all of the nearest descriptors in a source too large for an exact search.

Roots of histograms, projected to few coordinates, are kept as bytes in a faiss index. Its nearest candidates by
Euclidean distance are measured again with the true distance (ours).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_transfer.methods.selective.bounds import FITTED, Sketcher
from lightning_transfer.methods.selective.exact import measure, nearest_first
from lightning_transfer.methods.selective.pictures import spread
from lightning_transfer.methods.selective.search import Rows, blocks

COORDINATES = 128
BYTES = COORDINATES + 1  # of an image in the index
ASKED = 8  # times k candidates are measured again


class ApproximateIndex:
    """Finds nearly the nearest source rows.

    Args:
        source: flat histograms, read once for the index; those of the candidates are read again in each search.
        root: (numbers,) root of the weights.
    """

    def __init__(self, source: Rows, root: Tensor) -> None:
        import faiss

        self.source, self.root = source, root
        fitted = source.take(torch.tensor(spread(len(source), FITTED)))
        self.sketcher = Sketcher(fitted, root, source.shape[1])
        self.sketcher.basis = self.sketcher.basis[:, :COORDINATES]
        num_coordinates = self.sketcher.basis.shape[1] + 1
        self.index = faiss.IndexScalarQuantizer(num_coordinates, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
        self.index.train(self._sketch(fitted))
        for start, stop in blocks(source, math.prod(source.shape)):
            self.index.add(self._sketch(source.read(start, stop)))

    def nearest(self, queries: Rows, k: int) -> tuple[Tensor, Tensor]:
        """Return distances in float64 and indices, each (n, k), nearest first, of nearly the k nearest of each query.

        Args:
            queries: flat histograms.
            k: how many.
        """
        found = []
        for start, stop in blocks(queries, math.prod(queries.shape)):
            histograms = queries.read(start, stop)
            near = torch.from_numpy(self.index.search(self._sketch(histograms), min(ASKED * k, len(self.source)))[1])
            every = torch.ones(near.shape, dtype=torch.bool)
            distances = measure(histograms, self.source, self.root, every, near).view(near.shape)
            found.append(nearest_first(distances, near, k))
        distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
        return distances, indices

    def _sketch(self, histograms: Tensor) -> NDArray[np.float32]:
        return self.sketcher(histograms)[:, :-1].contiguous().numpy()  # the last number is a length, not a coordinate
