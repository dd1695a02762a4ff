"""Find the layers that have running statistics, as BatchNorm has, and see whether these are new or have changed."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FEW, MANY = 10, 100  # batches that a layer has seen (ours)
ROUNDING = 1e-4  # of a mean and its deviation; a step in training mode moves means by a tenth of what differs


def is_new(layer: Any) -> bool:
    """Return whether a layer has the statistics of one that has seen no batch.

    >>> is_new(nn.BatchNorm2d(4))
    True
    """
    mean, variance = layer.running_mean, layer.running_var
    return is_lazy(mean) or bool((mean == 0).all() and (variance == 1).all())


def are_new(layers: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return which layers have the statistics of new ones: of no batch, or of a few where others have seen many.

    A forward that finds out the number of features, or a dry run, has shown a new head some batches.
    """
    batches = {path: int(getattr(layer, "num_batches_tracked", None) or 0) for path, layer in layers.items()}
    few = FEW if max(batches.values(), default=0) > MANY else 0
    return {path: is_new(layer) or 0 < batches[path] < few for path, layer in layers.items()}


def has_moved(layer: Any, before: Tensor) -> Tensor:
    """Return whether a mean differs by more than rounding, which averages of equal weights have."""
    mean, spread = layer.running_mean, layer.running_var.sqrt()
    moved: Tensor = (mean - before.to(mean.device)).abs() > ROUNDING * (mean.abs() + spread)
    return moved.any()


def normalizing_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that have running statistics, also those that torch.jit.script has compiled."""
    for path, layer in module.named_modules():
        if {"running_mean", "running_var"} <= {name for name, _ in layer.named_buffers(recurse=False)}:
            yield path, layer
