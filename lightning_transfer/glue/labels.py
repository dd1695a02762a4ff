"""Where the labels are in somebody's batch."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from lightning_transfer.batches import class_numbers, label_hint, labels_in
from lightning_transfer.errors import TransferConfigError

Labels: TypeAlias = Callable[[Any], Tensor]


def find_labels(batch: Any) -> Tensor:
    """The labels of a batch: (images, labels, ...), or a mapping with "label", "labels", "target" or "targets".

    Raises:
        TransferConfigError: there are none, or they are no class numbers.
    """
    given = labels_in(batch)
    if not isinstance(given, Tensor):
        raise TransferConfigError(
            f"No labels found in a batch that is a {type(batch).__name__}; expected (B,) class numbers. Pass "
            "labels=lambda batch: ..., or give batches (images, labels)."
        )
    labels = class_numbers(given)
    if labels is None:
        hint = label_hint(given, "labels=lambda batch: {}")
        raise TransferConfigError(
            f"Labels have shape {tuple(given.shape)} and type {given.dtype}; expected (B,) class numbers. {hint} Pass "
            "labels=lambda batch: ... to make them; several networks take others beside their criterion: "
            "labels=lambda batch: batch[1], loss=..."
        )
    return labels
