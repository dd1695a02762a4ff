"""Read the samples of any dataset as pictures, in the dataset's order, for filters and for display."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pickle import PicklingError
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_transfer.datasets import ControlFlowError, check_random_access, known_names, load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.selective.ranges import BYTE, Glance
from lightning_transfer.naming import nesting
from lightning_transfer.randomness import reseed, restored
from lightning_transfer.reading import apart, in_order
from lightning_transfer.source.listing import listed_by

CHANNELS = (1, 2, 3, 4)  # grey and colour, with or without transparency
READ = 64  # pictures a batch; divides the BLOCK of `store`, because a block is described in whole batches
IDENTIFIED = 64  # images that identify a large dataset and show its range of pixels
LARGER = 1.25  # times the other's side, from which images have another scale
PROBED, READINGS = 8, 3  # samples that are read several times, to check that they are always the same


class Picture(NamedTuple):
    """Holds one sample.

    Attributes:
        pixels: (channels, height, width), scaled to 0..1, or as the dataset normalises them; if the sample cannot be
            used, a string with the reason.
        label: its class; -1 if it is not a whole number.
    """

    pixels: Tensor | str
    label: int = -1


Batches: TypeAlias = Iterator[tuple[list[int], list[Picture]]]  # each with the indices of its pictures


class Pictures(Dataset[Picture]):
    """Turns the samples of another dataset into pictures; each sample is read with its own random state.

    Args:
        dataset: giving images, or (image, label): tensors, arrays or PIL images.
        name: of the side, such as "target", for messages.
        adapt: turns collated samples into (images, labels).
        num_workers: processes that read the dataset.
        multiprocessing_context: how these are started; as DataLoader does if left out.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        name: str,
        *,
        adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
    ) -> None:
        check_random_access(dataset, name)
        self.dataset: Any = dataset
        self.name = name
        self.adapt = adapt
        self.num_workers = num_workers
        self.multiprocessing_context = multiprocessing_context
        self.is_mirrored = False

    def mirrored(self) -> "Pictures":
        """Return the same pictures, mirrored."""
        other = copy.copy(self)
        other.name, other.is_mirrored = f"mirrored {self.name}", True
        return other

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Picture:
        with restored():
            return self.read(index, seed=0)

    def __getitems__(self, indices: Sequence[int]) -> list[Picture]:
        """Return pictures for `batches`, bytes as they are: a worker then sends a quarter as much."""
        with restored():  # once a batch: for a small image it takes as long as decoding
            return [self.read(index, seed=0, scales_bytes=False) for index in indices]

    def read(self, index: int, seed: int, *, scales_bytes: bool = True) -> Picture:
        """Return one picture; if it cannot be read or is not a picture, with the reason."""
        glance = self.glance
        try:
            given, label = self._given(index, seed)
            is_ready = given.dtype == torch.uint8 and not scales_bytes
            pixels = (given if is_ready else glance.scaled(given)).contiguous()
            return Picture(pixels.flip(-1) if self.is_mirrored else pixels, label)
        except ControlFlowError:
            raise  # this is not an unreadable image, of which some are allowed
        except Exception as error:
            return Picture(f"{type(error).__name__}: {error}")

    @cached_property
    def glance(self) -> Glance:
        """Return what some images show about all; the same in every process."""
        return apart(self._glance, self.num_workers)

    def _glance(self) -> Glance:
        found = Glance()
        with restored():
            for index in spread(len(self), IDENTIFIED):
                try:
                    found.see(*self._given(index, seed=0))
                except ControlFlowError:
                    raise
                except Exception:  # reported when the image is read
                    found.see(None, -1)
        return found

    @cached_property
    def listed(self) -> dict[str, str]:
        """Return digests of what the dataset lists about its images, by name."""
        return listed_by(self.dataset)

    @property
    def classes(self) -> list[str] | None:
        """Return the names of the classes, if the dataset has them and `adapt` does not choose other labels."""
        return None if self.adapt is not None else known_names(self.dataset)

    @property
    def identity(self) -> str:
        """Return a digest of the images in their order, from some of them and from what their dataset lists about all.

        Kept work is compared by it with the images that it was made of.
        """
        listed = "".join(f", {name} {digest}" for name, digest in self.listed.items())
        return f"{len(self)} images {self.glance.digest}{listed}"

    @property
    def identified_by(self) -> str:
        """Return a text that says what `identity` compares."""
        listed = "".join(f", {name}" for name in self.listed)
        return f"{min(len(self), IDENTIFIED):,} of {len(self):,} {self.name} images{listed}"

    def batches(self, indices: Sequence[int]) -> Batches:
        """Yield indices and their pictures in batches, in order; bytes are not yet `scaled`."""
        start = 0
        workers = {name: getattr(self, name) for name in ("num_workers", "multiprocessing_context")}
        workers["collate_fn"] = _packed
        try:
            for pixels, labels in in_order(self, indices, size=READ, workers=workers):
                batch = [Picture(*one) for one in zip(pixels, labels, strict=True)]
                yield list(indices[start : start + len(batch)]), batch
                start += len(batch)
        except (AttributeError, TypeError, PicklingError) as error:
            if not start and self.num_workers:
                error.add_note(
                    f"Workers that are not forked are sent the {self.name} dataset and adapt=. If these cannot be "
                    "pickled, define them in a module, and not as a lambda or inside of a function."
                )
            raise

    def _given(self, index: int, seed: int) -> tuple[Tensor, int]:
        reseed(seed, index)
        image, label = self._split(load(self.dataset, index, of=self.name))
        return _pixels(image), label

    def _split(self, sample: Any) -> tuple[Any, int]:
        if self.adapt is not None:
            images, labels = self.adapt(default_collate([sample]))
            sample = images[0], labels[0]
        label: Any
        image, label = sample if isinstance(sample, tuple | list) and len(sample) == 2 else (sample, None)
        label = torch.as_tensor(label) if isinstance(label, np.ndarray) and label.dtype.kind in "iu" else label
        is_class = isinstance(label, int | np.integer) or (
            isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point()
        )
        return image, max(int(label), -1) if is_class else -1

    def check_always_the_same(self, advice: str) -> None:
        """Refuse a dataset whose sample has other pixels when it is read again; the message ends in the advice."""
        if (index := self.differing()) is not None:
            raise TransferConfigError(
                f"The {self.name}'s transform is random: {self.name} sample {index} differs when it is read again. "
                f"{advice}"
            )

    def differing(self) -> int | None:
        """Return one of some samples that has other pixels when it is read again; None if there is none."""
        _ = self.glance  # here, where it is kept
        return apart(self._differing, self.num_workers)

    def _differing(self) -> int | None:
        for index in spread(len(self), PROBED):
            with restored():
                first, *others = (self.read(index, seed=seed).pixels for seed in range(READINGS))
            if isinstance(first, Tensor) and any(isinstance(o, str) or not torch.equal(first, o) for o in others):
                return index
        return None


