"""Leave no trace of source batches in what the user's batch-transfer hooks remember, and refuse mixing that is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import structure

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def has_hooks(trainer: Any) -> bool:
    """Return whether the user wrote a batch-transfer hook, in the module or in the DataModule."""
    places = [place for place in (trainer.lightning_module, trainer.datamodule) if place is not None]
    authors = {getattr(place, name).__module__.partition(".")[0] for place in places for name in HOOKS}
    return not authors <= {"lightning", "pytorch_lightning"}


@contextmanager
def forgotten(trainer: Any) -> Iterator[dict[str, Any]]:
    """Put back what hooks set on the module and on the DataModule while it lasts.

    Attributes and buffers are compared by identity and put back as they were, counters too. What is changed in place, a
    tensor or an object that the module holds, cannot be seen and stays changed.

    Args:
        trainer: whose module and DataModule.

    Returns:
        Names and values that were set, filled in at the end.
    """
    module, data = trainer.lightning_module, trainer.datamodule
    places = [vars(module), module._buffers, *([] if data is None else [vars(data)])]
    before = [dict(place) for place in places]
    were_set: dict[str, Any] = {}
    try:
        yield were_set
    finally:
        for place, old in zip(places, before, strict=True):
            found = {name: value for name, value in place.items() if name not in old or old[name] is not value}
            if found or len(place) < len(old):
                were_set |= found
                place.clear()  # and filled again: attributes are in their order, too
                place.update(old)


def check_unmixed(were_set: dict[str, Any], batches: Any, num_images: int) -> None:
    """Refuse hooks that keep a row for each source image, as mixup keeps partners: the source loss does not know them.

    Args:
        were_set: attributes that hooks have set.
        batches: what went into the hooks and what came out; a hook may keep parts of it.
        num_images: in the source batch.

    Raises:
        TransferConfigError: with the option to pass.
    """
    if num_images < 2:
        return
    known = {_memory(leaf) for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)}
    for name, value in were_set.items():
        leaves = [value, *tree_leaves(value)]
        new = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or _memory(leaf) not in known]
        if any(_is_row_an_image(leaf, num_images) for leaf in new):
            raise TransferConfigError(
                f"While {num_images} source images went through the batch-transfer hooks, these set {name!r} to "
                f"{structure(value)}: something of each image, such as the partner that mixup mixes it with. The "
                "source loss does not use it, so images would be mixed and their labels not. Pass "
                "SourceTask(batch_hooks=False): source batches then pass no hook, so let the transform of the source "
                "dataset do what else your hooks do, such as normalising."
            )


def _memory(value: Tensor) -> int:
    """Return a number that views of one tensor share."""
    return value.untyped_storage().data_ptr() if value.layout == torch.strided else id(value)


def _is_row_an_image(value: Any, num_images: int) -> bool:
    """Return whether it is labels, shares or places of images, by its shape: no tensor is read from the device."""
    if isinstance(value, Tensor | np.ndarray):
        shape = tuple(value.shape)
        return shape[:1] == (num_images,) and (len(shape) <= 2 or set(shape[1:]) == {1})
    return isinstance(value, list | tuple) and {*map(type, value)} == {int} and sorted(value) == [*range(num_images)]
