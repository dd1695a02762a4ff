"""Compare the images that a Trainer's loaders give with those that timm's transform makes."""

import warnings
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_transfer.glue.batch_hooks import has_hooks
from lightning_transfer.pixel_ranges import PixelRange, normalised_range
from lightning_transfer.randomness import restored


def warn_of_other_images(
    trainer: Any, prepared: dict[str, Any], keeps_size: bool, keeps_pixels: bool, *, has_size: bool
) -> None:
    """Warn if the Trainer's images have another size, or clearly other pixels, than those of timm's transform.

    Args:
        trainer: of the training.
        prepared: how timm prepares images.
        keeps_size: whether the forward of the module keeps the size of images.
        keeps_pixels: whether it keeps their pixels.
        has_size: whether there is no other size to be written.
    """
    (channels, *listed), compares_size = prepared["input_size"], keeps_size and not has_size
    images = _seen_images(trainer, channels) if compares_size or keeps_pixels else None
    if images is None:
        return
    found = tuple(images.shape[2:])
    if compares_size and found != (*listed,):
        fix = found[0] if found[0] == found[1] else found
        warnings.warn(
            f"The Trainer's images are {found[0]} x {found[1]} pixels, and config.json says {listed[0]} x {listed[1]}: "
            "timm's transform makes images of another size than those of the validation. If your transform resizes "
            f"without a crop, pass image_size={fix}; otherwise set the pretrained_cfg of the network.",
            stacklevel=4,
        )
    if not keeps_pixels:
        return
    pixels, (mean, std) = PixelRange.of(images), (prepared["mean"], prepared["std"])
    if misfit := pixels.misfit(mean, std):
        (least, largest), own = normalised_range(mean, std), "mean=..., std=..."
        if misfit == "not normalised":
            by = "1 / 255" if pixels.largest > 1 else "1"
            own = f"mean=({', '.join('0' for _ in mean)}), std=({', '.join(by for _ in std)})"
        warnings.warn(
            f"Pixels of the Trainer's images run from {pixels.least:.3g} to {pixels.largest:.3g}, and timm's "
            f"transform, with the mean and std of config.json, makes them from {least:.2g} to {largest:.2g}. If the "
            "network takes them as the Trainer's loader gives them, call "
            f"network.pretrained_cfg.update({own}) before the export.",
            stacklevel=4,
        )


def _seen_images(trainer: Any, channels: int) -> Tensor | None:
    """Return the images of one validation batch, or else of a training batch.

    Args:
        trainer: has the loaders, after its run.
        channels: of the images.

    Returns:
        None if no batch can be read, it has no such images, or hooks of the user change batches after they are loaded.
    """
    for name in ("val_dataloaders", "train_dataloader"):
        with suppress(Exception), restored(), warnings.catch_warnings(action="ignore"):
            if has_hooks(trainer):
                return None
            loader = tree_leaves(getattr(trainer, name))[0]  # there may be several
            leaves = (leaf for leaf in tree_leaves(next(iter(loader))) if isinstance(leaf, Tensor) and leaf.ndim == 4)
            return next(leaf for leaf in leaves if leaf.shape[1] == channels)
    return None
