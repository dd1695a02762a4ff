"""Follow the weight of a second loss through a run."""

import math
from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.trainer import schedule_length
from lightning_transfer.schedules import Schedule
from lightning_transfer.values import value_of


class Annealing:
    """Holds one run's weight: its schedule, and the length of training that the schedule uses.

    Args:
        schedule: of the weight.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._given = schedule
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self.schedule = self._given
        self.is_over = False  # whether the weight is 0 for good
        self._num_steps: float | None = None

    def turn(self, *, on: bool) -> None:
        """Use the schedule, or a weight of 0 in its place."""
        self.schedule = self._given if on else Schedule(0.0, 0.0)

    @property
    def most(self) -> float:
        """Return the largest weight."""
        return max(self.schedule.start, self.schedule.end)

    def check(self, trainer: Any) -> None:
        """Take the length of training, and refuse another than that with which the run began.

        Raises:
            TransferConfigError: it differs, or it is needed and not known.
        """
        if trainer.global_step == 0:
            self.reset()
        num_steps = schedule_length(self.schedule, trainer)
        if self._num_steps not in (None, num_steps) and not self.is_over:
            raise TransferConfigError(
                f"Training now has {num_steps:.0f} steps; it had {self._num_steps:.0f} when this run began, so the "
                "weight of the second loss would jump. Keep the length, or begin with Schedule(until_steps=...)."
            )
        self._num_steps = num_steps

    def now(self, trainer: Any) -> float:
        """Return the step's weight.

        After the end of the schedule a weight of 0 stays 0, even if training is made longer later.
        """
        if self.is_over:
            return 0.0
        weight = self.schedule.at(trainer.global_step, self._num_steps or math.inf)
        self.is_over = weight == self.schedule.end == 0
        return weight

    def describe(self) -> dict[str, str]:
        """Return what decides the weight, as strings that a checkpoint can hold and compare."""
        given = self._given
        return {
            "weight": f"{given.start:g} to {given.end:g}",
            "weight shape": given.shape if isinstance(given.shape, str) else value_of(given.shape),
            "weight until": f"step {given.until_steps}" if given.until_steps else f"{given.until:g}",
        }

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"is_over": self.is_over, "num_steps": self._num_steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume a run's state."""
        self.is_over, self._num_steps = state["is_over"], state["num_steps"]
