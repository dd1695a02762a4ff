"""What a search for layers has tried and found, to be saved, drawn, and trained by."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.stamps import check_stamp, stamp


@dataclass(frozen=True)
class Evaluation:
    """One candidate.

    Attributes:
        layers: how many convolutions were frozen, in each network.
        accuracy: on the images that were held out, the best of the proxy epochs; None where it failed.
        failure: why it did.
    """

    layers: tuple[int, ...]
    accuracy: float | None
    failure: str = ""

    @property
    def fitness(self) -> float:
        """The accuracy, and minus infinity for a failure."""
        return -math.inf if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class LayerPlan:
    """How much of each network is frozen, and how that was found.

    Attributes:
        frozen: convolutions, counted from the input, by network.
        num_layers: how many there are.
        evaluations: all candidates in the order in which they were asked for; one that came again has the same score.
        settings: of the search.

    Example:
        >>> import tempfile
        >>> plan = LayerPlan({"own": 3}, {"own": 9}, (Evaluation((3,), 0.8),))
        >>> path = tempfile.mkdtemp() + "/plan.json"
        >>> plan.save(path)
        >>> LayerPlan.load(path) == plan
        True
    """

    frozen: Mapping[str, int]
    num_layers: Mapping[str, int]
    evaluations: tuple[Evaluation, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The best so far, in a few words."""
        best = max((evaluation.fitness for evaluation in self.evaluations), default=-math.inf)
        frozen = ", ".join(f"{name} {number}" for name, number in self.frozen.items())
        return f"best {best:.1%}, frozen {frozen}" if math.isfinite(best) else "all have failed"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it down, in one move.

        Raises:
            TransferConfigError: the disk is full or cannot be written.
        """
        part = Path(path).with_name(Path(path).name + f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps({**stamp(), **self.as_data()}, indent=1))
            part.replace(path)
        except OSError as error:
            raise TransferConfigError(f"Cannot write the search to {path}: {error}. Choose another place.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerPlan":
        """Read it again.

        Raises:
            TransferConfigError: the file is missing, is no plan, or is one of another version.
        """
        try:
            found = json.loads(Path(path).read_text())
            check_stamp(found)
            return cls.from_data(found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, TransferConfigError):
                raise
            raise TransferConfigError(
                f"{path} is no LayerPlan: {error!r}. Search again, or name another file."
            ) from error

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "LayerPlan":
        """From plain data."""
        evaluations = tuple(
            Evaluation(tuple(int(number) for number in entry["layers"]), entry["accuracy"], entry["failure"])
            for entry in data["evaluations"]
        )
        return cls(data["frozen"], data["num_layers"], evaluations, data["settings"])
