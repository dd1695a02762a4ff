"""Find what still holds the old numbers of a parameter that was changed: averages, slow weights, a start to keep."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEEP = 4  # levels of containers and attributes that are looked through
MANY = 10_000  # longer containers hold data


def holders_of(before: Tensor, trainer: Any, module: Any) -> list[str]:
    """Return the names of what holds a parameter as it was: parts of the module, its attributes, callbacks, optimizers.

    Args:
        before: its numbers before the change.
        trainer: with the callbacks and optimizers.
        module: the user's module.
    """
    if bool((before == before.flatten()[0]).all()):
        return []  # zeros, as other tensors have by chance
    own = module.state_dict(keep_vars=True)
    inside = [name for name, tensor in own.items() if _is(tensor, before)]
    seen = {id(module), *map(id, own.values())}
    apart = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    apart += [(type(one).__name__, one) for one in (*trainer.callbacks, *trainer.optimizers)]
    return inside + [name for name, one in apart if any(_is(each, before) for each in _held(one, DEEP, {*seen}))]


def _is(tensor: Any, before: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.shape != before.shape:
        return False
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return torch.equal(tensor.detach().to(before), before)


def _held(value: Any, deep: int, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in a container, in a module, or in the attributes of another object."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (each for each in (*value.parameters(), *value.buffers()) if id(each) not in seen)
    elif deep:
        inner = value if isinstance(value, Mapping | list | tuple) else getattr(value, "__dict__", {})
        each = inner.values() if isinstance(inner, Mapping) else inner
        if len(each) <= MANY:
            for one in each:
                yield from _held(one, deep - 1, seen)
