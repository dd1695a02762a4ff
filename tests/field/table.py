"""What becomes of each method on each module: the one table that the tests and the README are made of."""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import nn

from tests.field import shapes
from tests.field.runs import METHODS
from tests.field.shapes import SHAPES


@dataclass(frozen=True)
class Cell:
    """What is expected of a method on a module as it is.

    Attributes:
        kind: "works", "refused" (before the first optimizer step), "warned", or "senseless" (refused too).
        words: of the refusal or the warning; what cures it is among them.
        cure: options with which it works.
    """

    kind: str = "works"
    words: tuple[str, ...] = ()
    cure: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """In the README's table."""
        if self.cure:
            return "with " + ", ".join(f"`{name}=`" for name in self.cure)
        return {"works": "yes", "senseless": "–"}.get(self.kind, self.kind)


WORKS = Cell()


def refused(*words, **cure):
    return Cell("refused", words, cure)


def warned(*words, **cure):
    return Cell("warned", words, cure)


def senseless(*words):
    return Cell("senseless", words)


def row(*, sourced=WORKS, **cells):
    """A row; the four methods with a source task share what is not said of each."""
    shared = dict.fromkeys(("soft", "auto", "selective", "joint"), sourced)
    return {**dict.fromkeys(METHODS, WORKS), **shared, **cells}


BCE = F.binary_cross_entropy_with_logits
ALONE = refused("self.model = network")  # no other network can stand beside a backbone without its head
NO_TAP = "Name the last stage but one: tap='...'"
DICTS = refused("adapt=", adapt=lambda batch: (batch["image"], batch["label"]))
TRIPLES = refused("adapt=", adapt=lambda batch: (batch[0], batch[1]))
PATHS = refused("adapt=", adapt=lambda batch: (batch[0][1], batch[1]))
ONE_HOT = {"adapt": lambda batch: (batch[0], batch[1].argmax(1))}
SEVERAL_LABELS = {"loss": BCE}
NOT_SEEN = refused("forward='separate'")
FROZEN = warned("requires_grad")
NO_LAYERS = senseless("has no convolutions")
