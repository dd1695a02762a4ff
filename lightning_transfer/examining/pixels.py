"""Find images that are scaled or normalised otherwise than the network expects, or than the training images are."""

from collections.abc import Iterator
from typing import Any

from lightning_transfer.examining.diagnosis import Finding
from lightning_transfer.examining.images import Adapt
from lightning_transfer.examining.step import Seen
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.pixel_ranges import NEGATIVE, normalised_range

APART = 3.0  # times as wide as another range: normalised images have 4 or 5, those of 0..1 have 1 (ours)


def not_normalised(seen: Seen) -> Iterator[Finding]:
    """Yield a pretrained timm network that gets images without its normalisation, or far outside of its range."""
    for path, each in seen.entered.items():
        misfit = each.pixels.misfit(each.mean, each.std)
        if not misfit:
            continue
        is_raw = misfit == "not normalised"
        scaled = "images / 255, and then " * (each.pixels.largest > 1) if is_raw else "images from 0 to 1, and then "
        least, largest = normalised_range(each.mean, each.std)
        yield Finding(
            f"images are {misfit}",
            path,
            f"pixels run from {each.pixels.least:.3g} to {each.pixels.largest:.3g}; timm's weights of this {each.kind} "
            f"expect {least:.2g} to {largest:.2g}",
            f"{scaled}transforms.Normalize(mean={each.mean}, std={each.std}){' in place of yours' * (not is_raw)}, for "
            "training and validation images. Leave it if your weights were trained with such pixels",
        )


def prepared_otherwise(train: Any, clean: Any, held_out: dict[str, Any], adapt: Adapt | None) -> Iterator[Finding]:
    """Yield the held-out datasets whose pixels have another range than the training images.

    Args:
        train: the training images.
        clean: the same without augmentation, or `train` itself.
        held_out: datasets by name.
        adapt: turns a batch into images and labels; None if it is both.
    """
    sides = [train] if clean is train else [train, clean]  # noise may widen the one, the other may have no transform
    mine = [ends for each in sides if (ends := _range(each, "training", adapt))]
    for name, dataset in held_out.items():
        other = _range(dataset, name, adapt)
        if mine and other and not any(_alike(each, other) for each in mine):
            least, largest = mine[0]
            yield Finding(
                "images prepared in two ways",
                f"the training and the {name} images",
                f"pixels of the training images run from {least:.3g} to {largest:.3g}, those of the {name} images from "
                f"{other[0]:.3g} to {other[1]:.3g}",
                "the same scale and Normalize in both transforms",
            )


def _range(dataset: Any, name: str, adapt: Adapt | None) -> tuple[float, float] | None:
    """Return the smallest and the largest pixel of some images; None if none can be read."""
    kinds = Pictures(dataset, name, adapt=adapt).glance.ranges.values()
    return (min(kind.least for kind in kinds), max(kind.largest for kind in kinds)) if kinds else None


def _alike(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether two ranges may be of one scale: about as wide, and both or neither normalised."""
    narrow, wide = sorted(largest - least for least, largest in (one, other))
    lower, higher = sorted((one[0], other[0]))
    is_told = narrow > 0 and (wide > APART * narrow or (lower < NEGATIVE and higher >= 0))
    return not is_told
