"""Move and convert batches, and run modules, as a Trainer does in its steps or in validation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_transfer.glue.batch_hooks import forgotten
from lightning_transfer.naming import nesting
from lightning_transfer.tracing import evaluating


def to_device(trainer: Any, batch: Any, *, hooks: bool, were_set: dict[str, Any] | None = None) -> Any:
    """Convert and move a batch as the training loop does.

    Args:
        trainer: the Trainer.
        batch: as the loader returned it.
        hooks: whether it passes the user's batch-transfer hooks; `forgotten` restores what these set.
        were_set: filled with the attributes that hooks have set.
    """
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    if not hooks:
        device = trainer.strategy.root_device
        is_async = device.type == "cuda"  # as in Lightning's own transfer; on "mps" it was not safe
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=is_async), batch)
    # the same three steps as the loop: 64-true and bf16-true convert the input, the selector finds DataModule hooks
    with forgotten(trainer) as found:
        try:
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        except Exception as error:
            error.add_note(
                f"This happened while a batch, {nesting(batch)}, went through the batch-transfer hooks. If it is a "
                "source batch, let the source dataset return samples like the target's, and extract images and labels "
                "with SourceTask(adapt=lambda batch: (images, labels)). SourceTask(batch_hooks=False) skips the hooks, "
                "and everything that they do, such as normalising."
            )
            raise
    if were_set is not None:
        were_set |= found
    return batch


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """Set the Trainer's state to validating, so that hooks that augment training images do not."""
    stage, trainer.validating = trainer.state.stage, True
    try:
        yield
    finally:
        trainer.state.stage = stage


def as_validated(trainer: Any, batch: Any, *, hooks: bool = True) -> Any:
    """Convert and move a batch as validation does: hooks that augment training images do not."""
    with validating(trainer), evaluating(trainer.lightning_module):  # a hook may ask for either
        return to_device(trainer, batch, hooks=hooks)


@contextmanager
def as_in_steps(trainer: Any, *modules: nn.Module) -> Iterator[None]:
    """Run modules in eval mode and without gradients, in the precision of the Trainer's steps."""
    try:
        with evaluating(*modules), trainer.precision_plugin.forward_context():
            yield
    finally:
        torch.clear_autocast_cache()  # of weights that were cast without gradients, which the step would use
