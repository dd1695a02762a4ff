"""Look at the size of the images that a Trainer's loaders give."""

import warnings
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_transfer.glue.batch_hooks import has_hooks
from lightning_transfer.randomness import restored


def seen_size(trainer: Any, channels: int) -> tuple[int, int] | None:
    """Return height and width of the images of one validation batch, or else of a training batch.

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
            tensors = (leaf for leaf in tree_leaves(next(iter(loader))) if isinstance(leaf, Tensor))
            shapes = (leaf.shape for leaf in tensors if leaf.ndim == 4)
            return next((height, width) for _, number, height, width in shapes if number == channels)
    return None
