"""Hooks of somebody's module, stood in for on the instance, and put back exactly as they were."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_transfer.glue.trainer import Weakly, is_run_by

HOOKS = (  # private: where torch keeps a layer's hooks, and what it knows of them, by number
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class StandIn(ABC):
    """Stands on a module's instance in place of one of its hooks; abstract.

    Several may stand on one another, ours and other people's, and be taken away in any order: one that is removed from
    under another lets everything pass from then on. A copy of the module, pickled or deep, gets the user's own hook
    back, bound to the copy.

    While another Trainer runs the module, one that validates it in the middle of a fit, say, everything passes too.

    Args:
        module: the user's module.
        name: the hook's name.
        trainer: whose run it is.
    """

    def __init__(self, module: Any, name: str, trainer: Any) -> None:
        self.module = module
        self.name = name
        self.run = Weakly(trainer)
        self.own = vars(module).get(name)  # a compiled module, say, already owns a step on the instance
        self.hook: Callable[..., Any] = getattr(module, name)
        self.is_removed = False
        self.__code__ = type(self).__call__.__code__  # by it Lightning asks whether a hook is overridden
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's hook does, and more of ours."""
        trainer = self.run.get()
        if self.is_removed or trainer is None or not is_run_by(trainer, self.module):
            return self.hook(*args, **kwargs)
        return self.act(*args, **kwargs)

    @abstractmethod
    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Run `self.hook`, and what it is stood in for."""

    def remove(self) -> None:
        """Put back what was found, as far as nobody else stands on top."""
        self.is_removed = True
        top = vars(self.module).get(self.name)
        while isinstance(top, StandIn) and top.is_removed:
            delattr(self.module, self.name)
            if top.own is not None:
                setattr(self.module, self.name, top.own)
            top = top.own

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return (itemgetter(0), ((self.hook,),))  # the hook itself, by nothing that only this package could load


class Afterwards(StandIn):
    """Runs the user's hook, then something of ours with what it returned."""

    def __init__(self, module: Any, name: str, trainer: Any, then: Callable[[Any], None]) -> None:
        super().__init__(module, name, trainer)
        self.then = then

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """The user's result."""
        result = self.hook(*args, **kwargs)
        self.then(result)
        return result


class Before(StandIn):
    """Looks at what the user's hook is given, then runs it."""

    def __init__(self, module: Any, name: str, trainer: Any, first: Callable[..., None]) -> None:
        super().__init__(module, name, trainer)
        self.first = first

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """The user's result."""
        self.first(self.module, *args, **kwargs)
        return self.hook(*args, **kwargs)


class WithoutHooks(StandIn):
    """Takes this package's hooks out of a network while a strategy writes a checkpoint, which may hold the network.

    Saved hyperparameters often do; pickled, a hook would ask for this package wherever the checkpoint is loaded, and be
    a part of the loaded network for good. The Trainer collects a checkpoint first and has the strategy write it then,
    whoever asked for it and whether or not for weights alone.

    Args:
        trainer: whose strategy it is.
        network: what holds the hooks.
    """

    def __init__(self, trainer: Any, network: nn.Module) -> None:
        super().__init__(trainer.strategy, "save_checkpoint", trainer)
        self.network = network

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Write without hooks, and put them back where they were among the user's own."""
        taken = [pair for layer in self.network.modules() for pair in _take_hooks(layer)]
        try:
            result = self.hook(*args, **kwargs)
            plugin = self.module.checkpoint_io
            is_async = any(cls.__name__ == "AsyncCheckpointIO" for cls in type(plugin).__mro__)
            if is_async and taken and any(isinstance(leaf, nn.Module) for leaf in tree_leaves((args, kwargs))):
                plugin.teardown()  # wait for its thread, which pickles the network; the next call starts another
            return result
        finally:
            for hooks, before in taken:
                hooks.clear()
                hooks.update(before)


def keep_hooks_out(trainer: Any) -> None:
    """Write checkpoints without hooks for as long as a Trainer lives, for parts that stay in a module."""
    if not isinstance(vars(trainer.strategy).get("save_checkpoint"), WithoutHooks):
        WithoutHooks(trainer, trainer.lightning_module)


def _take_hooks(layer: nn.Module) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
    """Take this package's hooks out of a layer; give each dictionary that held some, and what was in it."""
    every: list[dict[int, Any]] = [getattr(layer, kind) for kind in HOOKS]
    numbers = {number for hooks in every for number, hook in hooks.items() if _is_our_hook(hook)}
    for hooks in every:
        if numbers & hooks.keys():
            yield hooks, dict(hooks)
            for number in numbers & hooks.keys():
                del hooks[number]


def _is_our_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "lightning_transfer"
