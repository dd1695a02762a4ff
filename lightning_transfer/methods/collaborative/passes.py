"""Record what enters networks side by side and what they give in one pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_transfer.compiling import is_run_again, outside_graphs


class _Entered(threading.local):
    """Holds what entered a backbone whose head has not run yet: of each thread its own."""

    def __init__(self) -> None:
        self.images: Any = None
        self.number = 0
        self.is_again = False  # whether a backward is recomputing the pass (activation checkpointing)


class Passes:
    """Holds the images that entered last, and each network's logits in the last recorded pass; a copy begins empty."""

    def __init__(self) -> None:
        self._entered = _Entered()
        self.end()

    @contextmanager
    def followed(self) -> Iterator["Passes"]:
        """Record passes inside the context."""
        try:
            self.begin()
            yield self
        finally:
            self.end()

    def begin(self, is_ours: Callable[[], bool] = lambda: True) -> None:
        """Record passes from here on: the logits of the last one, and how many there are.

        Args:
            is_ours: whether to record the present pass; all are by default.
        """
        self._is_ours = is_ours
        self.logits: Tensor | None = None
        self.number = 0
        self.is_followed = True
        self.leave()

    @outside_graphs
    def enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters a backbone for the networks beside its head: a forward pre-hook."""
        number = self._number() + 1
        self._entered.images = next(iter((*args, *kwargs.values())), None)
        self._entered.number, self._entered.is_again = number, is_run_again()

    @outside_graphs
    def start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forget earlier passes that did not reach the head: a forward pre-hook of the module that holds both."""
        self.leave()

    @outside_graphs
    def leave(self) -> tuple[Any, int]:
        """Forget what entered; return the last of it, and how often something entered."""
        number = self._number()
        left = (self._entered.images if number else None, number)
        self._entered.images, self._entered.number = None, 0
        return left

    def _number(self) -> int:
        """Return how often something entered, in the forward or in the recomputation that runs now."""
        return self._entered.number if self._entered.is_again == is_run_again() else 0

    def note(self, logits: Tensor) -> None:
        """Record a pass."""
        if self._is_ours():
            self.logits = logits
            self.number += 1

    def end(self) -> None:
        """Forget what was recorded, and stop."""
        self.begin()
        self.is_followed = False

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return (Passes, ())
