"""Any dataset of images: whether it can be drawn from at random, and the labels that it lists."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_transfer.errors import TransferConfigError

if TYPE_CHECKING:
    AnyDataset: TypeAlias = Dataset[Any]
else:
    AnyDataset = Dataset  # from a generic alias, a LightningCLI file's class_path would be lost


def check_random_access(dataset: Any, name: str) -> None:
    """Refuse a stream, which an exact resume cannot go on with, and what is empty.

    Args:
        dataset: of images.
        name: "target" or "source", for messages.

    Raises:
        TransferConfigError: it is one of these.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        given = ", and pass that as target= where the callback takes it" if name == "target" else ""
        raise TransferConfigError(
            f"The {name}, a {kind}, has no length and random access. Read it once into a map-style dataset, "
            f"list(stream), or list its files and load by index{given}."
        )
    if not len(dataset):
        raise TransferConfigError(f"The {name} dataset {kind} is empty.")


def known_labels(dataset: Dataset[Any]) -> Tensor | None:
    """All labels of a dataset that lists them (`targets`, `labels`, or tensors); None where only loading would tell."""
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    tensors: tuple[Tensor, ...] = getattr(dataset, "tensors", ())
    listed = tensors[1] if len(tensors) == 2 else getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.shape[:1] == (len(dataset),) else None  # type: ignore[arg-type]
