"""Find the labels of any batch, their kind, the criterion for them, and which predictions are right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class

Kind: TypeAlias = Literal["class numbers", "one logit", "multi-hot", "soft"]
Labels: TypeAlias = Callable[[Any], Tensor]
KEYS = ("label", "labels", "target", "targets")


def labels_in(batch: Any) -> Any:
    """Return the labels of a batch (images, labels, ...) or of a mapping with one of `KEYS`; None if it has none.

    Of three entries or more it is the one that holds class numbers; None if several do.
    """
    if isinstance(batch, Mapping):
        return next((batch[key] for key in KEYS if key in batch), None)
    places = label_places(batch)
    if len(places) > 1:
        return None
    return batch[places[0] if places else 1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def find_labels(batch: Any) -> Tensor:
    """Return the class numbers of a batch, as `labels_in` finds them.

    Raises:
        TransferConfigError: there are none, several entries may be labels, or labels are not class numbers.
    """
    if len(places := label_places(batch)) > 1:
        raise TransferConfigError(either(places, "labels=lambda batch: batch[{}]"))
    given = labels_in(batch)
    if not isinstance(given, Tensor):
        raise TransferConfigError(
            f"No labels found in a batch that is {a_class(batch)}; expected (B,) class numbers. Pass "
            "labels=lambda batch: ..., or give batches (images, labels)."
        )
    labels = class_numbers(given)
    if labels is None:
        hint = label_hint(given, "labels=lambda batch: {}")
        raise TransferConfigError(
            f"Labels have shape {tuple(given.shape)} and type {given.dtype}; expected (B,) class numbers. {hint} Pass "
            "labels=lambda batch: ... to make them. Several networks also take other labels, together with their "
            "criterion: labels=lambda batch: batch[1], loss=..."
        )
    return labels


def label_places(batch: Any) -> list[int]:
    """Return the positions of class numbers in a batch of three entries or more; none in (images, labels)."""
    if not isinstance(batch, list | tuple) or len(batch) < 3:
        return []
    return [
        place
        for place, part in enumerate(batch)
        if place and isinstance(part, Tensor) and class_numbers(part) is not None
    ]


def either(places: Sequence[int], made: str) -> str:
    """Return the error text if several entries of a batch, or of a sample, may be its labels.

    Args:
        places: positions of these entries.
        made: the fix to show, with {} for a position.

    Example:
        >>> either([1, 2], "adapt=lambda batch: (batch[0], batch[{}])")
        'Entries [1, 2] are whole numbers, one for each image, and any may be the labels. Pass \
adapt=lambda batch: (batch[0], batch[1]), or adapt=lambda batch: (batch[0], batch[2]).'
    """
    choices = ", or ".join(made.format(place) for place in places)
    return f"Entries {places} are whole numbers, one for each image, and any may be the labels. Pass {choices}."


def class_numbers(labels: Tensor) -> Tensor | None:
    """Return labels (B,) or (B, 1) of any whole type as (B,) class numbers of int64; None for other labels.

    >>> class_numbers(torch.tensor([[2], [0]], dtype=torch.int16))
    tensor([2, 0])
    """
    is_whole = not labels.is_floating_point() and not labels.is_complex()
    return labels.flatten().long() if is_whole and _is_one_each(labels) else None


def label_hint(labels: Tensor, made: str) -> str:
    """Describe labels that are not class numbers, and show how to make class numbers of them.

    Args:
        labels: of a batch.
        made: the fix to show, with {} for an expression of `batch[1]`.
    """
    has_values = labels.numel() and not labels.is_meta and labels.layout == torch.strided
    if not has_values or labels.is_complex():
        return ""
    values = labels.detach().double()
    are_shares = labels.ndim == 2 and labels.shape[1] > 1 and bool(((values >= 0) & (values <= 1)).all())
    if are_shares and bool((values.sum(1) - 1).abs().max() < 1e-3):
        if bool((values.amax(1) == 1).all()):
            return f"One-hot labels: {made.format('batch[1].argmax(1)')}."
        return "These are soft labels, for example of mixup: do not mix images before training_step."
    if are_shares:
        return "These are several labels for each image, not class numbers."
    if _is_one_each(labels) and bool((values == values.round()).all()):
        if bool((values.abs() == 1).all() & (values < 0).any()):
            return f"For labels that are -1 and 1: {made.format('(batch[1].long() + 1) // 2')}."
        return (
            f"Class numbers of another type: {made.format('batch[1].long()')}." if class_numbers(labels) is None else ""
        )
    if labels.ndim == 2 and not labels.is_floating_point():
        return f"These are {labels.shape[1]} numbers for each image: {made.format('batch[1][:, 0]')} takes the first."
    return ""


def kind_of(labels: Tensor, num_outputs: int, *, is_binary: bool = False) -> Kind | None:
    """Return the kind of labels for (B, num_outputs) logits; None if they do not fit. Reads values.

    With a binary criterion, rows with one label for each image are multi-hot.

    >>> kind_of(torch.eye(3), 3), kind_of(torch.tensor([[1.0, 1, 0]]), 3), kind_of(torch.tensor([0.0, 1]), 1)
    ('soft', 'multi-hot', 'one logit')
    """
    if num_outputs > 1 and _is_one_each(labels):
        return None if class_numbers(labels) is None else "class numbers"
    is_fit = _is_one_each(labels) if num_outputs == 1 else labels.shape[1:] == (num_outputs,)
    if not is_fit or labels.is_complex() or not bool(((labels >= 0) & (labels <= 1)).all()):
        return None
    if num_outputs == 1:
        return "one logit"
    return "soft" if not is_binary and bool(((labels.double().sum(1) - 1).abs() < 1e-3).all()) else "multi-hot"


def criterion_of(kind: Kind) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean criterion for labels of a kind."""
    return _cross_entropy if kind in ("class numbers", "soft") else _binary_cross_entropy


