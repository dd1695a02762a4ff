"""Check that the loss of a run's first step is a mean over the images, as the weight of an added term assumes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_transfer.batches import Kind, class_numbers, criterion_of, kind_of, labels_in
from lightning_transfer.compiling import outside_graphs
from lightning_transfer.errors import TransferConfigError

SURE = 1e-3  # share by which a sum may differ from the mean times a number
LEAST = 1e-3  # a smaller mean decides nothing; of it, rounding is a larger share
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}  # share by which two computations of one loss may differ
CLOSE_AT_HALF = 0.02  # the same at half precision


def is_close(found: float, expected: float, dtype: torch.dtype) -> bool:
    """Return whether two losses agree, computed in two ways from logits of a type; NaN agrees with everything."""
    close = CLOSE.get(dtype, CLOSE_AT_HALF)
    return not abs(found - expected) > close * max(abs(found), abs(expected), LEAST)


class MeanLoss(NamedTuple):
    """Holds a mean loss, the numbers that would make a sum of it, and the type of the logits."""

    name: str
    mean: float
    numbers: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def is_sum(self, loss: float) -> bool:
        """Return whether a loss is clearly the mean times one of the numbers."""
        return self.mean > LEAST and any(
            number > 1 and abs(loss / self.mean / number - 1) < SURE for number in self.numbers
        )


class Heard:
    """Keeps a head's output in the step's own pass, outside of compiled graphs, as a forward hook."""

    def __init__(self, *, is_idle: bool = True) -> None:
        self.is_idle = is_idle  # a copy is
        self.logits: list[Tensor] = []

    def __reduce__(self) -> tuple[type["Heard"], tuple[()]]:
        return (Heard, ())

    def __call__(self, head: nn.Module, args: Any, output: Any) -> None:
        """Keep the output."""
        if not self.is_idle:
            self._keep(output)

    @outside_graphs
    def _keep(self, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self.logits.append(output.detach())


class FirstLoss:
    """Checks the loss of one step, the first after `reset`.

    Args:
        labels: finds the labels in a batch.
    """

    def __init__(self, labels: Callable[[Any], Any] = labels_in) -> None:
        self.labels = labels
        self.reset()

    def reset(self) -> None:
        """Check the next step, such as the first of a new run."""
        self._is_due = True
        self._batch: Any = None
        self._heard: Heard | None = None
        self._handle: Any = None

    def __reduce__(self) -> tuple[type["FirstLoss"], tuple[Any]]:
        return (FirstLoss, (self.labels,))

    def listen(self, head: nn.Module, batch: Any) -> None:
        """Record the head's output from now on, if this is the first step after `reset`."""
        self.end()
        if self._is_due:
            self._batch, self._heard = batch, Heard(is_idle=False)
            self._handle = head.register_forward_hook(self._heard)

    def end(self) -> None:
        """Remove the hook from the user's head."""
        if self._handle is not None:
            self._handle.remove()
        if self._heard is not None:
            self._heard.is_idle = True  # a guard of compiled graphs that hold the hook
        self._batch = self._heard = self._handle = None

    def criteria(self) -> list[MeanLoss]:
        """Return the criteria that fit the step's logits and labels, once; none if these cannot be read."""
        heard, batch = self._heard, self._batch
        self.end()
        if heard is None:
            return []
        self._is_due = False
        labels = self.labels(batch)
        if len(heard.logits) != 1 or not isinstance(labels, Tensor):
            return []
        return list(fitting_criteria(heard.logits[0], labels))


def fitting_criteria(logits: Tensor, labels: Tensor) -> Iterator[MeanLoss]:
    """Yield the usual criteria that fit logits (B, classes) and the labels of a batch."""
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


def is_binary(loss: Tensor, found: list[MeanLoss]) -> bool:
    """Return whether a loss is binary cross-entropy, by the criteria that fit its logits and labels."""
    binary = [known for known in found if known.name.startswith("binary")] if loss.numel() == 1 else []
    return any(is_close(float(loss.detach()), known.mean, known.dtype) for known in binary)


def kind_by(criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Kind | None:
    """Return the kind of labels for (B, outputs) logits, as a criterion reads them."""
    may_be_binary = labels.shape == logits.shape and criterion is not F.cross_entropy
    binary = may_be_binary and is_binary(criterion(logits, labels), list(fitting_criteria(logits, labels)))
    return kind_of(labels, logits.shape[1], is_binary=binary)


def refuse_sum(loss: Tensor, found: list[MeanLoss], *, to_do: str) -> None:
    """Refuse a loss that is clearly a sum over the images: the weight of an added term assumes a mean.

    Args:
        loss: of the user's step.
        found: criteria of the step's logits and labels.
        to_do: the fix to show if the loss has to stay a sum.

    Raises:
        TransferConfigError: the loss is a sum.
    """
    value = float(loss.detach()) if found and loss.numel() == 1 else 0.0
    for criterion in found:
        if criterion.is_sum(value):
            times = round(value / criterion.mean)
            raise TransferConfigError(
                f"training_step returns a loss of {value:.4f}, {times} times {criterion.name} ({criterion.mean:.4f}): "
                f"a sum, or a mean times the batch size. Next to it an added term has 1/{times} of its weight. Return "
                f"the mean over the images, or {to_do}."
            )
