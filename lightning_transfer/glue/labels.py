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
    if isinstance(batch, list | tuple) and len(batch) > 2:
        places = [place for place, part in enumerate(batch) if place and _are_numbers(part)]
        if len(places) > 1:
            raise TransferConfigError(
                f"A batch has whole numbers, one for each image, in places {places}, of which any may be labels. Pass "
                f"labels=lambda batch: batch[{places[-1]}], or the place where they are."
            )
        given = batch[places[0]] if places else given
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


def _are_numbers(part: Any) -> bool:
    return isinstance(part, Tensor) and class_numbers(part) is not None