def is_right(logits: Tensor, labels: Tensor, kind: Kind | None = None) -> Tensor:
    """Return 1 for each image whose logits are right, otherwise 0; with several labels, the share of right signs.

    Args:
        logits: (..., B, outputs).
        labels: (B,), (B, 1) or (B, outputs).
        kind: of the labels; found by reading them if left out.

    Returns:
        (..., B) of float32.

    Raises:
        TransferConfigError: the labels do not fit the logits.

    Example:
        >>> is_right(torch.tensor([[2.0], [2.0]]), torch.tensor([1, 0])).tolist()
        [1.0, 0.0]
    """
    kind = kind or kind_of(labels, logits.shape[-1])
    if kind is None:
        raise TransferConfigError(
            f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}, with {logits.shape[-1]} logits for each "
            "image; expected class numbers, one 0 or 1 for one logit, or a row of as many from 0 to 1."
        )
    if kind == "one logit":
        return ((logits[..., 0] > 0) == (labels.flatten() > 0.5)).float()
    if kind == "multi-hot":
        return ((logits > 0) == (labels > 0.5)).float().mean(-1)
    numbers = class_numbers(labels)
    return (logits.argmax(-1) == (labels.argmax(-1) if numbers is None else numbers)).float()


def ways_to_be_right(logits: Tensor, labels: Tensor, kind: Kind | None) -> tuple[Tensor, Tensor]:
    """Return how right each image is in two ways, (2, networks, B), and above 0 where the first counts.

    Rows of a binary criterion count by their signs, but by the largest logit if every image has one label.
    """
    if kind != "multi-hot":
        return is_right(logits, labels, kind).expand(2, *logits.shape[:2]), torch.ones((), device=logits.device)
    ways = torch.stack([is_right(logits, labels, "multi-hot"), is_right(logits, labels, "soft")])
    return ways, ((labels.double().sum(1) - 1).abs() >= 1e-3).any().to(ways)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    numbers = class_numbers(labels)
    return F.cross_entropy(logits, labels.to(logits.dtype) if numbers is None else numbers)


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.reshape(logits.shape).to(logits.dtype))


def _is_one_each(labels: Tensor) -> bool:
    return labels.ndim == 1 or labels.shape[1:] == (1,)
