"""Read options as configuration tools pass them: as mappings of an object's arguments, and as sequences of any type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeGuard, TypeVar

from lightning_transfer.errors import TransferConfigError, check_name

Options = TypeVar("Options")


def made(
    cls: type[Options],
    given: Any,
    *,
    argument: str,
    others: Mapping[str, Callable[..., Options]] = MappingProxyType({}),
) -> Any:
    """Return an options object made from a mapping of its arguments; anything else as it is.

    A configuration tool's mapping, such as omegaconf's `DictConfig`, is not a `dict`.

    Args:
        cls: a dataclass of options.
        given: what the user passed.
        argument: what the user calls it.
        others: further keys that are allowed; each value makes the object from a mapping that has its key.

    Raises:
        TransferConfigError: a key is not known, or one that has no default is missing.

    Example:
        >>> from lightning_transfer.schedules import Schedule
        >>> made(Schedule, {"start": 0.5}, argument="weight").start
        0.5
    """
    if not isinstance(given, Mapping):
        return given
    known = [*others, *(field.name for field in fields(cls))]  # type: ignore[arg-type]
    for key in given:
        check_name(argument, "option", key, known)
    make = next((others[key] for key in others if key in given), cls)
    try:
        return make(**given)
    except TypeError as error:
        raise TransferConfigError(f"{argument}={dict(given)!r} is not a {cls.__name__}: {error}.") from error


def is_list(given: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a sequence of any type, and not a string.

    >>> is_list(("a", "b")), is_list("ab")
    (True, False)
    """
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)
