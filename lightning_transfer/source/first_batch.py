"""Check the first source batch and the kept head: whether it fits the labels, and whether values are plausible."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_transfer.datasets import known_labels
from lightning_transfer.glue.entering import IN_STEP, Entry, images_in, is_unlike
from lightning_transfer.glue.logs import say
from lightning_transfer.pending import when
from lightning_transfer.pixel_ranges import RAW
from lightning_transfer.randomness import seeded
from lightning_transfer.roles import out_width
from lightning_transfer.source.view import NetworkView

UNTRAINED = 0.9  # share of the loss of guessing; a kept head that starts above it does not fit these labels


def introduce(
    view: NetworkView,
    head: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loss: float,
    images: Tensor,
    labels: Tensor,
    *,
    target: Any,
    taken: Sequence[Tensor],
) -> None:
    """Log one line about the first source batch, and warn if something looks wrong beside the target batch.

    Args:
        view: runs images.
        head: of the source.
        criterion: of the source.
        loss: of the first source batch.
        images: of that batch.
        labels: of that batch.
        target: batch of the step.
        taken: what the network's first layer took in the step.
    """
    num_classes, source, step = out_width(head), view.source, view.trainer.global_step
    chance = math.log(num_classes)
    guessing = f"; guessing: ln({num_classes}) = {chance:.3f}" if source.has_class_labels else ""
    say(view.trainer, f"Source loss at step {step}: {loss:.3f}{guessing}.")
    is_kept = source.head is not None and source.has_class_labels
    if is_kept and loss > UNTRAINED * chance:
        with seeded(source.seed, 0):  # in eval mode: a batch of few classes would mislead BatchNorm
            loss = float(criterion(view.logits(images, head), labels))
    if is_kept and loss > UNTRAINED * chance:
        warnings.warn(
            f"The kept source head starts at a loss of {loss:.2f} in eval mode; guessing gives {chance:.2f}, so it "
            "does not seem to be trained. If you called reset_classifier before from_timm, call it after, or pass "
            "from_timm another copy of the pretrained network. Otherwise pass labels in the order of its training, and "
            "images that are normalised as then.",
            stacklevel=2,
        )
    largest, *theirs = (float(some.detach().abs().max()) for some in (images, *images_in(target)))
    if largest > RAW >= max(theirs, default=0.0):  # if both are raw, the module may normalise them
        warnings.warn(
            f"Source pixels reach {largest:.0f}, and the target's do not. Give the source dataset the transform that "
            "the network was pretrained with.",
            stacklevel=2,
        )
    _warn_if_changed(images, images_in(target), taken, is_joint=source.forward == "joint")


def _warn_if_changed(images: Tensor, target: Sequence[Tensor], taken: Sequence[Tensor], *, is_joint: bool) -> None:
    """Warn if the module changes the target's images, and source images enter the network as they are.

    Args:
        images: of the source.
        target: images of the batch.
        taken: what the network's first layer took: the target's and then the source's, in one pass or in two.
        is_joint: whether source images join the target's after the module's forward has changed these.
    """
    if len(taken) == 1:
        taken = taken[0].tensor_split([len(taken[0]) - len(images)])
    if len(taken) < 2 or not len(taken[0]):
        return
    mine, theirs = taken[0], taken[-1]
    is_changed = Entry.of(images, theirs).is_other(target, [mine])
    if is_changed and is_unlike(theirs, mine):  # else the source's transform does the same
        step = IN_STEP.replace("training_step", "the module") if is_joint else IN_STEP
        place = "" if is_joint else "the module's forward, in "
        warnings.warn(
            f"SourceTask: {step}, and source images are not changed. Do it in {place}on_after_batch_transfer or in the "
            "source dataset's transform.",
            stacklevel=2,
        )


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two heads have equal weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=False)
    return all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in pairs)


def warn_if_not_replaced(trainer: Any, path: str, num_classes: int) -> None:
    """Warn about a target head that is the kept classifier, if the target lists labels of other classes."""
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    labels = known_labels(dataset) if hasattr(dataset, "__len__") else None
    if labels is not None and labels.ndim == 1 and int(labels.max()) + 1 != num_classes:
        warnings.warn(
            f"The target head {path!r} is the kept source head of {num_classes} classes too, and the target's labels "
            f"run to {int(labels.max())}. Replace the target head after SourceTask.from_timm, for example by "
            "network.reset_classifier(num_classes).",
            stacklevel=2,
        )


class Evidence(NamedTuple):
    """Holds evidence for the error on a source loss that is not finite; it is small, as it is kept for some steps.

    Attributes:
        loss: of the source.
        sums: (B,) of each source image's pixels, which are finite if these are.
        target_sums: the same of each tensor of images in the target batch.
        indices: of the source images in their dataset.
        step: number of the step.
    """

    loss: Tensor
    sums: Tensor
    target_sums: list[Tensor]
    indices: Tensor
    step: int

    @classmethod
    def of(cls, loss: Tensor, images: Tensor, indices: Tensor, step: int, *, target: Any) -> "Evidence":
        """Return the evidence of a step's batches."""
        return cls(loss.detach(), _sums(images), [*map(_sums, images_in(target))], indices, step)

    def error(self, now: int) -> FloatingPointError:
        """Return the error that names the images, read in the step `now`."""
        bad = ~torch.isfinite(self.sums.cpu())
        bad_target = sorted(
            {row for sums in self.target_sums for row, is_bad in enumerate((~torch.isfinite(sums)).tolist()) if is_bad}
        )
        if bad.any():
            cause = f"pixels of source samples {self.indices[bad].tolist()} are not finite"
        elif bad_target:
            cause = (
                f"images {bad_target} of the target batch are not finite, and the source shares a pass with them; "
                f"source samples {self.indices.tolist()} have finite pixels"
            )
        else:
            cause = f"source samples {self.indices.tolist()} have finite pixels; the learning rate may be too high"
        return FloatingPointError(
            f"The source loss is {self.loss.item()} in step {self.step}: {cause}. {when(self.step, now)}"
        )


def _sums(images: Tensor) -> Tensor:
    dims, dtype = [*range(1, images.ndim)], torch.promote_types(images.dtype, torch.float32)
    return images.detach().sum(dims, dtype=dtype)  # flatten() would copy images in channels_last
