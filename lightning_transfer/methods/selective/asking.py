"""Read target images and their class numbers for a round, in the way the network sees them."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.batches import class_numbers, label_hint
from lightning_transfer.datasets import collate, load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.trainer import looking, source_workers, to_device
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import apart
from lightning_transfer.source.gap import Extent
from lightning_transfer.source.task import SourceTask

ASKED = 16  # images: a single one may have one label where others have several


def read(batch: Any, source: SourceTask, trainer: Any) -> tuple[Tensor, Tensor]:
    """Return images and class numbers of a target batch, on the device.

    Raises:
        TransferConfigError: its labels are not class numbers.
    """
    with looking(trainer):
        images, given = source.unpack(to_device(trainer, batch, hooks=source.batch_hooks))
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
        workers = source_workers(source.num_workers or None, trainer)["num_workers"]
        some = apart(lambda: [(index, load(data, index, of="target")) for index in first], workers)
        read(collate(some, of="target"), source, trainer)


def check_scaled_alike(asked: Extent, seen: Extent) -> None:
    """Refuse target images whose pixels are scaled differently from the source's."""
    if asked.scale != seen.scale:
        raise TransferConfigError(
            f"Target pixels run {asked}, the source's in training {seen}. Rounds run the target through the network: "
            "pass target= as validation sees it, with the same normalisation (for a bank of a model with "
            "FilterBank.from_model(..., normalize=False))."
        )
