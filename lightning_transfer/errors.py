"""Report configurations that cannot work or have no effect."""

import difflib
import math
from collections.abc import Iterable, Mapping


class TransferConfigError(ValueError):
    """Says that a setting, module or checkpoint does not fit, and how to fix it.

    Example:
        >>> try:
        ...     check_count("neighbors", 0, least=1)
        ... except TransferConfigError as error:
        ...     print(error)
        neighbors=0; it takes a whole number of at least 1.
    """


class NoEffectWarning(UserWarning):
    """Warns that an option or a callback has no effect.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", NoEffectWarning)  # stops a run in which an option has no effect
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known names and the most similar one.

    >>> nearest("linaer", ["cosine", "linear"])
    "Did you mean 'linear'? Known: 'cosine', 'linear'."
    """
    names = list(known)
    last = {known.rpartition(".")[2]: known for known in reversed(names)}  # often only a path's end is given
    close = difflib.get_close_matches(name, names, n=1)
    close = [last[name]] if name in last else close
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(map(repr, names)) or 'none'}."


def differences(
    theirs: Mapping[str, object], mine: Mapping[str, object], *, there: str = "in the checkpoint"
) -> list[str]:
    """Return the differences between saved and given options.

    >>> differences({"seed": 0, "k": 3}, {"seed": 1, "k": 3})
    ['seed: 0 in the checkpoint, 1 now']
    """
    return [
        f"{key}: {theirs.get(key)} {there}, {mine.get(key)} now"
        for key in sorted({*theirs, *mine})
        if theirs.get(key) != mine.get(key)
    ]


def check_name(owner: str, kind: str, name: object, known: Iterable[str]) -> None:
    """Raise if a key, an option or a class of `owner` is not one of the known ones."""
    names = list(known)
    if name not in names:
        raise TransferConfigError(f"{owner} has no {kind} {name!r}. {nearest(str(name), names)}")


def check_choice(argument: str, value: object, known: Iterable[str]) -> None:
    """Raise if `value` is not one of the known names."""
    names = list(known)
    if value not in names:
        raise TransferConfigError(f"{argument}={value!r} is not known. {nearest(str(value), names)}")


def check_count(argument: str, value: object, *, least: int, most: float = math.inf) -> None:
    """Raise if `value` is not a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        largest = "" if most == math.inf else f" and at most {most:g}"
        raise TransferConfigError(f"{argument}={value!r}; it takes a whole number of at least {least}{largest}.")


def check_number(argument: str, value: object, *, most: float = math.inf) -> None:
    """Raise if `value` is not a finite number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
        largest = " on" if most == math.inf else f" to {most:g}"
        raise TransferConfigError(f"{argument}={value!r}; it takes a finite number from 0{largest}.")


def check_positive(argument: str, value: object) -> None:
    """Raise if `value` is not a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TransferConfigError(f"{argument}={value!r}; it takes a positive number.")
