"""Exchange values between the processes of a run; an error in one is raised in all, so that none waits forever."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_transfer.errors import TransferConfigError

T = TypeVar("T")
PATIENCE = timedelta(days=365)
_last: list[Any] = []  # the group of the last exchange, see `from_first`


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if _are_many() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _are_many() else 1


def gather(value: T, group: Any = None) -> list[T]:
    """Return every process' value, in the order of ranks."""
    if not _are_many():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def together(act: Callable[[], T], group: Any = None) -> T:
    """Run a function in every process; if it fails in one, it fails in all.

    Args:
        act: the function.
        group: of processes; by default all.

    Raises:
        TransferConfigError: the function raised one in another process.
        RuntimeError: the function raised another error in another process.
    """
    value: T | None = None
    failure: BaseException | None = None
    try:
        value = act()
    except BaseException as error:  # also one that a signal raises, since the others must not wait
        failure = error
    kinds = gather(
        None if failure is None else (isinstance(failure, TransferConfigError), str(failure) or repr(failure)), group
    )
    if failure is not None:
        raise failure
    for number, kind in enumerate(kinds):
        if kind is not None:
            is_ours, message = kind
            raise (TransferConfigError if is_ours else RuntimeError)(f"In process {number}: {message}")
    return value  # type: ignore[return-value]


def from_first(act: Callable[[], T]) -> T:
    """Run a function in the first process, for which the others wait, and return its result in every process."""
    if not _are_many():
        return act()
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)  # the usual timeout is minutes
    try:
        values = [together(lambda: act() if rank() == 0 else None, group)]
        dist.broadcast_object_list(values, src=0, group=group)
    finally:
        dist.destroy_process_group(group)
        # torch before 2.8 frees a group without releasing the GIL, for which the group's threads may still wait, and
        # then hangs; at the next exchange they have long been idle
        _last[:] = [group]
    return values[0]  # type: ignore[return-value]


def _are_many() -> bool:
    return dist.is_available() and dist.is_initialized()
