"""What values are called in messages and checkpoints."""

from collections.abc import Callable
from typing import Any

import torch


def structure(value: object) -> str:
    """A batch's nesting, with shapes in place of values.

    >>> structure({"image": torch.zeros(2, 3), "path": ["a", "b"]})
    "{'image': Tensor(2, 3), 'path': [str, str]}"
    """
    if isinstance(value, torch.Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {structure(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(structure(item) for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return type(value).__name__


def name_of(function: Callable[..., Any]) -> str:
    """What a function or a module is called.

    >>> name_of(structure)
    'structure'
    """
    return getattr(function, "__qualname__", type(function).__name__)
