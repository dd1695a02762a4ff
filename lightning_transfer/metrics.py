"""Measure how well features separate classes that the network was never trained on (general discrimination)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_transfer.errors import TransferConfigError, check_count

__all__ = ["GeneralDiscrimination"]

BLOCK = 2**24  # similarities in memory at once


class GeneralDiscrimination(Metric):
    """Measures the leave-one-out k-nearest-neighbor accuracy of features, over classes that neither task trains on.

    General discrimination is a concept of soft fine-tuning's paper (arXiv 1909.02236); this measure of it is ours: each
    image is classified by a majority vote of its k nearest other images by cosine similarity; the nearer class wins a
    tie. Rows are sorted before they are compared, so the result does not depend on how images are split over batches
    and processes. A distributed sampler repeats some images; pass `indices`, and each image counts once.

    Memory: the features of up to `limit` images in float32; in `compute` also two copies of them and one block of
    similarities.

    Args:
        k: neighbors that vote.
        limit: the most images to keep.

    Raises:
        TransferConfigError: there are more images than `limit`, or k or fewer.

    Example:
        >>> metric = GeneralDiscrimination(k=1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([7, 7, 9, 9]))
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    features: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]

    def __init__(self, *, k: int = 5, limit: int = 50_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("k", k, least=1)
        check_count("limit", limit, least=2)
        self.k = k
        self.limit = limit
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_state("indices", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Add images.

        Args:
            features: (batch, width), of any float type.
            labels: (batch,) class indices.
            indices: (batch,) indices of the images in the dataset; an image that was added before is left out.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1] or labels.is_floating_point():
            raise TransferConfigError(
                f"Found features {tuple(features.shape)} and {labels.dtype} labels {tuple(labels.shape)}; expected "
                "(batch, width) and (batch,) of class indices. Pool and flatten the features first."
            )
        if indices is not None and indices.shape != labels.shape:
            raise TransferConfigError(
                f"Found indices {tuple(indices.shape)}; expected {tuple(labels.shape)}, one for each image."
            )
        if not torch.isfinite(features).all():
            raise TransferConfigError("Features hold NaN or infinity. Did training diverge? Lower the learning rate.")
        held = sum(len(part) for part in self.features) + len(features)
        if held > self.limit:
            raise TransferConfigError(
                f"{held} images are more than limit={self.limit}. Measure on fewer, or pass limit={held} if "
                f"{held * features.shape[1] * 4 / 2**20:.0f} MiB of features fit into memory."
            )
        self.features.append(features.detach().float())
        labels = labels.detach().long()  # a type of few bits could not hold the indices
        self.labels.append(labels)
        self.indices.append(torch.full_like(labels, -1) if indices is None else indices.to(labels))

    def compute(self) -> Tensor:
        """Return the share of images whose k nearest others vote for their class."""
        features, labels = _sorted(_joined(self.features), _joined(self.labels), _joined(self.indices))
        if len(features) <= self.k:
            raise TransferConfigError(f"k={self.k} needs more than {self.k} different images; found {len(features)}.")
        features = torch.nn.functional.normalize(features.double(), dim=1)
        correct = torch.zeros((), dtype=torch.int64, device=features.device)
        block = max(1, BLOCK // len(features))
        for start in range(0, len(features), block):
            similarity = features[start : start + block] @ features.T
            similarity[torch.arange(len(similarity)), start + torch.arange(len(similarity))] = -torch.inf
            neighbors = labels[similarity.topk(self.k, dim=1).indices]
            correct += (_majority(neighbors) == labels[start : start + block]).sum()
        return correct.float() / len(features)


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    """Return a list state as one tensor, which it already is after several processes are synchronized."""
    if isinstance(state, Tensor):
        return state
    if not state:
        raise TransferConfigError("No features were given; call update(features, labels) first.")
    return torch.cat(state)


def _sorted(features: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows by their values, and keep the first of those with the same index."""
    columns, classes, places = (part.cpu().numpy() for part in (features, labels, indices))
    order = np.lexsort((*columns.T[::-1], classes, places))  # the last key counts first
    index = places[order]
    is_again = np.concatenate([[False], (index[1:] == index[:-1]) & (index[1:] >= 0)])
    kept = torch.from_numpy(order[~is_again]).to(features.device)
    return features[kept], labels[kept]


def _majority(votes: Tensor) -> Tensor:
    """Return the most frequent class in each row of (n, k) votes, nearest first; ties go to the first."""
    counts = (votes[:, :, None] == votes[:, None, :]).sum(2)
    return votes.gather(1, counts.argmax(1, keepdim=True))[:, 0]
