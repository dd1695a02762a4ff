"""Find in the training images labels that the head does not have, rare classes, and held-out images."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

from lightning_transfer.batches import class_numbers, labels_in
from lightning_transfer.criteria import CriterionCall
from lightning_transfer.datasets import index_in, listed_labels, load, origins
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining.diagnosis import Finding, listed
from lightning_transfer.examining.module import CLASSES, out_of_range
from lightning_transfer.examining.step import Seen
from lightning_transfer.methods.selective.duplicates import near_duplicates_of_few
from lightning_transfer.methods.selective.pictures import Pictures, spread
from lightning_transfer.naming import a_class
from lightning_transfer.reading import apart, labels_of

FEWEST = 5  # images of a class
MOST = 2000  # images of a dataset that are read
LARGEST = 32  # images of a batch
MANY = 2  # times as many outputs as classes
COPIES = 3  # images of one side that an image may resemble to count as a copy
Adapt: TypeAlias = Callable[[Any], tuple[Tensor, Tensor]]


def batches_of(loader: DataLoader[Any], dataset: Any) -> list[Any]:
    """Return two batches, some images twice and the same images once; a single one if they are too few."""
    size = min(loader.batch_size or LARGEST, LARGEST, len(dataset))
    places = spread(len(dataset), size)
    samples = apart(lambda: [load(dataset, index, of="target") for index in places], loader.num_workers)
    half = samples[: size // 4 * 2 or size // 2]  # of an even number if it can be: timm's Mixup takes no other
    groups = [half * 2, half] if len(half) > 1 else [samples]
    return [loader.collate_fn(group) for group in groups]


def labels(
    loader: DataLoader[Any],
    dataset: Any,
    find_call: Callable[[], CriterionCall | None],
    adapt: Adapt | None,
    again: Callable[[Any], Seen],
) -> Iterator[Finding]:
    """Yield what all labels show together.

    Args:
        loader: of the training images.
        dataset: those that it serves.
        find_call: returns the call of the criterion that gets the labels; None if there is none.
        adapt: turns a batch into images and labels; None if it is both.
        again: runs the step of another batch.

    Raises:
        TransferConfigError: they are not class numbers, or are too many to be read one by one.
    """
    listing = listing_of(loader, dataset, adapt)
    counts = Counter(listing)
    where = f"the training images, {a_class(loader.dataset)}"
    rare = [f"{label} ({number})" for label, number in sorted(counts.items()) if label >= 0 and number < FEWEST]
    if rare:
        yield Finding(
            "classes of few images",
            where,
            f"{len(rare)} of {len(counts)} classes have fewer than {FEWEST} images: {listed(rare)}",
            "more images of these classes, or leave them out",
        )
    if _is_in_order(loader) and len(counts) > 1 and len(listing) >= 2 * len(counts) and _are_together(listing):
        yield Finding(
            "images in the order of their classes",
            where,
            f"without shuffling, batches of {loader.batch_size} of {len(listing)} images show class after class",
            "DataLoader(dataset, batch_size=..., shuffle=True)",
        )
    call = find_call()
    extreme = None if call is None else ends(listing, call, loader, dataset, again)
    if call is None or extreme is None:
        return
    outputs, (least, largest) = call.scores.shape[1], extreme
    if least < 0 or largest >= outputs:
        yield Finding("labels do not fit", where, *out_of_range(least, largest, outputs))
    elif least == 1 and largest == outputs - 1 > 1:
        found = f"labels run from 1 to {largest}, and output 0 of {outputs} is never right: labels count from 1"
        yield Finding("labels do not fit", where, found, f"labels = labels - 1, and a head of {largest} outputs")
    elif least <= 1 and outputs > MANY * (largest + 1):  # others are the numbers of a pretrained head's classes
        yield Finding(
            "outputs of no class",
            where,
            f"labels run from {least} to {largest}, and the head has {outputs} outputs, as of another task",
            f"a head of {largest + 1} outputs; for timm's: network.reset_classifier({largest + 1}). Leave it if these "
            "are the pretrained head's own class numbers",
        )


def reader(loader: DataLoader[Any], adapt: Adapt | None) -> Adapt | None:
    """Return what turns a sample into a batch of one image and its label; None if the sample is both."""
    return None if adapt is None else lambda sample: adapt(loader.collate_fn([sample]))


def listing_of(loader: DataLoader[Any], dataset: Any, adapt: Adapt | None) -> list[int]:
    """Return the class of every image that a loader serves.

    Raises:
        TransferConfigError: they are not class numbers, or are too many to be read one by one.
    """
    read = reader(loader, adapt)
    if len(dataset) > MOST and apart(lambda: listed_labels(dataset, read), loader.num_workers) is None:
        raise TransferConfigError(f"{len(dataset):,} images do not list them; give dataset.targets.")
    return labels_of(dataset, read, num_workers=loader.num_workers)


def ends(
    listing: list[int], call: CriterionCall, loader: DataLoader[Any], dataset: Any, again: Callable[[Any], Seen]
) -> tuple[int, int] | None:
    """Return the smallest and the largest label that is not ignored; None if no image has a class.

    A label below 0 counts as ignored if the user's step takes it: it may leave such images out.
    """
    outputs = call.scores.shape[1]
    kept = [label for label in listing if label >= 0 and (label < outputs or label != call.ignored)]
    odd = [label for label in listing if label < 0 and label != call.ignored]
    if odd and kept:
        sample = apart(lambda: load(dataset, listing.index(odd[0]), of="target"), loader.num_workers)
        odd = [] if again(loader.collate_fn([sample] * 4)).step_error is None else odd
    return (min(odd or kept), max(kept)) if kept else None


def last_batch(loader: DataLoader[Any], seen: Seen) -> Iterator[Finding]:
    """Yield a last batch of one image, of which BatchNorm layers in training mode cannot take statistics."""
    size = loader.batch_size or 1
    if _is_batched_by_torch(loader) and seen.normalizing and not loader.drop_last and size > 1:
        number = len(loader.sampler)  # type: ignore[arg-type]
        if number > 1 and number % size == 1:
            yield Finding(
                "a batch of one image",
                listed(seen.normalizing),
                f"{number} images in batches of {size} leave one image for the last batch: the BatchNorm layers take "
                "its statistics for those of all images, and a layer after a pool raises an error",
                "DataLoader(dataset, batch_size=..., drop_last=True)",
            )


def _is_batched_by_torch(loader: DataLoader[Any]) -> bool:
    return type(loader.batch_sampler) is BatchSampler  # else the loader's own sampler is not used


def _is_in_order(loader: DataLoader[Any]) -> bool:
    """Return whether a loader draws its images in their order, several batches of several images."""
    in_order = _is_batched_by_torch(loader) and type(loader.sampler) is SequentialSampler
    return in_order and 1 < (loader.batch_size or 1) < len(loader.dataset)  # type: ignore[arg-type]


def _are_together(listing: list[int]) -> bool:
    """Return whether the images of each class follow each other."""
    return sum(one != two for one, two in pairwise(listing)) == len(set(listing)) - 1


def call_of(batch: Any, seen: Seen, adapt: Adapt | None) -> CriterionCall | None:
    """Return the call of a criterion that gets the labels as the dataset gives them."""
    given = labels_in(batch) if adapt is None else adapt(batch)[1]
    numbers = class_numbers(given) if isinstance(given, Tensor) else None
    if numbers is None:
        return None
    calls = (call for call in seen.calls if call.name in CLASSES and call.scores.ndim == 2)
    return next((call for call in calls if torch.equal(call.target.cpu(), numbers)), None)


def leaks(
    train: Any, clean: Any, held_out: dict[str, Any], adapt: Adapt | None, not_checked: list[str]
) -> Iterator[Finding]:
    """Yield the held-out datasets that show images of the training data, exactly or nearly.

    Args:
        train: the training images.
        clean: the same without augmentation, or `train` itself.
        held_out: datasets by name.
        adapt: turns a batch into images and labels; None if it is both.
        not_checked: takes what is not looked at.
    """
    of_train: list[str] = []
    mine = _pictures(clean, "training", adapt, of_train)
    sides = [train] if clean is train else [train, clean]
    known = {one: place for side in sides for place, one in enumerate(origins(side))}
    for name, dataset in held_out.items():
        of_other: list[str] = []
        shared = {place: known[one] for place, one in enumerate(origins(dataset)) if one in known}
        if shared:
            found = "also in the training data, read from the same place"
            yield _leak(name, len(dataset), [*shared.items()], (dataset, train), found)
        if len(shared) == len(dataset):
            continue
        if not (mine and (others := _pictures(dataset, name, adapt, of_other))):
            not_checked += of_other
            continue
        pairs = near_duplicates_of_few(others, mine)
        is_new = [others.dataset.indices[one] not in shared for one in pairs[:, 0].tolist()]
        pairs = pairs[torch.tensor(is_new, dtype=torch.bool)]
        often = [column.bincount()[column] > COPIES for column in pairs.T]  # images of little detail resemble many
        many, pairs = pairs[often[0] | often[1]], pairs[~(often[0] | often[1])]
        if left := {*many[:, 0].tolist()} - {*pairs[:, 0].tolist()}:
            of_other.append(
                f"leaks of {len(left)} {name} images: these, or the training images like them, resemble more than "
                f"{COPIES} others."
            )
        if len(pairs):
            rows = [(others.dataset.indices[one], mine.dataset.indices[two]) for one, two in pairs.tolist()]
            least = "At least " if of_train or of_other else ""
            found = "also in the training data, equal or nearly equal"
            yield _leak(name, len(others), rows, (dataset, train), found, least=least)
        not_checked += of_other
    not_checked[:0] = of_train


def _leak(
    name: str, number: int, pairs: list[tuple[int, int]], datasets: tuple[Any, Any], found: str, *, least: str = ""
) -> Finding:
    """Return the finding that some of a number of held-out images, each with its place in training, are known."""
    places = [tuple(map(index_in, datasets, pair)) for pair in pairs]
    leaked = len({one for one, _ in pairs})
    return Finding(
        "leak",
        f"the {name} images",
        f"{least}{leaked} of {number} {'is' if leaked == 1 else 'are'} {found}, for example {listed(places)} ({name}, "
        "training): the network has learned these images",
        "Subset(dataset, indices) without them, or a split by groups that keeps copies on one side",
    )


def _pictures(dataset: Any, name: str, adapt: Adapt | None, not_checked: list[str]) -> Pictures | None:
    """Return some of the images, or say why they cannot be compared."""
    chosen = Subset(dataset, spread(len(dataset), MOST))
    pictures = Pictures(chosen, name, adapt=adapt)
    first = pictures[0].pixels
    if isinstance(first, str):
        found = first.partition(";")[0]
        not_checked.append(f"leaks of the {name} images: {found}. Pass adapt=lambda batch: (images, labels).")
        return None
    if pictures.differing() is not None:
        given = "Call doctor(..., unaugmented=) with" if name == "training" else "Give their loader"
        not_checked.append(
            f"some leaks: the {name} images have a random transform. {given} a dataset that has none, to compare all."
        )
    if len(chosen) < len(dataset):
        not_checked.append(f"leaks of {len(dataset) - len(chosen):,} of {len(dataset):,} {name} images.")
    return pictures
