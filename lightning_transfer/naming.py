"""Describe values in messages and checkpoints."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def nesting(value: object) -> str:
    """Describe a batch's nesting, with shapes in place of values.

    >>> nesting({"image": torch.zeros(2, 3), "path": ["a", "b"]})
    "{'image': Tensor(2, 3), 'path': [str, str]}"
    """
    if isinstance(value, torch.Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {nesting(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(nesting(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return type(value).__name__


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of an object's class.

    >>> name_of(nesting)
    'nesting'
    """
    return getattr(function, "__qualname__", type(function).__name__)


def a_class(value: object) -> str:
    """Return the name of an object's class, after its article.

    >>> a_class(1), a_class("text")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def options_of(thing: object) -> dict[str, bool | int | float | str | None]:
    """Return the options of an object of this package as plain values, including those of nested options.

    >>> from lightning_transfer.schedules import Schedule
    >>> options_of(Schedule(end=0.5))
    {'start': 1.0, 'end': 0.5, 'shape': 'linear', 'until': 0.5, 'until_steps': None}
    """
    kept = {**getattr(thing, "options", {})}
    names = inspect.signature(type(thing)).parameters
    kept |= {name: getattr(thing, name) for name in names if hasattr(thing, name)}
    return plain({name: kept[name] for name in names if name in kept})


def plain(options: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Return options as plain values, those of an option's own options too.

    >>> plain({"gated": ["layer3", "layer4"], "width": 4})
    {'gated/0': 'layer3', 'gated/1': 'layer4', 'width': 4}
    """
    return dict(pair for name, value in options.items() for pair in _plain(name, value))


def _plain(name: str, value: Any) -> Iterator[tuple[str, bool | int | float | str | None]]:
    if value is None or isinstance(value, bool | int | float | str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _plain(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        yield from _plain(name, dict(enumerate(value)))
    elif type(value).__module__.startswith("lightning_transfer.") and not isinstance(value, torch.nn.Module):
        for key, item in options_of(value).items():
            yield f"{name}/{key}", item
    else:
        yield name, name_of(value)
