"""Find compiled parts of a module, and keep what changes from step to step out of their graphs."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Act = TypeVar("Act", bound=Callable[..., Any])


def is_run_again() -> bool:
    """Return whether a backward pass runs this forward again (activation checkpointing); False while compiling."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # torch's own way to ask


def uncompiled(module: nn.Module) -> Any:
    """Return the module inside a compiled one, or the module itself."""
    return getattr(module, "_orig_mod", module)  # private: where torch.compile keeps it


def uncompiled_path(path: str) -> str:
    """Return the path of a layer or a weight without what torch.compile adds to it.

    >>> uncompiled_path("model._orig_mod.bn._orig_mod")
    'model.bn'
    """
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod")


def forget_graphs(module: nn.Module) -> None:
    """Clear compiled graphs if a part of a module is compiled: earlier graphs do not run hooks that are added later.

    Torch does not check for new hooks, because that would cost time in each call. All graphs of the program are
    cleared, and made again when they are needed: torch has no public way to clear some.
    """
    if is_compiled(module):
        torch.compiler.reset()


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, is compiled."""
    is_whole = getattr(module, "_compiler_ctx", None) is not None  # private: Lightning keeps torch.compile(module) so
    return is_whole or any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl for layer in module.modules())


def outside_graphs(act: Act) -> Act:
    """Keep a function out of compiled graphs: what it does changes from step to step, and a graph would freeze it."""
    disabled: Act = torch.compiler.disable(act)
    return disabled
