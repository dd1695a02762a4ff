"""Labels of any batch: where they are, and what they are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEYS = ("label", "labels", "target", "targets")


def labels_in(batch: Any) -> Any:
    """Return what stands where labels do, in (images, labels, ...) or a mapping with one of `KEYS`; None without."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in KEYS if key in batch), None)
    return batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def class_numbers(labels: Tensor) -> Tensor | None:
    """Return (B,) class numbers, also of labels (B, 1); None where labels are others.

    >>> class_numbers(torch.tensor([[2], [0]])).tolist()
    [2, 0]
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    return labels if labels.ndim == 1 else labels.squeeze(1) if labels.shape[1:] == (1,) else None


def label_hint(labels: Tensor, made: str) -> str:
    """Return what labels are that are no class numbers, and how those are made of them.

    Args:
        labels: of a batch.
        made: the line to write, with {} where an expression of `batch[1]` stands.
    """
    values = labels.detach().double()
    are_shares = labels.ndim == 2 and labels.shape[1] > 1 and bool(((values >= 0) & (values <= 1)).all())
    if are_shares and bool((values.sum(1) - 1).abs().max() < 1e-3):
        if bool((values.amax(1) == 1).all()):
            return f"One-hot labels: {made.format('batch[1].argmax(1)')}."
        return "These are soft labels, such as mixup makes: leave mixing of images out."
    if are_shares:
        return "These are several labels an image, which are no class numbers."
    if labels.dtype == torch.bool or (labels.shape[1:] in ((), (1,)) and bool((values == values.round()).all())):
        return f"Class numbers of another type: {made.format('batch[1].long()')}."
    if labels.ndim == 2 and not labels.is_floating_point():
        return f"These are {labels.shape[1]} numbers an image: {made.format('batch[1][:, 0]')} takes the first."
    return ""
