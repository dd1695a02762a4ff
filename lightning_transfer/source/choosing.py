"""Define the objects that decide which source images a run draws, if it does not draw all in turn."""

from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.source.stream import Order
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView


class Chooser(Protocol):
    """Decides which source images one run draws."""

    @property
    def target(self) -> Dataset[Any] | None:
        """Return the target's training images without augmentation; None if they are the train loader's."""

    def reset(self) -> None:
        """Begin a new run."""

    def check(self, trainer: Any) -> None:
        """Raise, at the start of training, if something cannot be right."""

    def order(self, view: NetworkView, source: Extent | None) -> Order:
        """Return the order to draw in at this step; another object if it has changed.

        Args:
            view: of the network as it is now.
            source: the range of pixels in the first source batch; None before it is drawn.
        """

    def values(self) -> dict[str, Tensor]:
        """Return the values to log."""

    def describe(self) -> dict[str, str]:
        """Return every option that changes what a run computes."""

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where a run stopped."""


class Borrows(Protocol):
    """Holds the options of a chooser."""

    def open(self, source: SourceTask) -> Chooser:
        """Return the chooser of one run."""
