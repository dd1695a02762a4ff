"""Restore what the user's batch-transfer hooks set while source batches pass, and refuse mixup, which would be lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.namespaces import is_lightnings
from lightning_transfer.naming import nesting

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def has_hooks(trainer: Any) -> bool:
    """Return whether the user wrote a batch-transfer hook, in the module or in the DataModule."""
    places = [place for place in (trainer.lightning_module, trainer.datamodule) if place is not None]
    return not all(is_lightnings(getattr(place, name)) for place in places for name in HOOKS)


@contextmanager
def forgotten(trainer: Any) -> Iterator[dict[str, Any]]:
    """Restore what hooks set on the module and on the DataModule inside this context.

    Attributes and buffers are compared by identity and restored, counters too. A tensor or an object that is changed in
    place cannot be detected and stays changed.

    Args:
        trainer: the Trainer of the module and the DataModule.

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
                place.clear()  # and fill it again, to keep the order of the attributes
                place.update(old)


def check_unmixed(were_set: dict[str, Any], batches: Any, num_images: int) -> None:
    """Refuse hooks that store a value for each source image, such as mixup's partners: the source loss ignores them.

    Args:
        were_set: attributes that hooks have set.
        batches: the hooks' input and output; a hook may keep parts of them.
        num_images: in the source batch.

    Raises:
        TransferConfigError: a hook stored such values; the message shows the option to pass.
    """
    if num_images < 2 or not were_set:
        return
    known = {_memory(leaf) for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)}
    for name, value in were_set.items():
        leaves = [value, *tree_leaves(value)]
        new = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or _memory(leaf) not in known]
        if any(_is_row_an_image(leaf, num_images) for leaf in new):
            raise TransferConfigError(
                f"While {num_images} source images went through the batch-transfer hooks, these set {name!r} to "
                f"{nesting(value)}: a value for each image, such as its partner in mixup. The source loss does not "
                "use it, so images would be mixed but not their labels. Pass SourceTask(batch_hooks=False): source "
                "batches then skip the hooks, so do what else your hooks do, such as normalising, in the source "
                "dataset's transform."
            )


def _memory(value: Tensor) -> int:
    """Return a number that all views of a tensor share."""
    return value.untyped_storage().data_ptr() if value.layout == torch.strided else id(value)


def _is_row_an_image(value: Any, num_images: int) -> bool:
    """Return whether a value has a row for each image, by its shape: no tensor is read from the device."""
    if isinstance(value, Tensor | np.ndarray):
        shape = tuple(value.shape)
        return shape[:1] == (num_images,) and (len(shape) <= 2 or set(shape[1:]) == {1})
    return isinstance(value, list | tuple) and {*map(type, value)} == {int} and sorted(value) == [*range(num_images)]
