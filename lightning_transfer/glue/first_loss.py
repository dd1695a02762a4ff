"""Whether the loss of a run's first step is what the weight of a term beside it means: a mean over the images."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_transfer.batches import class_numbers, criterion_of, labels_in
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.tracing import outside_graphs

SURE = 1e-3  # share by which a sum may differ from the mean times a number
LEAST = 1e-3  # a mean below which says nothing
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}  # share by which two ways to the same loss may differ
CLOSE_AT_HALF = 0.02  # and at half precision


def is_close(found: float, expected: float, dtype: torch.dtype) -> bool:
    """Whether two losses are one, computed in two ways from logits of a type; or neither a number."""
    close = CLOSE.get(dtype, CLOSE_AT_HALF)
    return not abs(found - expected) > close * max(abs(found), abs(expected))


class MeanLoss(NamedTuple):
    """A mean loss, by which numbers it is multiplied where it is a sum, and the type of the logits."""

    name: str
    mean: float
    numbers: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def is_sum(self, loss: float) -> bool:
        """Whether a loss is surely the mean times one of the numbers."""
        return self.mean > LEAST and any(
            number > 1 and abs(loss / self.mean / number - 1) < SURE for number in self.numbers
        )


class Heard:
    """Forward hook on a head: what it gives in the step's own pass; outside of compiled graphs, as all that listens."""

    def __init__(self) -> None:
        self.is_idle = False
        self.logits: list[Tensor] = []

    def __reduce__(self) -> tuple[type["Heard"], tuple[()]]:
        return (Heard, ())

    def __call__(self, head: nn.Module, args: Any, output: Any) -> None:
        """Keep what is given."""
        if not self.is_idle:
            self._keep(output)

    @outside_graphs
    def _keep(self, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self.logits.append(output.detach())


class FirstLoss:
    """Looks at the loss of one step, the first in which it is asked to.

    Args:
        labels: finds the labels in a batch.
    """

    def __init__(self, labels: Callable[[Any], Any] = labels_in) -> None:
        self.labels = labels
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self._is_due = True
        self._batch: Any = None
        self._heard: Heard | None = None
        self._handle: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FirstLoss":
        return FirstLoss(self.labels)

    def __reduce__(self) -> tuple[type["FirstLoss"], tuple[Any]]:
        return (FirstLoss, (self.labels,))

    def listen(self, head: nn.Module, batch: Any) -> None:
        """Hear what a head gives from here on, if this is the first step."""
        self.end()
        if self._is_due:
            self._batch, self._heard = batch, Heard()
            self._handle = head.register_forward_hook(self._heard)

    def end(self) -> None:
        """Leave nothing with the user's head."""
        if self._handle is not None:
            self._handle.remove()
        if self._heard is not None:
            self._heard.is_idle = True  # a compiled graph that holds it is guarded by that
        self._batch = self._heard = self._handle = None

    def criteria(self) -> list[MeanLoss]:
        """Return what is known of the step's logits and labels, once; nothing where they cannot be read."""
        heard, batch = self._heard, self._batch
        self.end()
        if heard is None:
            return []
        self._is_due = False
        labels = self.labels(batch)
        if len(heard.logits) != 1 or not isinstance(labels, Tensor):
            return []
        return list(criteria(heard.logits[0], labels))


def criteria(logits: Tensor, labels: Tensor) -> Iterator[MeanLoss]:
    """The usual criteria that fit logits (B, classes) and the labels of a batch."""
    if logits.ndim != 2 or labels.shape[:1] != logits.shape[:1] or labels.device != logits.device:
        return
    num_images, num_classes = logits.shape
    numbers = class_numbers(labels)
    if numbers is not None:
        is_known = num_images and int(numbers.min()) >= 0 and int(numbers.max()) < max(num_classes, 2)
        if is_known and num_classes > 1:
            mean = float(criterion_of("class numbers")(logits, numbers))
            yield MeanLoss("cross_entropy", mean, (num_images,), logits.dtype)
        if not is_known or num_classes > 1:
            return
        labels = numbers[:, None]
    if labels.shape == logits.shape and bool(((labels >= 0) & (labels <= 1)).all()):
        binary = float(criterion_of("multi-hot")(logits, labels))
        yield MeanLoss("binary_cross_entropy_with_logits", binary, (num_images, logits.numel()), logits.dtype)
        if num_classes > 1:
            yield MeanLoss("cross_entropy", float(criterion_of("soft")(logits, labels)), (num_images,), logits.dtype)


def refuse_sum(loss: Tensor, found: list[MeanLoss], *, to_do: str) -> None:
    """Refuse a loss that is surely a sum over the images, next to which a term's weight means something else.

    Args:
        loss: of the user's step.
        found: criteria of the step's logits and labels.
        to_do: what to write where it has to stay a sum.

    Raises:
        TransferConfigError: it is one.
    """
    value = float(loss.detach()) if found and loss.numel() == 1 else 0.0
    for criterion in found:
        if criterion.is_sum(value):
            times = round(value / criterion.mean)
            raise TransferConfigError(
                f"training_step gives a loss of {value:.4f}, {times} times {criterion.name} ({criterion.mean:.4f}): a "
                f"sum, or a mean times the batch size, so that what is added with a weight counts 1/{times} of it. "
                f"Return the mean over the images, or {to_do}."
            )
