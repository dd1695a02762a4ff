"""Read files whose content is not known, and write files whole or not at all."""

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_transfer.errors import TransferConfigError

Place = str | os.PathLike[str]


def write_atomically(path: Place, write: Callable[[BinaryIO], object], *, what: str, fix: str) -> None:
    """Write a temporary file and rename it to `path`: a reader finds either the old file or the new one, whole.

    Folders are created. If the path is a symbolic link, its target is written and the link stays.

    Args:
        path: the file.
        write: called with the open file.
        what: name of the content, for messages.
        fix: the fix to show if the file cannot be written.

    Raises:
        TransferConfigError: the file cannot be written; no part of it is left.
    """
    try:
        place = Path(os.path.realpath(path))
        if place.exists() and not place.is_file():
            raise OSError(f"there is {_kind(place.stat().st_mode)}")
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name[:40]}.{uuid.uuid4().hex}.part")  # a name of 255 bytes has no room for more
    except (OSError, ValueError) as error:  # ValueError: NUL, or what the file system cannot encode
        raise TransferConfigError(f"Cannot write {what} to {_shown(path)}: {error}. {fix}") from error
    try:
        with part.open("xb") as file:
            write(file)
        part.replace(place)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise TransferConfigError(f"Cannot write {what} to {_shown(path)}: {error}. {fix}") from error
        raise


@contextmanager
def reading(path: Place, *, what: str, fix: str) -> Iterator[None]:
    """Refuse a path that is not a regular file, and turn a reader's errors on a damaged or foreign file into one error.

    Args:
        path: the file.
        what: name of the expected content, for messages.
        fix: the fix to show if the file holds something else.

    Raises:
        TransferConfigError: the file cannot be read; the message names the path.
    """
    try:
        mode = os.stat(path).st_mode  # before opening it: opening a pipe would wait for a writer
    except FileNotFoundError:
        raise TransferConfigError(f"There is no {what} at {_shown(path)}.") from None
    except (OSError, ValueError) as error:
        raise TransferConfigError(f"There is no {what} at {_shown(path)[:200]}: {error}.") from error
    if not stat.S_ISREG(mode):
        raise TransferConfigError(f"{_shown(path)} is {_kind(mode)}, not a {what}. Name a file.")
    try:
        yield
    except TransferConfigError:
        raise
    except PermissionError as error:
        raise TransferConfigError(f"{_shown(path)} cannot be read: {error}.") from error
    except Exception as error:
        raise TransferConfigError(
            f"{_shown(path)} is not a {what}, or it is damaged ({type(error).__name__}: {error}). {fix}"
        ) from error


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"


def _shown(path: Place) -> str:
    """Return a path that can be printed."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()
