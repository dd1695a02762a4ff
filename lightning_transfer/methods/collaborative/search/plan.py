"""Hold what a search for layers has tried and found: to be saved, drawn, and used in training."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_transfer.errors import TransferConfigError, check_count, check_number
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.stamps import BEGIN_ANEW, stamped, unstamped


@dataclass(frozen=True)
class Evaluation:
    """Holds the score of one candidate.

    Attributes:
        layers: how many convolutions were frozen, in each network.
        accuracy: on the held-out images, the best of the proxy epochs; None if the candidate failed.
        failure: the reason of the failure.
    """

    layers: tuple[int, ...]
    accuracy: float | None
    failure: str = ""

    @property
    def fitness(self) -> float:
        """Return the accuracy, or minus infinity for a failure."""
        return -math.inf if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class LayerPlan:
    """Holds how much of each network is frozen, and how that was found.

    Attributes:
        frozen: how many convolutions, counted from the input, by network.
        num_layers: how many convolutions each network has.
        evaluations: all candidates in the order in which they were asked for; the same layers have the same score.
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
        """Return the best candidate so far, in a few words."""
        best = max((evaluation.fitness for evaluation in self.evaluations), default=-math.inf)
        frozen = ", ".join(f"{name} {number}" for name, number in self.frozen.items())
        if not math.isfinite(best):
            return "all have failed" if self.evaluations else "none was tried"
        return f"best {best:.1%}, frozen {frozen}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file with a checksum, completely or not at all.

        Raises:
            TransferConfigError: the disk is full or cannot be written.
        """
        text = json.dumps(self.as_data(), indent=1).encode()
        write_atomically(path, lambda file: file.write(text), what="the search", fix="Choose another place.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerPlan":
        """Read what `save` wrote.

        Raises:
            TransferConfigError: the file does not exist, is damaged, or is of another version of this package.
        """
        fix = "Search again, or name another file."
        with reading(path, what="LayerPlan", fix=fix):
            data = json.loads(Path(path).read_bytes())
            return cls.from_data(data, what=str(path), fix=fix)

    def as_data(self) -> dict[str, Any]:
        """Return plain data, with a checksum."""
        return stamped(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_data(cls, data: Any, what: str = "This LayerPlan", fix: str = BEGIN_ANEW) -> "LayerPlan":
        """Return the plan that `as_data` gave.

        Raises:
            TransferConfigError: the data was changed, is of another version, or cannot come from a search.
        """
        content = unstamped(data, what, fix)
        evaluations = tuple(
            Evaluation(tuple(entry["layers"]), entry["accuracy"], entry["failure"]) for entry in content["evaluations"]
        )
        plan = cls(content["frozen"], content["num_layers"], evaluations, content["settings"])
        plan._check()
        return plan

    def _check(self) -> None:
        """Raise unless a search can have found every value."""
        if not self.frozen.keys() <= self.num_layers.keys():
            raise TransferConfigError(
                f"A LayerPlan freezes layers of {list(self.frozen)}, and has depths only of {list(self.num_layers)}."
            )
        for name, number in self.num_layers.items():
            check_count(f"num_layers[{name!r}]", number, least=0)
            check_count(f"frozen[{name!r}]", self.frozen.get(name, 0), least=0, most=max(number - 1, 0))
        for evaluation in self.evaluations:
            for number, most in zip(evaluation.layers, self.num_layers.values(), strict=True):
                check_count("layers", number, least=0, most=max(most - 1, 0))
            if evaluation.accuracy is not None:
                check_number("accuracy", evaluation.accuracy, most=1)
            if not isinstance(evaluation.failure, str):
                raise TransferConfigError(f"failure={evaluation.failure!r}; it takes a text.")
        for name, setting in self.settings.items():
            if not isinstance(setting, str):
                raise TransferConfigError(f"settings[{name!r}]={setting!r}; it takes a text.")
