"""Find nearly all of the nearest descriptors in a source too large for an exact search, and measure the recall.

Roots of histograms, projected to few coordinates, are kept as bytes in a faiss index. Its nearest candidates by
Euclidean distance are measured again with the true distance (ours).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_transfer.methods.selective.bounds import FITTED, Sketcher
from lightning_transfer.methods.selective.exact import exact_neighbors, measure, nearest_first
from lightning_transfer.methods.selective.pictures import spread
from lightning_transfer.methods.selective.search import InMemory, Rows, blocks

COORDINATES = 128
BYTES = COORDINATES + 1  # of an image in the index
ASKED = 8  # times k candidates are measured again
CHECKED = 32  # queries whose exact neighbors are found too, to measure the recall


def approximate_neighbors(queries: Rows, source: Rows, *, k: int, root: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return nearly the k nearest source rows of every query.

    Args:
        queries: flat histograms.
        source: flat histograms.
        k: how many.
        root: (numbers,) root of the weights.

    Returns:
        Distances in float64 and indices, each (n, k), nearest first; and the share of the true k nearest that was
        found, measured on some queries.
    """
    import faiss

    fitted = torch.tensor(spread(len(source), FITTED))
    sketcher = Sketcher(source.take(fitted), root, source.shape[1])
    sketcher.basis = sketcher.basis[:, :COORDINATES]

    def sketch(histograms: Tensor) -> NDArray[np.float32]:
        return sketcher(histograms)[:, :-1].contiguous().numpy()  # the last number is a length, not a coordinate

    index = faiss.IndexScalarQuantizer(sketcher.basis.shape[1] + 1, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    index.train(sketch(source.take(fitted)))
    for start, stop in blocks(source, math.prod(source.shape)):
        index.add(sketch(source.read(start, stop)))
    found = []
    for start, stop in blocks(queries, math.prod(queries.shape)):
        histograms = queries.read(start, stop)
        near = torch.from_numpy(index.search(sketch(histograms), min(ASKED * k, len(source)))[1])
        every = torch.ones(near.shape, dtype=torch.bool)
        distances = measure(histograms, source, root, every, near).view(near.shape)
        found.append(nearest_first(distances, near, k))
    distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
    asked = torch.tensor(spread(len(queries), CHECKED))
    exact = exact_neighbors(InMemory(queries.take(asked), queries.shape), source, k=k, root=root)[1]
    pairs = zip(exact.tolist(), indices[asked].tolist(), strict=True)
    recall = sum(len({*a} & {*b}) for a, b in pairs) / exact.numel()
    return distances, indices, recall
