"""Check any dataset of images for random access, load its samples and find the labels that it lists."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_transfer.errors import TransferConfigError

if TYPE_CHECKING:
    AnyDataset: TypeAlias = Dataset[Any]
else:
    AnyDataset = Dataset  # from a generic alias, a LightningCLI file's class_path would be lost


def check_random_access(dataset: Any, name: str) -> None:
    """Refuse a stream, because an exact resume cannot continue it, and an empty dataset.

    Args:
        dataset: of images.
        name: "target" or "source", for messages.

    Raises:
        TransferConfigError: the dataset is a stream or is empty.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        given = ", and pass that as target= where the callback takes it" if name == "target" else ""
        raise TransferConfigError(
            f"The {name}, a {kind}, has no length and random access. Read it once into a map-style dataset, "
            f"list(stream), or list its files and load by index{given}."
        )
    if not len(dataset):
        raise TransferConfigError(f"The {name} dataset {kind} is empty.")


class ControlFlowError(TransferConfigError):
    """A sample raised an exception that ends a loop or a program; readers must neither obey nor skip it."""


class Served(Subset[Any]):
    """The images of a user's dataset that a loader serves; messages name images by their index in that dataset."""


def index_in(dataset: Dataset[Any], place: int) -> int:
    """Return an image's index in the user's own dataset."""
    return dataset.indices[place] if isinstance(dataset, Served) else place


def load(dataset: Dataset[Any], index: int, *, of: str) -> Any:
    """Return one sample; an error names its index and its dataset.

    Raises:
        ControlFlowError: the dataset raised, for example, StopIteration, which would silently end an epoch early.
    """
    try:
        return dataset[index]
    except (StopIteration, StopAsyncIteration, GeneratorExit, SystemExit) as error:
        kind, place = type(error).__name__, index_in(dataset, index)
        raise ControlFlowError(
            f"{of.capitalize()} sample {place} raised {kind}, which would end the loop that reads it. Let "
            f"{type(dataset).__name__}.__getitem__ return a sample for every index below its length, or raise what "
            f"went wrong (a next() without a default raises StopIteration)."
        ) from error
    except Exception as error:
        error.add_note(f"This happened while loading {of} sample {index_in(dataset, index)}.")
        raise


class Loaded(Dataset[Any]):
    """A dataset whose samples are read by `load`, for loaders that are given only a dataset.

    Args:
        dataset: of the samples.
        of: "target" or "source", for messages.
    """

    def __init__(self, dataset: Dataset[Any], of: str) -> None:
        self.dataset, self.of = dataset, of

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return load(self.dataset, index, of=self.of)


def known_labels(dataset: Dataset[Any]) -> Tensor | None:
    """Return all labels of a dataset that lists them (`targets`, `labels`, or tensors); otherwise None."""
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    tensors: tuple[Tensor, ...] = getattr(dataset, "tensors", ())
    listed = tensors[1] if len(tensors) == 2 else getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.shape[:1] == (len(dataset),) else None  # type: ignore[arg-type]
