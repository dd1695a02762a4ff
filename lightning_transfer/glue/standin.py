"""Replace hooks of the user's module on the instance, and put them back exactly as they were."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_transfer.glue.trainer import Weakly, is_run_by, named

HOOKS = (  # private: where torch keeps a layer's hooks and their options, by number
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class StandIn(ABC):
    """Replaces one of a module's hooks on the instance; abstract.

    Several may replace the same hook, ours and other packages', and be removed in any order: one that is removed while
    another is on top of it only calls the hook from then on. A copy of the module, pickled or deep, has the user's own
    hook, bound to the copy.

    It also only calls the hook while another Trainer runs the module, for example to validate it in the middle of a
    fit.

    Args:
        module: the user's module.
        name: the hook's name.
        trainer: the Trainer of the run.
    """

    def __init__(self, module: Any, name: str, trainer: Any) -> None:
        self.module = module
        self.name = name
        self.run = Weakly(trainer)
        self.own = vars(module).get(name)  # a compiled module, for example, already has a step on the instance
        self.hook: Callable[..., Any] = getattr(module, name)
        self.is_removed = False
        self.__code__ = type(self).__call__.__code__  # Lightning compares it to see whether a hook is overridden
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's hook and what this class adds to it."""
        trainer = self.run.get()
        if self.is_removed or trainer is None or not is_run_by(trainer, self.module):
            return self.hook(*args, **kwargs)
        return self.act(*args, **kwargs)

    @abstractmethod
    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Run `self.hook` and what this class adds to it."""

    def remove(self) -> None:
        """Put back what was found, unless something else has replaced the hook since."""
        self.is_removed = True
        top = vars(self.module).get(self.name)
        while isinstance(top, StandIn) and top.is_removed:
            delattr(self.module, self.name)
            if top.own is not None:
                setattr(self.module, self.name, top.own)
            top = top.own

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return (itemgetter(0), ((self.hook,),))  # the hook itself, so that it loads without this package


class Afterwards(StandIn):
    """Runs the user's hook, then a function with its result."""

    def __init__(self, module: Any, name: str, trainer: Any, then: Callable[[Any], None]) -> None:
        super().__init__(module, name, trainer)
        self.then = then

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Return the user's result."""
        result = self.hook(*args, **kwargs)
        self.then(result)
        return result


class Before(StandIn):
    """Runs a function with the arguments of the user's hook, then the hook."""

    def __init__(self, module: Any, name: str, trainer: Any, first: Callable[..., None]) -> None:
        super().__init__(module, name, trainer)
        self.first = first

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Return the user's result."""
        self.first(self.module, *args, **kwargs)
        return self.hook(*args, **kwargs)


class WithoutHooks(StandIn):
    """Removes this package's hooks from a module while a strategy writes a checkpoint, which may hold the network.

    Saved hyperparameters often hold it. A pickled hook would need this package to load the checkpoint, and would stay
    in the loaded network. Every checkpoint goes through the strategy, after the Trainer has collected it.

    Args:
        trainer: the Trainer of the strategy, whose module may hold the hooks.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.strategy, "save_checkpoint", trainer)

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Write without our hooks, and put them back in their places among the user's own."""
        taken = [pair for layer in self.run.get().lightning_module.modules() for pair in _take_hooks(layer)]
        try:
            result = self.hook(*args, **kwargs)
            plugin = self.module.checkpoint_io
            is_async = named([plugin], {"AsyncCheckpointIO"})
            if is_async and taken and any(isinstance(leaf, nn.Module) for leaf in tree_leaves((args, kwargs))):
                plugin.teardown()  # wait for its thread, which pickles the network; the next call starts a new one
            return result
        finally:
            for hooks, before in taken:
                hooks.clear()
                hooks.update(before)


def keep_hooks_out(trainer: Any) -> None:
    """Write checkpoints without hooks as long as the Trainer lives, for parts that stay in a module."""
    if not isinstance(vars(trainer.strategy).get("save_checkpoint"), WithoutHooks):
        WithoutHooks(trainer)


def _take_hooks(layer: nn.Module) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
    """Remove this package's hooks from a layer; yield each dictionary that held some, and its content before."""
    every: list[dict[int, Any]] = [getattr(layer, kind) for kind in HOOKS]
    numbers = {number for hooks in every for number, hook in hooks.items() if _is_our_hook(hook)}
    for hooks in every:
        if numbers & hooks.keys():
            yield hooks, dict(hooks)
            for number in numbers & hooks.keys():
                del hooks[number]


def _is_our_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "lightning_transfer"
