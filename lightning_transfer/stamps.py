"""Stamp every state of this package with its format and a checksum, and refuse other formats and damaged states."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.version import __version__

FORMAT = 3  # raised when old code could not read a new state
KEYS = frozenset({"format", "version", "checksum"})
BEGIN_ANEW = (
    "To begin a new run from its weights, load them and fit without ckpt_path: "
    "trainer.fit(lightning_transfer.load_from_checkpoint(YourModule, path), ...)."
)


def stamp(content: Any) -> dict[str, Any]:
    """Return the format, this version, and a checksum of the content."""
    return {"format": FORMAT, "version": __version__, "checksum": checksum(content)}


def stamped(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content together with its stamp."""
    return {**stamp(content), **content}


def check_stamp(found: Any, content: Any, what: str = "This checkpoint", fix: str = BEGIN_ANEW) -> None:
    """Refuse content in a format that this version cannot read, and damaged content.

    Args:
        found: the stamp of the content.
        content: plain data and tensors.
        what: name of what holds the content, for messages.
        fix: what to do without the content.

    Raises:
        TransferConfigError: the message names both versions, or the damage.
    """
    if not is_stamped(found):
        raise TransferConfigError(f"{what} is damaged: the stamp of lightning_transfer is missing. {fix}")
    if str(found["format"]) != str(FORMAT):  # as text: in a damaged file they may be tensors
        raise TransferConfigError(
            f"{what} was written by lightning_transfer {found['version']} (format {found['format']}); this is "
            f"{__version__} (format {FORMAT}). Install that version. {fix}"
        )
    if str(found.get("checksum")) != checksum(content):
        raise TransferConfigError(f"{what} is damaged: its checksum is wrong. Use another copy of it. {fix}")


def unstamped(state: Any, what: str = "This checkpoint", fix: str = BEGIN_ANEW) -> dict[str, Any]:
    """Return the content of a result of `stamped`.

    Raises:
        TransferConfigError: it has another format, or is damaged.
    """
    content = {key: value for key, value in state.items() if key not in KEYS} if isinstance(state, Mapping) else {}
    check_stamp(state, content, what, fix)
    return content


def is_stamped(state: Any) -> bool:
    """Return whether a state has a stamp of any version; those of the first format had no checksum."""
    return isinstance(state, Mapping) and {"format", "version"} <= state.keys()


def checksum(content: Any) -> str:
    """Return a digest of plain data and tensors: equal for equal values, in any order of a dictionary.

    >>> checksum({"a": (1, 0.5), "b": None}) == checksum({"b": None, "a": [1, 0.5]})
    True
    """
    found = hashlib.sha256()
    _add(found, content)
    return found.hexdigest()


def digest(content: Any) -> str:
    """Return a checksum that is short enough for a name or a message."""
    return checksum(content)[:16]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():  # a view of no numbers may have strides that cannot be seen as bytes
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for key, item in sorted(value.items(), key=lambda pair: repr(pair[0])):
            found.update(f"{key!r}:".encode())
            _add(found, item)
    elif isinstance(value, list | tuple):
        found.update(f"sequence {len(value)}".encode())
        for item in value:
            _add(found, item)
    else:
        found.update(f"{value!r},".encode())
