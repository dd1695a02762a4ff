"""Load, label, group and collate the samples of any dataset of images with random access."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from lightning_transfer.batches import either, label_places
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class, nesting
from lightning_transfer.randomness import seeded

PROBED = 8  # samples whose labels are compared with those that their dataset lists
PART = 8  # images that are loaded before their labels are yielded

if TYPE_CHECKING:
    AnyDataset: TypeAlias = Dataset[Any]
    AnyLoader: TypeAlias = DataLoader[Any]
else:
    AnyDataset, AnyLoader = Dataset, DataLoader  # generic aliases would lose the class_path of a LightningCLI file


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
        if hasattr(dataset, "train_dataloader"):
            raise TransferConfigError(f"The {name} is a DataModule, {kind}. Pass {kind}.train_dataloader().dataset.")
        given = ", and pass that as target= where the callback takes it" if name == "target" else ""
        raise TransferConfigError(
            f"The {name}, a {kind}, has no length and random access. Read it once into a map-style dataset, "
            f"list(stream), or list its files and load by index{given}."
        )
    if not len(dataset):
        raise TransferConfigError(f"The {name} dataset {kind} is empty.")


class ControlFlowError(TransferConfigError):
    """Says that a sample raised an exception that ends a loop or a program; readers must neither obey nor skip it."""


class Served(Subset[Any]):
    """Holds the images of a user's dataset that a loader serves; messages name them by their index in that dataset."""


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
    """Reads a target dataset's samples by `load`, for loaders that are given only a dataset."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return load(self.dataset, index, of="target")


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


def known_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes, of a dataset that lists them as torchvision's do (`classes`); otherwise None."""
    names = getattr(dataset, "classes", None)
    if names is None and isinstance(dataset, Subset | Loaded):
        return known_names(dataset.dataset)
    if getattr(dataset, "target_transform", None) is not None or not isinstance(names, list | tuple):
        return None
    firsts = [name[0] if isinstance(name, tuple) and name else name for name in names]  # ImageNet's have synonyms
    return firsts if all(isinstance(name, str) for name in firsts) else None


def labels_in_parts(dataset: Dataset[Any], read: Callable[[Any], Any] | None) -> Iterator[list[int]]:
    """Yield the class of every image: all at once if the dataset lists them, otherwise a few loaded ones at a time.

    A list is trusted if some of its samples have the labels that it lists: `__getitem__` may map them.

    Args:
        dataset: the images.
        read: turns a sample into a batch of one image and its label; None if the sample is (image, label).

    Raises:
        TransferConfigError: an image has no class number.
    """
    known = listed_labels(dataset, read)
    if known is not None:
        yield known.tolist()
        return
    indices = range(len(dataset))  # type: ignore[arg-type]
    for some in (indices[start : start + PART] for start in indices[::PART]):
        yield [_class_number(load(dataset, index, of="target"), dataset, index, read) for index in some]


def listed_labels(dataset: Dataset[Any], read: Callable[[Any], Any] | None) -> Tensor | None:
    """Return the listed class of every image, if some loaded samples agree with the list; otherwise None.

    Args:
        dataset: the images.
        read: as in `labels_in_parts`.
    """
    known = known_labels(dataset)
    if known is None or known.ndim != 1 or known.is_floating_point() or not _are_given(dataset, known, read):
        return None
    return known


