"""Define the options that the callback, the mixin, the function and a search share."""

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

import torch.nn.functional as F

from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError, check_number
from lightning_transfer.methods.collaborative.functional import Criterion
from lightning_transfer.methods.collaborative.members import Sources, by_name
from lightning_transfer.methods.collaborative.search.plan import LayerPlan

Frozen: TypeAlias = LayerPlan | Mapping[str, int] | str | os.PathLike[str] | None


@dataclass(frozen=True)
class Together:
    """Holds the options of networks that are tuned together.

    Args:
        sources: the other networks, or names of timm models; in a list, or by name.
        backbone: dotted name of the user's network, or of its backbone if the head is apart; or "auto".
        weight: of the disagreement.
        frozen_layers: how many convolutions are frozen, by network; or a LayerPlan, or the path of a saved one.
        loss: the criterion of the training step.
        labels: returns the labels of a batch.

    Attributes:
        plan: `frozen_layers` as a LayerPlan.

    Raises:
        TransferConfigError: an option does not fit.
    """

    sources: Sources
    _: KW_ONLY
    backbone: str = "auto"
    weight: float = 0.2
    frozen_layers: Frozen = None
    loss: Criterion = F.cross_entropy
    labels: Labels = find_labels
    plan: LayerPlan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name(self.sources)
        check_number("weight", self.weight)
        for name in ("loss", "labels"):
            if not callable(function := getattr(self, name)):
                raise TransferConfigError(f"{name}={function!r}; it takes a function.")
        object.__setattr__(self, "plan", _plan_of(self.frozen_layers))


def _plan_of(frozen_layers: Frozen) -> LayerPlan:
    if isinstance(frozen_layers, str | os.PathLike):
        return LayerPlan.load(frozen_layers)
    if isinstance(frozen_layers, LayerPlan):
        return frozen_layers
    if frozen_layers is None or isinstance(frozen_layers, Mapping):
        return LayerPlan(dict(frozen_layers or {}), {})
    raise TransferConfigError(
        f"frozen_layers={frozen_layers!r}; it takes counts by network, {{'own': 4}}, a LayerPlan, or its path."
    )
