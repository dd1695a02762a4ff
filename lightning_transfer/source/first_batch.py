"""What a look at a source batch tells: whether the kept head knows it, and what is wrong with its numbers."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_transfer.glue.trainer import say
from lightning_transfer.randomness import seeded
from lightning_transfer.roles import out_width
from lightning_transfer.source.gap import RAW
from lightning_transfer.source.view import NetworkView

UNTRAINED = 0.9  # of the loss of guessing: a kept head that starts above does not know these labels


def introduce(
    view: NetworkView,
    head: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loss: float,
    images: Tensor,
    labels: Tensor,
) -> None:
    """Log one line on the first source batch, and warn of what looks wrong with it."""
    num_classes, source, step = out_width(head), view.source, view.trainer.global_step
    chance = math.log(num_classes)
    say(view.trainer, f"Source loss at step {step}: {loss:.3f}; guessing: ln({num_classes}) = {chance:.3f}.")
    is_kept = source.head is not None and source.has_class_labels
    if is_kept and loss > UNTRAINED * chance:
        with seeded(source.seed, 0):  # a batch of few classes misleads BatchNorm, not its running statistics
            loss = float(criterion(view.logits(images, head), labels))
    if is_kept and loss > UNTRAINED * chance:
        warnings.warn(
            f"The kept source head starts at a loss of {loss:.2f}, where guessing has {chance:.2f}: hardly what a "
            "pretrained classifier knows. Are the labels in the order of its training, the images normalised as "
            "then, and was it taken out before reset_classifier?",
            stacklevel=2,
        )
    largest = float(images.detach().abs().max())
    if largest > RAW:
        warnings.warn(
            f"Source images reach {largest:.0f}; networks take normalised pixels. Give the source dataset the "
            "transform that the network was pretrained with.",
            stacklevel=2,
        )


def non_finite(loss: Tensor, images: Tensor, indices: Tensor, step: int, *, target: Any) -> str:
    """What is said of a loss that is not a number.

    Args:
        loss: of the source.
        images: of the source.
        indices: of these in their dataset.
        step: in which it is.
        target: the batch of the step.
    """
    bad, bad_target = _not_finite(images), _rows_not_finite(target)
    if bad.any():
        cause = f"pixels of source samples {indices[bad.cpu()].tolist()} are not finite"
    elif bad_target:
        cause = (
            f"images {bad_target} of the target batch are not finite, and reach the source by what both share; source "
            f"samples {indices.tolist()} have finite pixels"
        )
    else:
        cause = f"source samples {indices.tolist()} have finite pixels; the learning rate may be too high"
    return f"The source loss is {loss.item()} in step {step}: {cause}. Stopped before the optimizer's step."


def _not_finite(images: Tensor) -> Tensor:
    return ~torch.isfinite(images.detach()).flatten(1).all(1)


def _rows_not_finite(batch: Any) -> list[int]:
    """Rows of a batch's images that are not finite."""
    images = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 4)
    return sorted({row for some in images for row in _not_finite(some).nonzero()[:, 0].tolist()})
