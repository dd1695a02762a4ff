"""Find a dataset's range of pixels from some of its images: what is white, and whether two datasets agree (ours)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.pixel_ranges import RAW, Extent
from lightning_transfer.stamps import digest

BYTE, WORD = 255.0, 65535.0  # white in 8 and in 16 bits
FAR = 100.0  # if one dataset is this many times as bright as another, their ranges differ


@dataclass
class Range:
    """Holds the range of the pixels seen so far of one kind.

    Attributes:
        dtype: of the first pixels.
        least: smallest pixel.
        largest: largest pixel.
        is_whole: whether all values are whole numbers, in any type.
    """

    dtype: torch.dtype
    least: float = math.inf
    largest: float = -math.inf
    is_whole: bool = True

    def see(self, pixels: Tensor) -> None:
        """Include more pixels."""
        self.least = min(self.least, float(pixels.min()))
        self.largest = max(self.largest, float(pixels.max()))
        self.is_whole = self.is_whole and bool((pixels == pixels.round()).all())

    @property
    def white(self) -> float:
        """Return the number that pixels are divided by; 1 for signed pixels and for floats of unknown range."""
        if self.dtype in (torch.bool, torch.uint8):
            return 1.0 if self.dtype == torch.bool else BYTE
        as_they_are = RAW if self.is_float and not self.is_whole else 1.0
        if self.least < 0 or self.largest <= as_they_are:
            return 1.0
        return BYTE if self.largest <= BYTE else WORD

    @property
    def is_far_below_white(self) -> bool:
        """Return whether the largest pixel is far below the guessed white, as in digits of 0..16 or in 12 bits."""
        return self.dtype not in (torch.bool, torch.uint8) and self.white > 1 and self.largest < self.white / 2

    @property
    def is_float(self) -> bool:
        """Return whether the type is a float."""
        return self.dtype.is_floating_point

    @property
    def is_sure(self) -> bool:
        """Return whether the type alone decides what is white."""
        return self.dtype in (torch.bool, torch.uint8) or (self.dtype == torch.uint16 and self.white == WORD)

    def agrees(self, other: "Range") -> bool:
        """Return whether pixels of both kinds mean the same brightness, each divided by its white."""
        if not self.largest or not other.largest:  # all pixels are black, which decides nothing
            return True
        is_told = self.is_sure and other.is_sure
        is_converted = any(
            one.is_float and one.white == 1 and not two.is_float for one, two in ((self, other), (other, self))
        )  # 0..1 by ToTensor
        if self.white != other.white and not is_told and not is_converted:
            return False
        brightest = sorted([self.largest / self.white, other.largest / other.white])
        return min(self.least, other.least) < 0 or brightest[1] < FAR * brightest[0]

    def __str__(self) -> str:
        white = f", white at {self.white:g}" if self.least >= 0 else ""
        return f"{str(self.dtype).removeprefix('torch.')} from {self.least:g} to {self.largest:g}{white}"


@dataclass
class Glance:
    """Holds what some images of a dataset show about all of them.

    Attributes:
        ranges: of their pixels, by kind.
        areas: of each image, in pixels.
        digest: of all these images.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    areas: list[int] = field(default_factory=list)
    digest: str = ""

    def see(self, pixels: Tensor | None, label: int) -> None:
        """Include an image as its dataset returns it; None if it cannot be read."""
        if pixels is not None:
            self.areas.append(pixels.shape[1] * pixels.shape[2])
            self.ranges.setdefault(_kind(pixels.dtype), Range(pixels.dtype)).see(pixels.float())
        self.digest = digest([self.digest, label, None if pixels is None else pixels.float()])

    @property
    def side(self) -> float:
        """Return the root of the mean area; 0 if no image could be read."""
        return math.sqrt(sum(self.areas) / max(len(self.areas), 1))

    @property
    def extent(self) -> Extent | None:
        """Return the range of pixels divided by their white; None if no image could be read."""
        ends = [(one.least / one.white, one.largest / one.white) for one in self.ranges.values()]
        return Extent(min(least for least, _ in ends), max(largest for _, largest in ends)) if ends else None

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return an image's pixels divided by the dataset's white.

        Raises:
            TransferConfigError: none of the probed images had pixels of this kind or range.
        """
        seen, kind = self.ranges.get(_kind(pixels.dtype)), str(pixels.dtype).removeprefix("torch.")
        found = pixels.float()
        if pixels.dtype in (torch.bool, torch.uint8):
            return found / Range(pixels.dtype).white
        if seen is None:
            raise TransferConfigError(f"its pixels are of {kind}, those of the images that were probed are not")
        is_bounded = seen.least >= 0 and (seen.white > 1 or not seen.is_float)
        if is_bounded and not 0 <= float(found.min()) <= float(found.max()) <= seen.white:
            raise TransferConfigError(
                f"its pixels run from {float(found.min()):g} to {float(found.max()):g}, those of the images that were "
                f"probed are {seen}; expected one range in all images of a dataset. Give 8 bits as uint8, or bring all "
                "images to floats of 0..1"
            )
        return found / seen.white

    def agrees(self, other: "Glance") -> bool:
        """Return whether images of both can be compared, as far as the images seen show it."""
        pairs = [(mine, theirs) for mine in self.ranges.values() for theirs in other.ranges.values()]
        return not pairs or any(mine.agrees(theirs) for mine, theirs in pairs)

    def __str__(self) -> str:
        return " and ".join(map(str, self.ranges.values())) or "not readable"


def _kind(dtype: torch.dtype) -> str:
    if dtype in (torch.bool, torch.uint8):
        return str(dtype)
    return "float" if dtype.is_floating_point else "whole"
