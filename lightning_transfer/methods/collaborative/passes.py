"""What networks side by side take and give in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Passes:
    """Which images entered, and what each network said in the last pass that is followed; a copy begins empty."""

    images: Any = None  # that entered a backbone whose head has not run yet
    num_entered = 0

    def __init__(self) -> None:
        self.end()

    @contextmanager
    def followed(self) -> Iterator["Passes"]:
        """While it lasts, passes are written down."""
        try:
            self.begin()
            yield self
        finally:
            self.end()

    def begin(self, is_ours: Callable[[], bool] = lambda: True) -> None:
        """Write passes down from here on: the last one, and how many there are.

        Args:
            is_ours: whether a pass is one of those to follow; all by default.
        """
        self._is_ours = is_ours
        self.logits: Tensor | None = None
        self.number = 0
        self.is_followed = True
        self.leave()

    def enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters a backbone for the networks beside its head: a forward pre-hook."""
        self.images, self.num_entered = next(iter((*args, *kwargs.values())), None), self.num_entered + 1

    def start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forget passes without a head when the module that holds both is called: a forward pre-hook."""
        self.leave()

    def leave(self) -> tuple[Any, int]:
        """Let go of what entered last, and return it and how often something has entered."""
        left = (self.images, self.num_entered)
        self.images, self.num_entered = None, 0
        return left

    def note(self, logits: Tensor) -> None:
        """One more pass."""
        if self._is_ours():
            self.logits = logits
            self.number += 1

    def end(self) -> None:
        """Let go of what was written down."""
        self.begin()
        self.is_followed = False

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return (Passes, ())
