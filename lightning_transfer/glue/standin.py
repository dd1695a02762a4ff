"""Hooks of somebody's module, stood in for on the instance, and put back exactly as they were."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class StandIn(ABC):
    """Stands on a module's instance in place of one of its hooks; abstract.

    Several may stand on one another, ours and other people's, and be taken away in any order: one that is removed from
    under another lets everything pass from then on. A copy of the module, pickled or deep, gets the user's own hook
    back, bound to the copy.

    Args:
        module: the user's module.
        name: the hook's name.
    """

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.own = vars(module).get(name)  # a compiled module, say, already owns a step on the instance
        self.hook: Callable[..., Any] = getattr(module, name)
        self.is_removed = False
        self.__code__ = type(self).__call__.__code__  # by it Lightning asks whether a hook is overridden
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's hook does, and more of ours."""
        return self.hook(*args, **kwargs) if self.is_removed else self.act(*args, **kwargs)

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
        return (_itself, (self.hook,))


class Afterwards(StandIn):
    """Runs the user's hook, then something of ours with what it returned."""

    def __init__(self, module: Any, name: str, then: Callable[[Any], None]) -> None:
        super().__init__(module, name)
        self.then = then

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """The user's result."""
        result = self.hook(*args, **kwargs)
        self.then(result)
        return result


class Before(StandIn):
    """Looks at what the user's hook is given, then runs it."""

    def __init__(self, module: Any, name: str, first: Callable[..., None]) -> None:
        super().__init__(module, name)
        self.first = first

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """The user's result."""
        self.first(self.module, *args, **kwargs)
        return self.hook(*args, **kwargs)


def _itself(hook: Any) -> Any:
    return hook
