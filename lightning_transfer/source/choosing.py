"""What decides which source images a run draws, where it is not all of them in turn."""

from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.source.gap import Extent
from lightning_transfer.source.stream import Order
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView


class Chooser(Protocol):
    """Decides, in the course of one run, which source images are drawn."""

    @property
    def target(self) -> Dataset[Any] | None:
        """The target's training images without augmentation; None where the train loader has to tell."""

    def reset(self) -> None:
        """Begin a new run."""

    def check(self, trainer: Any) -> None:
        """Raise on what cannot be right, at the start of training."""

    def order(self, view: NetworkView, source: Extent | None) -> Order:
        """Return the order to draw in at this step; another object if it has changed.

        Args:
            view: of the network as it is now.
            source: how far the pixels of the first source batch run, after that was drawn.
        """

    def values(self) -> dict[str, Tensor]:
        """What is logged."""

    def describe(self) -> dict[str, str]:
        """Every option that decides what a run computes."""

    def get_state(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where a run was left."""


class Borrows(Protocol):
    """Options of a chooser."""

    def open(self, source: SourceTask) -> Chooser:
        """The chooser of one run."""
