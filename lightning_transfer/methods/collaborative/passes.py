"""Record what enters networks side by side and what they give in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Passes:
    """Hold the images that entered last, and each network's logits in the last recorded pass; a copy begins empty."""

    images: Any = None  # that entered a backbone whose head has not run yet
    num_entered = 0

    def __init__(self) -> None:
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

    def enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters a backbone for the networks beside its head: a forward pre-hook."""
        self.images, self.num_entered = next(iter((*args, *kwargs.values())), None), self.num_entered + 1

    def start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forget earlier passes that did not reach the head: a forward pre-hook of the module that holds both."""
        self.leave()

    def leave(self) -> tuple[Any, int]:
        """Forget what entered; return the last of it, and how often something entered."""
        left = (self.images, self.num_entered)
        self.images, self.num_entered = None, 0
        return left

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
