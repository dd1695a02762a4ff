"""Ask the network in a round which target images it gets right, and how sure it is, as validation would."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_transfer.batches import class_numbers, is_right, label_hint
from lightning_transfer.datasets import Loaded, collate, index_in, load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.loaders import target_workers
from lightning_transfer.glue.logs import progress_of
from lightning_transfer.glue.moving import as_validated
from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import apart, in_order
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView

ASKED = 16  # images: a single one may have one label where others have several


def _read(batch: Any, source: SourceTask, trainer: Any) -> tuple[Tensor, Tensor]:
    """Return images and class numbers of a target batch, on the device.

    Raises:
        TransferConfigError: its labels are not class numbers.
    """
    images, given = source.unpack(as_validated(trainer, batch, hooks=source.batch_hooks))
    labels = class_numbers(given)
    if labels is None:
        raise TransferConfigError(
            f"Target labels have shape {tuple(given.shape)} and type {given.dtype}; rounds check whether the network "
            f"is right and need class indices. {label_hint(given, 'SourceTask(adapt=lambda batch: (batch[0], {}))')} "
            "Pass target= with such labels, or Neighbors(rounds=0)."
        )
    return images, labels


def check_labels(data: Dataset[Any], source: SourceTask, trainer: Any) -> None:
    """Refuse a target whose labels are not class numbers, by its first images, before anything is selected."""
    with seeded(source.seed, 0):
        first = range(min(ASKED, len(data)))  # type: ignore[arg-type]
        workers = target_workers(source.num_workers, trainer)["num_workers"]
        some = apart(lambda: [(index, load(data, index, of="target")) for index in first], workers)
        _read(collate(some, of="target"), source, trainer)


def _check_scaled_alike(asked: Extent, seen: Extent) -> None:
    """Refuse target images whose pixels are scaled differently from the source's."""
    if asked.scale != seen.scale:
        raise TransferConfigError(
            f"Target pixels run {asked}, the source's in training {seen}. Rounds run the target through the network: "
            "pass target= as validation sees it, with the same normalisation (for a bank of a model with "
            "FilterBank.from_model(..., normalize=False))."
        )


def ask(view: NetworkView, data: Dataset[Any], which: range, seen: Extent | None) -> Tensor:
    """Return whether the network is right, and its entropy, on some target images: (images, 2).

    Args:
        view: of the network as it is now.
        data: the target's images.
        which: of them.
        seen: the range of pixels in the first source batch; None before it is drawn.

    Raises:
        FloatingPointError: outputs are not finite.
    """
    source, trainer = view.source, view.trainer
    workers = {**target_workers(source.num_workers, trainer), "collate_fn": default_collate}
    batches = in_order(Loaded(data), which, size=view.batch_size, workers=workers)
    share = [torch.empty(0, 2, dtype=torch.float32)]
    with seeded(source.seed, 0), progress_of(trainer)("Which target images are hard", len(which)) as step:
        for batch in batches:
            images, labels = _read(batch, source, trainer)
            if not share[1:] and seen is not None:
                _check_scaled_alike(Extent().see(images), seen)
            logits = view.target_logits(images).float()
            right = is_right(logits, labels)
            if logits.shape[1] == 1:  # the logit of class 1; that of class 0 is 0
                logits = torch.cat([torch.zeros_like(logits), logits], 1)
            entropy = torch.special.entr(logits.softmax(1)).sum(1)
            share.append(torch.stack([right, entropy], 1).cpu())
            step(len(labels))
    answers = torch.cat(share).float()
    if bad := (~torch.isfinite(answers).all(1)).nonzero()[:, 0].tolist():
        raise FloatingPointError(
            f"The network's outputs for target samples {[index_in(data, which[row]) for row in bad]} are not finite; "
            "stopped in a round."
        )
    return answers
