"""Find copies of the network that were made before it changed, such as averages of its weights."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ProxyTypes

import torch
from torch import Tensor, nn

from lightning_transfer.roles import on_the_way
from lightning_transfer.surgery import Structure, is_ours

DEEP = 4  # levels of containers and attributes that are looked through
MANY = 10_000  # longer containers hold data


def holders_of(before: Tensor, trainer: Any, module: Any) -> list[str]:
    """Return the names of parts and attributes of the module, callbacks and optimizers that hold an old weight.

    Args:
        before: the parameter before the change.
        trainer: with the callbacks and optimizers.
        module: the user's module.
    """
    if _is_constant(before):
        return []
    own = module.state_dict(keep_vars=True)
    inside = [name for name, tensor in own.items() if _is(tensor, before)]
    seen = {id(module), *map(id, own.values())}
    apart = [*_attributes(module), *((type(one).__name__, one) for one in (*trainer.callbacks, *trainer.optimizers))]
    return inside + [name for name, one in apart if any(_is(each, before) for _, each in _held(one, DEEP, {*seen}))]


def warn_of_outdated(changed_by: str, renamed: Mapping[str, str], trainer: Any, module: Any) -> None:
    """Warn if a copy of the network was made before its layers changed: pairs of their parameters no longer fit.

    A copy is a module, or tensors by their names in the network. Tensors in a list are not looked at: whether they are
    of the network before or after the change does not show.

    Args:
        changed_by: the callback that changed the layers.
        renamed: the new and the old names of the user's layers in it.
        trainer: with the callbacks.
        module: the user's module.
    """
    layers = ((was, module.get_submodule(new)) for new, was in renamed.items())
    named = ((was, f"{was}.{name}", param) for was, layer in layers for name, param in layer.named_parameters())
    place, was, weight = next((each for each in named if each[2].ndim > 1), ("", "", torch.zeros(1)))
    if _is_constant(weight):
        return
    own = {id(module), *map(id, module.state_dict(keep_vars=True).values())}
    apart = [*_attributes(module), *((type(one).__name__, one) for one in trainer.callbacks)]
    held = [(name, _held(one, DEEP, {*own}, skipped=_is_up_to_date)) for name, one in apart]
    held += [(name, _held(one, DEEP, {id(weight)}, skipped=_is_up_to_date)) for name, one in _beside(module, place)]
    if found := [name for name, tensors in held if any(_is_outdated(*each, was, weight) for each in tensors)]:
        warnings.warn(
            f"{changed_by} has changed the layers of {place!r}, and {', '.join(found)} holds a copy of the network "
            "from before. An average of the weights that pairs the two by order or by name is of another network. Make "
            "the copy after the change: in the module's setup, or, if configure_model builds the network, in "
            f"on_fit_start. If {found[0]!r} is the network to train, name it with backbone= or head=. If the copy is "
            "never updated, ignore this.",
            stacklevel=2,
        )


def _beside(module: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a module beside the way to a place in it."""
    way = dict(on_the_way(module, place))
    for path, parent in [("", module), *way.items()][:-1]:
        for name, child in parent.named_children():
            if (full := f"{path}.{name}".lstrip(".")) not in way:
                yield full, child


def _is_up_to_date(value: Any) -> bool:
    """Return whether this is of this package, or a copy that has changed layers or a part of a method."""
    if isinstance(value, nn.Module):
        return any(is_ours(part) or isinstance(part, Structure) for part in value.modules())
    return type(value).__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_outdated(name: str, tensor: Tensor, was: str, weight: Tensor) -> bool:
    """Return whether a tensor equals a weight and has its old name, with the layer's: a layer alone is not a copy."""
    return "." in name and f".{was}".endswith(f".{name}") and _is(tensor, weight)


def _attributes(module: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if not name.startswith("_")]


def _is_constant(tensor: Tensor) -> bool:
    """Return whether all numbers are equal, such as 0: another tensor may then be equal without being a copy."""
    return bool((tensor == tensor.flatten()[0]).all())


def _is(tensor: Any, before: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.shape != before.shape:
        return False
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return torch.equal(tensor.detach().to(before), before)


def _held(
    value: Any, deep: int, seen: set[int], *, skipped: Callable[[Any], bool] = lambda value: False, name: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a container, in a module, or in the attributes of another object, and their names there.

    A tensor in a module gets its own name after its layer's, without the names of wrappers, such as an average.
    """
    if id(value) in seen or type(value) in ProxyTypes or skipped(value):  # what a weak proxy stands for may be gone
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for path, each in (*value.named_parameters(), *value.named_buffers()):
            if id(each) not in seen:
                yield ".".join(path.split(".")[-2:]), each
    elif deep:
        inner = value if isinstance(value, Mapping | list | tuple) else getattr(value, "__dict__", {})
        pairs = inner.items() if isinstance(inner, Mapping) else [("", one) for one in inner]
        if len(pairs) <= MANY:
            for key, one in pairs:
                yield from _held(one, deep - 1, seen, skipped=skipped, name=str(key))
