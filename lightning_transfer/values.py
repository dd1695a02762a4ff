"""Digest what a function or a module computes, so that two runs can be compared by it and not by its name."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_transfer.naming import name_of

Of: TypeAlias = Callable[[Any], Any]

KNOWN_BY_NAME = ("torch", "builtins", "lightning_transfer")  # their functions change with a version, not with a user


def value_of(function: Callable[..., Any]) -> str:
    """Return a name that differs if a function, a module or another callable computes something else.

    A function is compared by its code, its closure and the object it is bound to; a callable object by its attributes;
    a module without parameters, such as a criterion, by its attributes and buffers. Global names in the code are not
    followed. State that changes in a run is not compared: of a module with parameters only the layers count, of any
    other object only the class. Equal in every process with the same Python version.

    >>> value_of(torch.nn.functional.cross_entropy)
    'cross_entropy'
    >>> value_of(nn.CrossEntropyLoss(label_smoothing=0.1)) == value_of(nn.CrossEntropyLoss())
    False
    """
    if _is_known_by_name(function):
        return name_of(function)
    core = function.func if isinstance(function, partial) else function  # Python merges a partial of a partial
    given = dict(vars(core)) if isinstance(core, nn.Module) else {}
    given |= function.keywords if isinstance(function, partial) else {}
    shown = ", ".join(f"{key}={value}" for key, value in given.items() if _is_word(key, value))
    return f"{name_of(core)}({shown}) {_digest(repr(_content(function, ())).encode())[:8]}"


def _is_known_by_name(thing: Any) -> bool:
    package = str(getattr(thing, "__module__", "")).partition(".")[0]
    is_named = isinstance(thing, FunctionType | BuiltinFunctionType | type) and "<" not in thing.__qualname__
    return is_named and package in KNOWN_BY_NAME


def _is_word(key: str, value: Any) -> bool:
    return not key.startswith("_") and key != "training" and isinstance(value, bool | int | float | str)


def _is_value(thing: Any) -> bool:
    """Return whether an object is used as a function; other objects, such as callbacks, change in a run."""
    return callable(thing) and hasattr(thing, "__dict__")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(value: Any, inside: tuple[int, ...]) -> Any:
    """Return plain data that is equal for equal values: without addresses and without the order of a set."""
    if id(value) in inside:
        return "itself"
    if _is_known_by_name(value):
        return value.__module__, value.__qualname__
    return next(make for kind, make in KINDS if isinstance(value, kind))(
        value, lambda part: _content(part, (*inside, id(value)))
    )


def _of_tensor(tensor: Tensor, of: Of) -> Any:
    tensor = tensor.detach().cpu()
    return of(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


def _of_function(function: FunctionType, of: Of) -> Any:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__qualname__, *map(of, (function.__code__, function.__defaults__, function.__kwdefaults__, cells))


def _of_module(module: nn.Module, of: Of) -> Any:
    own = buffers = None
    if next(module.parameters(), None) is None:
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
        buffers = dict(module._buffers)
    return type(module).__qualname__, *map(of, (own, buffers, dict(module.named_children())))


# the first type that matches is used
KINDS: list[tuple[Any, Callable[[Any, Of], Any]]] = [
    ((type(None), bool, int, float, complex, str, bytes), lambda value, of: value),
    (Tensor, _of_tensor),
    (np.ndarray, lambda array, of: (str(array.dtype), array.shape, _digest(np.ascontiguousarray(array).tobytes()))),
    (Mapping, lambda mapping, of: sorted((repr(of(key)), of(item)) for key, item in mapping.items())),
    ((list, tuple), lambda items, of: [of(item) for item in items]),
    ((set, frozenset), lambda items, of: sorted(repr(of(item)) for item in items)),
    (CodeType, lambda code, of: (code.co_code, of(code.co_consts), code.co_names)),
    (partial, lambda call, of: (of(call.func), of(call.args), of(call.keywords))),
    (MethodType, lambda method, of: (of(method.__func__), of(method.__self__))),
    (type, lambda kind, of: (kind.__module__, kind.__qualname__)),
    (FunctionType, _of_function),
    (nn.Module, _of_module),
    (Dataset, lambda dataset, of: type(dataset).__qualname__),  # may be of any size
    (object, lambda thing, of: (type(thing).__qualname__, of(vars(thing) if _is_value(thing) else None))),
]
