"""Copy a module to train the copy, and refuse a copy that runs the original."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from lightning_transfer.compiling import outside_graphs
from lightning_transfer.errors import TransferConfigError

M = TypeVar("M", bound=nn.Module)


class RunsOriginalError(TransferConfigError):
    """Says that a copy of a module runs the original."""


def copied(module: M) -> M:
    """Return a deep copy, also of what the methods in its attributes hold.

    LightningCLI sets `configure_optimizers` to a method that holds an optimizer of the module's parameters.
    """
    memo: dict[int, object] = {}
    twin = copy.deepcopy(module, memo)
    for name, method in vars(module).items():
        if isinstance(method, MethodType) and method.__self__ is module:
            setattr(twin, name, MethodType(copy.deepcopy(method.__func__, memo), twin))
    return twin


@contextmanager
def only_copies_run(module: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Refuse every run of a module's layers inside this context that would change them or give them a gradient.

    A function in an attribute, such as a lambda, still runs the original when the copy calls it. Without an error, a
    trial would train nothing, and would move the statistics of the original. Layers that the copy shares may run.
    """
    refuse, shared = _Refuse(module), {*twin.modules()}
    own = (layer for layer in module.modules() if layer not in shared and _is_changed_by_a_run(layer))
    handles = [layer.register_forward_pre_hook(refuse) for layer in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if refuse.has_refused:
            torch.compiler.reset()  # graphs that hold the hook


def _is_changed_by_a_run(layer: nn.Module) -> bool:
    """Return whether a layer is trained or has statistics that move; a criterion or a frozen teacher may run."""
    if isinstance(layer, torch.jit.ScriptModule):  # it takes no hooks
        return False
    if any(param.requires_grad for param in layer.parameters(recurse=False)):
        return True
    has_buffers = next(layer.buffers(recurse=False), None) is not None
    return layer.training and has_buffers and not isinstance(layer, _Loss)  # whose buffers are weights of classes


class _Refuse:
    """Raises an error, as a forward pre-hook."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module).__name__
        self.has_refused = False

    @outside_graphs
    def __call__(self, layer: nn.Module, args: object) -> None:
        self.has_refused = True
        raise RunsOriginalError(
            f"A copy of {self.kind} is run here, and it runs the {type(layer).__name__} of the original. This happens "
            "if an attribute holds a function that runs the network, such as a lambda or "
            "torch.compile(self.model.forward). Write a method that runs self.model, and compile by "
            "self.model.compile()."
        )
