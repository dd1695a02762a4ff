"""Draw the images that a probe learns from, and find how much each of them counts."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.datasets import index_in, known_labels

FEW = 5  # images of each class at least


def draw(dataset: Dataset[Any], weights: Tensor | None, *, most: int) -> tuple[list[int], Tensor]:
    """Return which images of a dataset to look at, in their order, and the importance of each.

    Of a dataset with more than `most` images and listed labels, every class gets its share of `most`, and at least a
    few images, which then stand for all of their class.

    Args:
        dataset: that the train loader serves.
        weights: by which the loader draws the images of the user's dataset; None if it draws all alike.
        most: how many images to look at, but for classes with few.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.rand(100, 2), torch.tensor([0] * 90 + [1] * 10))
        >>> drawn, importance = draw(data, None, most=20)
        >>> len(drawn), (importance[0] / importance[-1]).item()
        (23, 2.5)
    """
    number: int = len(dataset)  # type: ignore[arg-type]
    order, importance = torch.randperm(number), torch.ones(number)
    drawn, labels = order[:most], known_labels(dataset)
    if number > most and labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        parts = []
        for label in labels.unique():
            members = order[labels[order] == label]
            parts.append(members[: max(round(len(members) * most / number), min(FEW, len(members)))])
            importance[parts[-1]] = len(members) / len(parts[-1])
        drawn = torch.cat(parts)
    places = drawn.sort().values.tolist()
    importance = importance[places]
    if weights is not None:
        importance = importance * weights[[index_in(dataset, place) for place in places]]
    return places, importance / importance.mean()
