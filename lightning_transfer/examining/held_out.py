"""Find validation and test images whose labels are not the class numbers of the training images, or of the head."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Subset

from lightning_transfer.criteria import CriterionCall
from lightning_transfer.datasets import known_labels, known_names, listed_labels
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining.diagnosis import Finding, listed
from lightning_transfer.examining.images import Adapt, ends, listing_of, reader
from lightning_transfer.examining.module import out_of_range
from lightning_transfer.examining.step import Seen
from lightning_transfer.naming import a_class
from lightning_transfer.reading import apart

Side = tuple[DataLoader[Any], Any]  # a loader, and the images that it serves


def labels(
    train: Side,
    held_out: dict[str, Side],
    find_call: Callable[[], CriterionCall | None] | None,
    adapt: Adapt | None,
    again: Callable[[Any], Seen],
    not_checked: list[str],
) -> Iterator[Finding]:
    """Yield the held-out datasets whose class names have other numbers than in training, or whose labels do not fit.

    Args:
        train: the training images.
        held_out: by name.
        find_call: as in `images.labels`; None if the training labels do not fit either.
        adapt: turns a batch into images and labels; None if it is both.
        again: runs the step of another batch.
        not_checked: takes why labels cannot be read.
    """
    for name, side in held_out.items():
        try:
            found = [*_renumbered(train, side, name, adapt)]
            if not found and find_call is not None and (call := find_call()) is not None:
                found = [*_outside(side, name, call, adapt, again)]
            yield from found
        except Exception as error:  # whatever the user's dataset raises
            kind = "" if isinstance(error, TransferConfigError) else f"{type(error).__name__}: "
            not_checked.append(f"the labels of the {name} images: {kind}{error}")


def _renumbered(train: Side, side: Side, name: str, adapt: Adapt | None) -> Iterator[Finding]:
    """Yield a dataset that lists other class numbers for the names of classes than the training images do."""
    one, other = _numbers(train[1]), _numbers(side[1])
    mine, theirs = _moved(one, other), _moved(other, one)
    if mine and _are_given(*train, adapt) and _are_given(*side, adapt):
        yield Finding(
            "classes with other numbers",
            f"the training and the {name} images",
            f"classes of the training images are {listed(mine)}; those of the {name} images are {listed(theirs)}",
            "the same class folders in both, with allow_empty=True if one is empty; or, in a subclass of ImageFolder, "
            "def find_classes(self, directory): return train.classes, train.class_to_idx. Leave it if only the names "
            "differ",
        )


def _numbers(dataset: Any) -> dict[str, int]:
    """Return the number of each class by its name, of a dataset that lists them; otherwise an empty dictionary."""
    given = getattr(dataset, "class_to_idx", None)
    if given is None and isinstance(dataset, Subset) and not hasattr(dataset, "classes"):
        return _numbers(dataset.dataset)
    numbers = given if isinstance(given, dict) and getattr(dataset, "target_transform", None) is None else {}
    if numbers and all(isinstance(number, int) for number in numbers.values()):
        return numbers
    return {name: number for number, name in enumerate(known_names(dataset) or ())}


def _moved(one: dict[str, int], other: dict[str, int]) -> list[str]:
    """Return the classes of one dataset that have another number in the other, or whose number has another name there.

    A class that only one dataset has may have a number of its own.

    >>> _moved({"cat": 0, "dog": 1, "owl": 2}, {"ant": 0, "cat": 1, "dog": 2})
    ['0 (cat)', '1 (dog)', '2 (owl)']
    >>> _moved({"cat": 0, "dog": 1, "owl": 2}, {"cat": 0, "dog": 1})
    []
    """
    shared = {number for name, number in other.items() if one.get(name) == number}
    taken = {*other.values()} - shared
    return [
        f"{number} ({name})"
        for name, number in sorted(one.items(), key=lambda item: item[1])
        if (other[name] != number if name in other else number in taken)
    ]


def _are_given(loader: DataLoader[Any], dataset: Any, adapt: Adapt | None) -> bool:
    """Return whether samples have the labels that their dataset lists, if it lists them: its code may map them."""
    read = reader(loader, adapt)
    is_known = known_labels(dataset) is not None
    return not is_known or apart(lambda: listed_labels(dataset, read), loader.num_workers) is not None


def _outside(
    side: Side, name: str, call: CriterionCall, adapt: Adapt | None, again: Callable[[Any], Seen]
) -> Iterator[Finding]:
    """Yield a dataset with labels that the head does not have.

    Raises:
        TransferConfigError: the labels are not class numbers, or are too many to be read one by one.
    """
    extreme, outputs = ends(listing_of(*side, adapt), call, *side, again), call.scores.shape[1]
    if extreme and not 0 <= extreme[0] <= extreme[1] < outputs:
        numbers = "the class numbers of the training images, and no images of other classes"
        said = out_of_range(*extreme, outputs, larger=numbers)
        yield Finding("labels do not fit", f"the {name} images, {a_class(side[0].dataset)}", *said)