def _pixels(image: Any) -> Tensor:
    """Return (channels, height, width) with unchanged values."""
    try:
        given = image if isinstance(image, Tensor) else np.array(_without_palette(image))
    except ValueError:  # parts of several shapes
        given = np.array(0)
    if given.ndim == 2:
        given = given[None] if isinstance(given, Tensor) else given[..., None]  # where each type has its channels
    if given.ndim != 3 or (given.shape[0] not in CHANNELS and given.shape[2] not in CHANNELS):
        raise TransferConfigError(
            f"expected an image (channels, height, width) or a PIL image, found {nesting(image)}; for other samples "
            "pass SourceTask(adapt=), or a dataset that returns (image, label)"
        )
    array = torch.as_tensor(given)
    if array.shape[0] not in CHANNELS or (not isinstance(image, Tensor) and array.shape[2] in CHANNELS):
        array = array.permute(2, 0, 1)
    array = array[: {1: 1, 2: 1, 3: 3, 4: 3}[array.shape[0]]]  # without transparency
    if array.dtype != torch.uint8 and not bool(torch.isfinite(array.float()).all()):
        raise TransferConfigError("it has NaN or infinite pixels")
    return array


def _without_palette(image: Any) -> Any:
    modes = ("P", "PA", "CMYK", "YCbCr", "HSV", "LAB")
    return image.convert("RGB") if getattr(image, "mode", None) in modes else image


def _packed(batch: list[Picture]) -> tuple[Tensor | list[Tensor | str], list[int]]:
    """Return pixels, in one tensor if they can be, and labels: a worker sends 64 tensors more slowly than one."""
    pixels, labels = map(list, zip(*batch, strict=True))
    first = pixels[0]
    are_alike = all(isinstance(one, Tensor) and (one.shape, one.dtype) == (first.shape, first.dtype) for one in pixels)
    return torch.stack(pixels) if are_alike else pixels, labels


def scaled(pixels: Tensor) -> Tensor:
    """Return pixels of `Pictures.batches` as floats."""
    return pixels.float().div_(BYTE) if pixels.dtype == torch.uint8 else pixels


def check_ranges(pictures: Pictures, source: Pictures) -> None:
    """Refuse pictures whose pixels have another range than the source's."""
    sides = (pictures, source)
    extents = {side.name: side.glance.extent for side in sides}
    if None not in extents.values() and len({extent.scale for extent in extents.values() if extent}) > 1:
        shown = " and ".join(f"{name} pixels run {extent}" for name, extent in extents.items())
        raise TransferConfigError(
            f"The {shown}: one is normalised and the other is not, so their statistics cannot be compared. Give both "
            "the same processing."
        )
    if not pictures.glance.agrees(source.glance):
        shown = " and ".join(f"{side.name} pixels are {side.glance}" for side in sides)
        raise TransferConfigError(
            f"The {shown}: their ranges differ, so equal brightness has different values. Bring both to one range, for "
            "example to floats of 0 to 1."
        )


def check_alike(target: Pictures, source: Pictures, protect: Sequence[Pictures]) -> None:
    """Check all ranges, and warn if the target's or the source's images are much larger."""
    for side in (target, *protect):
        check_ranges(side, source)
    target_side, source_side = (pictures.glance.side for pictures in (target, source))
    if max(target_side, source_side) > LARGER * min(target_side, source_side) > 0:
        warnings.warn(
            f"Target images have sides of about {target_side:.0f} pixels, source images of {source_side:.0f}: "
            "filters see them at different scales. Resize both to one size.",
            stacklevel=3,
        )


def spread(num: int, wanted: int) -> list[int]:
    """Return evenly spread positions, including the first and the last."""
    found: list[int] = torch.linspace(0, num - 1, min(num, wanted), dtype=torch.float64).long().tolist()
    return found


def for_display(pixels: Tensor) -> np.ndarray[Any, Any]:
    """Return pixels of any scale as (height, width, 3) in 0..1."""
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        pixels = (pixels - low) / max(high - low, 1e-9)
    return pixels.permute(1, 2, 0).numpy()
