"""Give a network images of another size than the one of its pretraining."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_transfer.errors import TransferConfigError, check_count
from lightning_transfer.naming import a_class
from lightning_transfer.tracing import evaluating, required_size, runs_on_a_picture


def height_and_width(image_size: Any) -> tuple[int, int] | None:
    """Return an option `image_size` as height and width; None if it is left out.

    Raises:
        TransferConfigError: it is not a number of pixels, or two.
    """
    if image_size is None:
        return None
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2:
        raise TransferConfigError(f"image_size={image_size!r}; it takes a number of pixels, or height and width.")
    for side in sides:
        check_count("image_size", side, least=1)
    return sides[0], sides[1]


def check_takes(network: nn.Module, size: tuple[int, int], *, name: str, fix: str) -> None:
    """Refuse a size that a network does not take.

    Args:
        network: in any mode, which does not change.
        size: height and width.
        name: of the network, for the message.
        fix: what the message says can be done.

    Raises:
        TransferConfigError: the network has another fixed size, or runs on other images but not on these.
    """
    required = required_size(network)
    with torch.compiler.set_stance("force_eager"), evaluating(network):
        fits = size == required or (
            not required and (runs_on_a_picture(network, size) or not runs_on_a_picture(network))
        )
    if not fits:
        takes = f"takes only images of {required[0]} x {required[1]} pixels" if required else "does not run on them"
        raise TransferConfigError(
            f"image_size is {size[0]} x {size[1]}, and {name}, {a_class(network)}, {takes}. {fix}"
        )


def resized(options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return timm's options of images, for images that are resized to a height and a width, and not cropped.

    >>> resized({"input_size": (3, 224, 224), "crop_pct": 0.875, "crop_mode": "center"}, (64, 48))
    {'input_size': (3, 64, 48), 'crop_pct': 1.0, 'crop_mode': 'squash'}
    """
    channels = options["input_size"][0]
    return {**options, "input_size": (channels, *size), "crop_pct": 1.0, "crop_mode": "squash"}