def _are_given(dataset: Dataset[Any], listed: Tensor, read: Callable[[Any], Any] | None) -> bool:
    """Return whether samples have the labels that are listed, as far as some of them can be read."""
    with seeded(0, 0):  # reading may augment
        for index in range(0, len(listed), max(1, len(listed) // PROBED)):
            with suppress(Exception):  # one that cannot be read says so when it is used
                sample = dataset[index]
                is_pair = read is not None or len(sample) == 2  # which of three is the label, the list alone says
                if is_pair and _class_number(sample, dataset, index, read) != int(listed[index]):
                    return False
    return True


def _class_number(sample: Any, dataset: Any, index: int, read: Callable[[Any], Any] | None) -> int:
    try:
        label = torch.as_tensor(_label_in(sample) if read is None else read(sample)[1][0])
        if label.ndim or label.is_floating_point():
            raise TypeError(f"label {label!r}")
    except TransferConfigError as error:
        raise TransferConfigError(f"Image {index} of the data is {nesting(sample)}. {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise TransferConfigError(
            f"Image {index} of the data, {a_class(dataset)}, is {nesting(sample)}; expected (image, "
            "class number). List the classes as dataset.targets, or give such samples; advise and doctor also take "
            "adapt=lambda batch: (batch['image'], batch['label'])."
        ) from error
    return int(label)


def _label_in(sample: Any) -> Any:
    """Return the label of a sample: its second entry, or of three entries or more the only whole number."""
    if not isinstance(sample, tuple | list) or len(sample) < 3:
        return sample[1]
    numbers = (torch.as_tensor(part) if isinstance(part, int | np.integer) else part for part in sample)
    places = label_places([part[None] if isinstance(part, Tensor) else part for part in numbers])
    if len(places) > 1:
        made = "adapt=lambda batch: (batch[0], batch[{}])"
        raise TransferConfigError(f"{either(places, made)} Or list the classes as dataset.targets.")
    return sample[places[0] if places else 1]


def groups_of(dataset: Any) -> list[Any] | None:
    """Return the group of each image from `dataset.groups`, or from the datasets it is made of; None if there are none.

    The same name in two parts of a `ConcatDataset` is one group. So are the places of an image that is repeated, as for
    oversampling, in a `Subset` or a `ConcatDataset`.

    Raises:
        TransferConfigError: it is not a list, does not have one entry for each image, or an entry cannot be a name.
    """
    given = _given_groups(dataset)
    return repeated(dataset) if given is None else given


def _given_groups(dataset: Any) -> list[Any] | None:
    """Return the group of each image, of images without one the image itself; None if no image has one."""
    groups = getattr(dataset, "groups", None)
    if groups is None and isinstance(dataset, Subset):
        inner = _given_groups(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if groups is None and isinstance(dataset, ConcatDataset):
        parts = [_given_groups(part) for part in dataset.datasets]
        if all(part is None for part in parts):
            return None
        named = [_images(data) if part is None else part for part, data in zip(parts, dataset.datasets, strict=True)]
        return [group for each in named for group in each]
    if groups is None:
        return None
    names = getattr(groups, "tolist", lambda: groups)()  # of a tensor, whose numbers are objects of their own
    if not isinstance(names, Sequence) or len(names) != len(dataset):
        found = f"names {len(names)} groups" if isinstance(names, Sequence) else f"is {a_class(groups)}"
        raise TransferConfigError(
            f"{type(dataset).__name__}.groups {found} for {len(dataset)} images; give a list with one for each."
        )
    for name in names:
        if isinstance(name, Tensor) or not _is_hashable(name):  # equal tensors are not one group
            raise TransferConfigError(
                f"{type(dataset).__name__}.groups has an entry {name!r}; expected a number, a string or a tuple for "
                "each image, equal for images of one group: dataset.groups = [str(group) for group in dataset.groups]."
            )
    return [*names]


def repeated(dataset: Dataset[Any]) -> list[int] | None:
    """Return a number for each image, equal where a Subset or a ConcatDataset repeats one; None if none is repeated."""
    images = _images(dataset) if isinstance(dataset, Subset | ConcatDataset) else []
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    return None if len(numbers) == len(images) else [numbers[image] for image in images]


def origins(dataset: Any) -> list[Any]:
    """Return what each image is read from: its file, if the dataset lists files as torchvision's do, or its place."""
    return _images(dataset, _files)


def _places(dataset: Any) -> Callable[[int], Any]:
    return lambda index: (id(dataset), index)


def _files(dataset: Any) -> Callable[[int], Any]:
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list):
        return _places(dataset)
    named = [one[0] for one in samples if isinstance(one, tuple) and one and isinstance(one[0], str)]
    if not len({*named}) == len(named) == len(dataset):  # a file holds several, or not all are named
        return _places(dataset)
    if not (named and os.path.isfile(named[0])):  # relative to a folder that only the dataset knows, or a key
        return _places(dataset)
    return [*map(os.path.abspath, named)].__getitem__


def _images(dataset: Any, named: Callable[[Any], Callable[[int], Any]] = _places) -> list[Any]:
    """Return a name for each image, of the innermost dataset that it comes from and the image's index there."""
    if isinstance(dataset, ConcatDataset):
        return [image for part in dataset.datasets for image in _images(part, named)]
    if isinstance(dataset, Subset):
        inner = dataset.dataset
        if isinstance(inner, Subset | ConcatDataset):
            inside = _images(inner, named)
            return [inside[index] for index in dataset.indices]
        places = range(len(inner) if hasattr(inner, "__len__") else sys.maxsize)  # an index may count from the end
        return [*map(named(inner), (places[index] for index in dataset.indices))]
    return [*map(named(dataset), range(len(dataset)))]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def collate(samples: list[tuple[int, Any]], *, of: str) -> Any:
    """Collate samples, each with its index, into a batch.

    Raises:
        TransferConfigError: they differ in shape or kind; two of them are named.
    """
    try:
        return default_collate([sample for _, sample in samples])
    except (RuntimeError, TypeError) as error:
        empty = [f"{index} is {nesting(sample)}" for index, sample in samples if "NoneType" in nesting(sample)]
        if empty:
            raise TransferConfigError(
                f"{of.capitalize()} sample {empty[0]}, and a batch cannot hold None. Give it an image and a class "
                "number, or leave it out of the dataset."
            ) from error
        first, found = samples[0][0], nesting(samples[0][1])
        odd = next((index for index, sample in samples if nesting(sample) != found), None)
        detail = (
            f"sample {first} is {found}"
            if odd is None
            else f"sample {first} is {found}, sample {odd} is {nesting(dict(samples)[odd])}"
        )
        raise TransferConfigError(
            f"{of.capitalize()} samples do not fit into one batch: {detail}. Give the dataset a transform that makes "
            f"every image a tensor of one size, for example Resize, CenterCrop and ToTensor. ({error})"
        ) from error
