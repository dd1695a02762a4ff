"""Add selective joint fine-tuning to a Trainer as a callback."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.methods.selective.borrowing import Borrowed, Borrowing
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.selection import Selection
from lightning_transfer.source.checks import ALWAYS, Weight, as_schedule, as_source, as_weight
from lightning_transfer.source.task import SourceTask, TimmSource
from lightning_transfer.source.term import SourceTerm


class SelectiveJointFinetuning(TransferCallback):
    """Fine-tune on the target and on the source images that look like it (arXiv 1702.08690).

    Before the first step, if the source is near enough, every target image gets the source images with the nearest
    filter statistics, its neighbors. Every step then adds the loss of a source batch. Each image of this batch is a
    random neighbor of one target image; the target images take turns. In later rounds the network decides which target
    images are hard, and those borrow more. The method is the paper's and its authors' code's. Their loss 0.5 target +
    0.5 source is target + source here, which doubles the effective learning rate.

    Logs the values of `SoftFinetuning` and, if it borrows, `transfer/neighbors`, the mean number of neighbors of a
    target image.

    Args:
        source: the task to borrow from, or a mapping of the arguments of `SourceTask`; with the key `from_timm`, of the
            arguments of `SourceTask.from_timm`.
        neighbors: how many, by which statistics, and when more; a number means `Neighbors(k=number)`.
        target: the target's training images without augmentation, as validation sees them, giving (image, label); by
            default the train loader's dataset, whose transform then must not be random.
        protect: datasets, such as the target's test set, whose near duplicates are left out of the source.
        cache: file that keeps the selection, for the next run with the same data and options.
        weight: of the source loss: a `Schedule`, or a number, which is constant. "auto" measures before the first step
            how far the target is from the source; if it is near enough, the weight is always 1, otherwise 0 (ours). The
            measurement ignores the number of labels: with thousands of images, borrowing hurt on a near target too.
        head: dotted path of the target head, or "auto".

    Raises:
        TransferConfigError: an option is not valid.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 24, 24), torch.arange(8))
        >>> SelectiveJointFinetuning(SourceTask(data, num_classes=8), neighbors=4).neighbors.k
        4
    """

    mixin = "SourceTaskMixin"

    def __init__(
        self,
        source: SourceTask | TimmSource,
        *,
        neighbors: Neighbors | int = Neighbors(),  # noqa: B008  (frozen)
        target: AnyDataset | None = None,
        protect: Sequence[AnyDataset] = (),
        cache: str | Path | None = None,
        weight: Weight = "auto",
        head: str = "auto",
    ) -> None:
        self.source = as_source(source)
        self.borrowing = Borrowing(neighbors, target, protect, cache)
        self.borrowing.open(self.source)  # refuses more neighbors than there are images
        self.weight = as_weight(weight)
        self.head = head

    @property
    def neighbors(self) -> Neighbors:
        """Return the options of what is borrowed."""
        assert isinstance(self.borrowing.neighbors, Neighbors)  # a number has become one
        return self.borrowing.neighbors

    @property
    def selection(self) -> Selection | None:
        """Return the selection of this run.

        It is None before a fit and if the source is left out. In a resumed run it is read from `cache`; without one it
        is None.
        """
        if self.part is None or self.part.is_left_out:
            return None
        found = self._borrowed.selection
        cache = self.borrowing.cache
        return Selection.load(cache) if found is None and cache is not None and os.path.exists(cache) else found

    @property
    def target_weights(self) -> Tensor:
        """Return (targets,) the current number of neighbors of each target image, as a multiple of its first number.

        For the authors' oversampling of hard target images, pass them to a WeightedRandomSampler of your train loader
        and rebuild the loader each epoch: Trainer(reload_dataloaders_every_n_epochs=1).

        Raises:
            TransferConfigError: nothing is selected yet.
        """
        return self._borrowed.target_weights

    @property
    def _borrowed(self) -> Borrowed:
        if self.part is None:
            raise TransferConfigError("No run has begun, so nothing is borrowed yet. Read it after the first step.")
        if self.part.is_left_out:
            raise TransferConfigError(
                f"The source was left out, at a domain gap of {self.part.gap:.2f}, so nothing is borrowed. To borrow "
                "anyway: weight=lt.Schedule(1.0, 1.0)."
            )
        chooser = self.part.chooser
        assert isinstance(chooser, Borrowed)
        return chooser

    def make_part(self, module: Any) -> SourceTerm:
        """Return the source task as a term of the loss, with chosen images."""
        chooser = self.borrowing.open(self.source)
        weight, measured = as_schedule(self.weight, ALWAYS)
        return SourceTerm(
            self.source, module, weight=weight, mix="add", head=self.head, chooser=chooser, measured=measured
        )

    def __repr__(self) -> str:
        return (
            f"SelectiveJointFinetuning({self.source!r}, neighbors={self.neighbors!r}, weight={self.weight!r}, "
            f"head={self.head!r})"
        )
