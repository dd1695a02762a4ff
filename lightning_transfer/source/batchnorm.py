"""Keep BatchNorm's running statistics the target's while source images pass, or refuse what would move them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.roles import users_modules


@contextmanager
def protected_batchnorm(module: nn.Module, *, on: bool) -> Iterator[None]:
    """Keep the running statistics of BatchNorm layers in training; they normalise by the batch as usual."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training] if on else []
    layers = [layer for layer in layers if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def refused_if_moved(module: nn.Module, *, on: bool) -> Iterator[None]:
    """Raise if running statistics have moved at the end of the block, after putting them back.

    `protected_batchnorm` does not keep those of a scripted BatchNorm, or of a layer with a forward of its own.

    Raises:
        TransferConfigError: they have moved.
    """
    before = {name: buffer.clone() for name, buffer in _statistics(module).items()} if on else {}
    yield
    now = _statistics(module) if on else {}
    same = partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    if moved := [name for name, buffer in now.items() if not same(buffer, before[name])]:
        for name, buffer in now.items():
            buffer.copy_(before[name])
        raise TransferConfigError(
            f"batchnorm='protect' cannot keep {moved[0]!r}: its layer is not torch's BatchNorm, or has a forward of "
            "its own, and source images have changed it. Pass SourceTask(batchnorm='update') or forward='joint'."
        )


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return all running statistics, by name."""
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffer for name, buffer in module.named_buffers() if name.endswith(kinds)}


def check_protectable(module: nn.Module) -> None:
    """Refuse what would move running statistics in spite of `protected_batchnorm`."""
    layers = list(users_modules(module))
    has_batchnorm = any(isinstance(layer, _BatchNorm) for _, layer in layers)
    for name, layer in layers:
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise TransferConfigError(
                f"batchnorm='protect' cannot keep the running statistics of {name!r}, an InstanceNorm that tracks "
                "them. Pass SourceTask(batchnorm='update') or forward='joint'."
            )
        if has_batchnorm and getattr(layer, "grad_checkpointing", False):
            raise TransferConfigError(
                f"{name or type(module).__name__!r} recomputes activations (grad_checkpointing) in the backward pass, "
                "after batchnorm='protect' has ended. Pass SourceTask(batchnorm='update') or forward='joint'."
            )
