"""Make the base of all callbacks of this package: a Callback of `lightning` and of `pytorch_lightning`."""

import importlib
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero

from lightning_transfer.errors import check_name

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type, ...]:
    """Return the Callback class of every installed namespace."""
    found: list[type] = []
    for name in sorted(NAMESPACES, key=lambda name: name not in sys.modules):
        package = name.partition(".")[0]
        log, level = rank_zero.log, logging.getLogger(package).level
        try:
            found.append(importlib.import_module(name).Callback)
        except ImportError as error:
            if error.name != package and not found:
                raise  # if a first namespace has loaded, the second one may be broken
        if len(found) > 1:  # importing the second namespace has replaced the first one's logger and its level
            rank_zero.log = log
            logging.getLogger(package).setLevel(level or logging.INFO)
    return tuple(found)


def namespaces_of(thing: Any) -> list[str]:
    """Return Lightning's namespaces that an object or a class comes from; a callback of this package is of both."""
    homes = [cls.__module__ for cls in (thing if isinstance(thing, type) else type(thing)).__mro__]
    return [name for name in NAMESPACES if any(home.startswith(f"{name}.") for home in homes)]


def namespace_of(thing: Any) -> str | None:
    """Return the first of Lightning's namespaces that an object comes from, such as a Trainer; None without one."""
    return next(iter(namespaces_of(thing)), None)


def is_lightnings(thing: Any) -> bool:
    """Return whether a class or a function is defined in Lightning, so the user has not written it."""
    return thing.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")


if TYPE_CHECKING:
    from lightning.pytorch import Callback

    AnyCallback = Callback
else:

    class AnyCallback(*_callback_classes()):
        """A Callback of every namespace: each Trainer, and each command line, takes only its own."""

        def __new__(cls, *args: Any, **options: Any) -> "AnyCallback":
            """Refuse a misspelt option by name. In a metaclass, this would hide the signature of `__init__`."""
            if cls.__init__ is object.__init__:
                return super().__new__(cls, *args, **options)  # which refuses any
            parameters = inspect.signature(cls.__init__, follow_wrapped=False).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                for name in options:
                    check_name(cls.__name__, "option", name, [*parameters][1:])
            return super().__new__(cls)
