"""Hold the range of images' pixels, and compare it with what a network was pretrained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

RAW = 32.0  # a pixel beyond any normalisation, so of bytes
FEW = 20  # one of so many pixels may be noise: of erased parts, or of interpolation (ours)
NEGATIVE = -0.5  # the lowest of normalised pixels is below this (ours)
# By this part of its width, a twentieth of the pixels may leave the expected range at each end (ours): bicubic resizing
# of tensors overshoots by at most 3/16 along an axis, and noise of deviation 0.15 on white images from 0 to 1 stays in.
MARGIN = 0.25


@dataclass
class Extent:
    """Holds the smallest and the largest pixel of the images that were seen of a side."""

    least: float = math.inf
    largest: float = -math.inf

    def see(self, images: Tensor) -> "Extent":
        """Include more images, and return itself."""
        self.least = min(self.least, float(images.min()))
        self.largest = max(self.largest, float(images.max()))
        return self

    @property
    def scale(self) -> tuple[bool, bool]:
        """Return whether some pixels are below 0 (normalised), and whether some are raw numbers from 0 to 255."""
        return self.least < 0, self.largest > RAW

    def __str__(self) -> str:
        return f"from {self.least:.2f} to {self.largest:.2f}"


class PixelRange(NamedTuple):
    """Holds the range of some images' pixels.

    Attributes:
        least: smallest pixel.
        largest: largest pixel.
        low: a twentieth of the pixels are not above it.
        high: a twentieth of the pixels are not below it.
    """

    least: float
    largest: float
    low: float
    high: float

    @classmethod
    def of(cls, images: Tensor) -> "PixelRange":
        """Return the range of the pixels of a batch."""
        pixels = images.detach().float().cpu().flatten()  # kthvalue on a GPU raises if it has to be deterministic
        few = -(-pixels.numel() // FEW)
        return cls(*(float(pixels.kthvalue(place)[0]) for place in (1, pixels.numel(), few, pixels.numel() + 1 - few)))

    def misfit(self, mean: Sequence[float], std: Sequence[float]) -> str:
        """Say how pixels differ from images that were normalised by a mean and a standard deviation of each channel.

        Returns:
            "not normalised", "normalised otherwise", or "" if they may be such images.

        >>> PixelRange(0.0, 1.0, 0.1, 0.9).misfit((0.5,), (0.5,))
        'not normalised'
        """
        least, largest = normalised_range(mean, std)
        margin = MARGIN * (largest - least)
        is_bright = 1 < self.largest < 2 * largest  # normalised images without a dark pixel
        if self.least >= 0 and least < NEGATIVE and not is_bright:
            return "not normalised"
        is_outside = self.low < least - margin or self.high > largest + margin
        return "normalised otherwise" if is_outside else ""


def normalised_range(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest pixel of images from 0 to 1 after they were normalised.

    >>> normalised_range((0.5, 0.5), (0.5, 0.25))
    (-2.0, 2.0)
    """
    channels = [*zip(mean, std, strict=True)]
    return min(-each / by for each, by in channels), max((1 - each) / by for each, by in channels)
