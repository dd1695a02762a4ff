"""Read images of a run's target or source outside of training, in the way training reads them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from lightning_transfer.datasets import check_random_access, collate, index_in, repeated
from lightning_transfer.glue.loaders import served, target_dataset
from lightning_transfer.reading import Samples, readable

WORKERS = ("num_workers", "worker_init_fn", "multiprocessing_context")


@dataclass(frozen=True)
class Side:
    """Reads images of the target or of the source as in training.

    Attributes:
        name: "target" or "source".
        dataset: of the images.
        most: how many images are used.
        hooks: whether they pass the user's batch-transfer hooks.
        workers: options of a DataLoader. If training reads the dataset in workers, it is read in workers here too: a
            file that it opens in this process would be shared by workers that are forked later.
        collate: makes a batch of samples; by default torch's, and samples that do not fit are named.
        forgives: whether some may be unreadable: a selection names them and leaves them out too.
    """

    name: str
    dataset: Any
    most: int
    hooks: bool
    workers: dict[str, Any]
    collate: Callable[[Samples], Any] | None = None
    forgives: bool = False

    def draw(self) -> list[int]:
        """Draw indices with the current random state; of an image that is repeated, only one."""
        check_random_access(self.dataset, self.name)
        drawn = torch.randperm(len(self.dataset)).tolist()
        if (images := repeated(self.dataset)) is not None:
            drawn = [*{images[place]: place for place in drawn}.values()]
        return drawn[: self.most]

    def batches(self, drawn: list[int], size: int) -> Iterator[tuple[list[int], Any]]:
        """Yield the indices of samples in the user's dataset, and the batch of these."""
        some = readable(self.dataset, drawn, of=self.name, size=size, workers=self.workers, forgives=self.forgives)
        for samples in some:
            batch = collate(samples, of=self.name) if self.collate is None else self.collate(samples)
            yield [index_in(self.dataset, place) for place, _ in samples], batch


def target_side(trainer: Any, *, most: int, unaugmented: Any = None) -> Side:
    """Return the images that the train loader draws, collated as it does.

    Args:
        trainer: the Trainer with the train loader.
        most: how many images are used.
        unaugmented: the same images without augmentation, as a dataset or a loader, which then collates them; None for
            the train loader's own.

    Raises:
        TransferConfigError: the loader does not show its images, or `unaugmented` has another number of them.
    """
    dataset, loader = target_dataset(None, trainer), trainer.train_dataloader
    check_random_access(dataset, "target")
    collate_fn = loader.collate_fn
    if isinstance(unaugmented, DataLoader):
        unaugmented, collate_fn = unaugmented.dataset, unaugmented.collate_fn
    if unaugmented is not None:
        check_random_access(unaugmented, "target")

    def collated(samples: Samples) -> Any:
        return collate_fn([sample for _, sample in samples])

    return Side(
        "target",
        dataset if unaugmented is None else served(loader, unaugmented),
        most,
        hooks=True,
        workers={name: getattr(loader, name) for name in WORKERS},
        collate=None if collate_fn is default_collate else collated,
    )
