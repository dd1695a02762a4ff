"""Change a number over training: constant, annealed away, or the user's own curve."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from lightning_transfer.errors import TransferConfigError, check_choice, check_count, check_number

ShapeName: TypeAlias = Literal["linear", "cosine", "exponential", "step"]
Shape: TypeAlias = ShapeName | Callable[[float], float]  # jsonargparse needs this order to write a name

DECAY = 5.0  # ours: the exponential shape falls by e^-5 before it is shifted to end at exactly 0

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "exponential": lambda u: (math.exp(-DECAY * u) - math.exp(-DECAY)) / (1.0 - math.exp(-DECAY)),
    "step": lambda u: 1.0,
}


def anneal(
    progress: float, *, start: float = 1.0, end: float = 0.0, shape: Shape = "linear", until: float = 0.5
) -> float:
    """Return the value of an annealed number when a share of training is done.

    Exactly `start` at progress 0 and exactly `end` from `until` on; in between `end + (start - end) * shape(u)`,
    where `u = progress / until`. The falling weight is the paper's; the shapes are ours.

    Args:
        progress: the share of training that is done, 0 to 1.
        start: value at the beginning.
        end: value from `until` on.
        shape: "linear", "cosine", "exponential", "step", or a function of `u` in [0, 1] that falls from 1 to 0.
        until: the share of training at which `end` is reached.

    Raises:
        TransferConfigError: the shape is not known, or `until` is not a share of training.

    Example:
        >>> [anneal(p) for p in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.5, 0.0, 0.0]
    """
    if not 0 < until <= 1:
        raise TransferConfigError(
            f"until={until} is not a share of training in (0, 1]. For steps pass Schedule(until_steps=...)."
        )
    if progress >= until or start == end:
        return end
    if progress <= 0:
        return start
    if not callable(shape):
        check_choice("shape", shape, SHAPES)
        shape = SHAPES[shape]
    value = end + (start - end) * shape(progress / until)
    return min(max(value, min(start, end)), max(start, end))  # rounding may take it past either end


@dataclass(frozen=True)
class Schedule:
    """Changes a number with training progress: `anneal` with fixed settings.

    Args:
        start: value at the first step.
        end: value from `until` on, exactly.
        shape: "linear", "cosine", "exponential", "step", or a function of [0, 1] that falls from 1 to 0.
        until: the share of training at which `end` is reached.
        until_steps: the optimizer step at which `end` is reached, in place of the share `until`; for training whose
            length is not known or may be extended.

    Raises:
        TransferConfigError: a value is out of range, or the shape is not known or leaves [0, 1].

    Example:
        >>> weight = Schedule(start=1.0, shape="cosine")
        >>> weight(0.0), round(weight(0.25), 3), weight(0.5)
        (1.0, 0.5, 0.0)
    """

    start: float = 1.0
    end: float = 0.0
    shape: Shape = "linear"
    until: float = 0.5
    until_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        self(0.0)  # checks that `until` is a share
        if self.until_steps is not None:
            check_count("until_steps", self.until_steps, least=1)
            if self.until != Schedule.until:
                raise TransferConfigError("Pass until= or until_steps=, not both.")
        if callable(self.shape):
            _check_falls(self.shape)
        else:
            check_choice("shape", self.shape, SHAPES)

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"Schedule({', '.join(f'{name}={value!r}' for name, value, usual in given if value != usual)})"

    def __call__(self, progress: float) -> float:
        """Return the value when `progress` (0 to 1) of training is done."""
        return anneal(progress, start=self.start, end=self.end, shape=self.shape, until=self.until)

    @property
    def is_constant(self) -> bool:
        """Return whether the value never changes, so that the length of training is not needed."""
        return self.start == self.end

    def at(self, step: float, num_steps: float) -> float:
        """Return the value at an optimizer step of training that has `num_steps` steps."""
        if self.until_steps is None:
            return self(step / num_steps)
        return self.end if step >= self.until_steps else self(self.until * step / self.until_steps)


def _check_falls(shape: Callable[[float], float]) -> None:
    """Raise if a function does not start at 1, rises, or leaves [0, 1], at 101 points."""
    values = [shape(u / 100) for u in range(101)]
    for u, value in enumerate(values):
        check_number(f"shape({u / 100})", value, most=1)
    rising = next((u for u in range(100) if values[u + 1] > values[u]), None)
    if values[0] != 1 or rising is not None:
        where = (
            f"shape(0) is {values[0]:g}" if rising is None else f"shape({rising / 100}) < shape({(rising + 1) / 100})"
        )
        raise TransferConfigError(f"{where}; a shape starts at 1 and falls. Pass one like lambda u: (1 - u) ** 2.")
