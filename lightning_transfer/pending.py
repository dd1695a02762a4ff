"""Check values on the device, and read the answers when the program waits for the device anyway."""

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_transfer.compiling import outside_graphs

T = TypeVar("T")
MOST = 100  # checks that wait, so that a run that rarely logs keeps little and stops


def when(step: int, now: int) -> str:
    """Return the text that says, in the step `now`, whether a wrong step has changed the weights yet."""
    if now == step:
        return "Stopped before the optimizer's step."
    return f"Found {now - step} optimizer steps later; these have spoilt the weights: resume from the last checkpoint."


class PendingChecks:
    """Holds the checks of one run, which its parts share; they are raised in the order in which they were made.

    To read a value, the program waits until the device has computed all that it was given. So an answer stays on the
    device until `read` is called: in a step that logs, before a checkpoint is written, and when training ends.

    Args:
        free: types of devices on which reading costs nothing; there a check is made at once.

    Example:
        >>> checks = PendingChecks(free=())
        >>> checks.refuse(torch.tensor(1.0).isnan(), ValueError, lambda: "not a number in step 1")
        >>> checks.refuse(torch.tensor(torch.nan).isnan(), ValueError, lambda: "not a number in step 2")
        >>> checks.read()
        Traceback (most recent call last):
        ValueError: not a number in step 2
    """

    def __init__(self, free: Collection[str] = ("cpu",)) -> None:
        self.free = free
        self._waiting: list[tuple[Tensor, Callable[[], Exception]]] = []

    def __reduce__(self) -> tuple[type["PendingChecks"], tuple[Collection[str]]]:
        return (PendingChecks, (self.free,))  # a copy has made no step

    @outside_graphs
    def refuse(self, is_wrong: Tensor, error: Callable[[T], Exception], evidence: Callable[[], T]) -> None:
        """Raise if something is wrong: now, or when the answer is read.

        Args:
            is_wrong: boolean scalar.
            error: makes the error of the evidence.
            evidence: returns what the error needs to know of this step. What waits keeps it, so it should be small.
        """
        if is_wrong.device.type in self.free:
            if is_wrong:
                raise error(evidence())
            return
        self._waiting.append((is_wrong, partial(error, evidence())))
        if len(self._waiting) >= MOST:
            self.read()

    def find(self) -> Exception | None:
        """Read all answers; return the error of the first check that failed."""
        waiting, self._waiting = self._waiting, []
        answers: list[Any] = torch.stack([is_wrong for is_wrong, _ in waiting]).tolist() if waiting else []
        return waiting[answers.index(True)][1]() if True in answers else None

    def read(self) -> None:
        """Read all answers, and raise the error of the first check that failed."""
        if (error := self.find()) is not None:
            raise error

    def note(self, exception: BaseException | None) -> None:
        """Read all answers, and note the error of the first check that failed, the likely cause of an exception."""
        with suppress(RuntimeError):  # after an error of the device it gives no answers
            if exception is not None and (error := self.find()) is not None:
                exception.add_note(
                    f"Before it, a check had failed: {error} Checkpoints written since may hold spoilt weights."
                )
