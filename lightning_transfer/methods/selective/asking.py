"""Target images as a round shows them to the network, with the class numbers that it goes by."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_transfer.batches import class_numbers, label_hint
from lightning_transfer.datasets import load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.trainer import looking, to_device
from lightning_transfer.randomness import seeded
from lightning_transfer.source.gap import Extent
from lightning_transfer.source.task import SourceTask

ASKED = 16  # images: one alone may have one label of the several that others have


def read(batch: Any, source: SourceTask, trainer: Any) -> tuple[Tensor, Tensor]:
    """Images and class numbers of a target batch, on the device.

    Raises:
        TransferConfigError: its labels are not class numbers.
    """
    with looking(trainer):
        images, given = source.unpack(to_device(trainer, batch, hooks=source.batch_hooks))
    labels = class_numbers(given)
    if labels is None:
        raise TransferConfigError(
            f"Target labels have shape {tuple(given.shape)} and type {given.dtype}; rounds ask whether the network is "
            f"right, which takes class indices. {label_hint(given, 'SourceTask(adapt=lambda batch: (batch[0], {}))')} "
            "Pass target= with such labels, or Neighbors(rounds=0)."
        )
    return images, labels


def check_labels(data: Dataset[Any], source: SourceTask, trainer: Any) -> None:
    """Refuse a target of which no round could ask, by its first images, before anything is selected.

    Raises:
        TransferConfigError: its labels are not class numbers.
    """
    with seeded(source.seed, 0):
        some = [load(data, index, of="target") for index in range(min(ASKED, len(data)))]  # type: ignore[arg-type]
        read(default_collate(some), source, trainer)


def check_scaled_alike(asked: Extent, seen: Extent) -> None:
    """Refuse target images with other pixels than the source's.

    Raises:
        TransferConfigError: they are scaled otherwise.
    """
    if asked.scale != seen.scale:
        raise TransferConfigError(
            f"Target pixels run {asked}, the source's in training {seen}. Rounds show the target to the network: give "
            "target= as validation sees it, normalised alike (for a bank of a model with "
            "FilterBank.from_model(..., normalize=False))."
        )
