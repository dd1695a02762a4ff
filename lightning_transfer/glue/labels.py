"""Where the labels are in somebody's batch."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from lightning_transfer.errors import TransferConfigError

Labels: TypeAlias = Callable[[Any], Tensor]


def find_labels(batch: Any) -> Tensor:
    """The labels of a batch: (images, labels, ...), or a mapping with "label", "labels", "target" or "targets".

    Raises:
        TransferConfigError: there are none, or they are no class numbers.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in ("label", "labels", "target", "targets") if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        if isinstance(labels, Tensor):
            raise TransferConfigError(
                f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected (B,) class numbers. Pass "
                "labels=lambda batch: ... to make them (of one-hot labels: batch[1].argmax(1)); several networks take "
                "others beside their criterion: labels=lambda batch: batch[1], loss=..."
            )
        raise TransferConfigError(
            f"No labels found in a batch that is a {type(batch).__name__}; expected (B,) class numbers. Pass "
            "labels=lambda batch: ..., or give batches (images, labels)."
        )
    return labels
