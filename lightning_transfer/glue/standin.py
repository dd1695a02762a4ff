"""Hooks of somebody's module, stood in for on the instance, and put back exactly as they were."""

from collections.abc import Callable
from typing import Any


class StandIn:
    """Stands on a module's instance in place of one of its hooks; abstract.

    A copy of the module, pickled or deep, gets the user's own hook back, bound to the copy.

    Args:
        module: the user's module.
        name: the hook's name.
    """

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.own = vars(module).get(name)  # a compiled module, say, already owns a step on the instance
        self.hook: Callable[..., Any] = getattr(module, name)
        setattr(module, name, self)

    def remove(self) -> None:
        """Put back what was found."""
        if vars(self.module).get(self.name) is self:
            delattr(self.module, self.name)
            if self.own is not None:
                setattr(self.module, self.name, self.own)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return (_itself, (self.hook,))


class Afterwards(StandIn):
    """Runs the user's hook, then something of ours with what it returned."""

    def __init__(self, module: Any, name: str, then: Callable[[Any], None]) -> None:
        super().__init__(module, name)
        self.then = then
        self.__code__ = type(self).__call__.__code__  # by it Lightning asks whether a hook is overridden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The user's result."""
        result = self.hook(*args, **kwargs)
        self.then(result)
        return result


def _itself(hook: Any) -> Any:
    return hook
