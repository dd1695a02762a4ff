"""L2-SP (arXiv 1802.01483): fine-tuning that holds the weights near those of the pretrained network.

loss = the user's + alpha / 2 * |w - w0|^2 + beta / 2 * |h|^2

w are the weights before the head, w0 what they were when training began, and h are the weights of the head, which is
new. The formula is the paper's; the default numbers are ours: choose alpha on validation images.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_transfer import NoEffectWarning, TransferConfigError
from lightning_transfer.errors import check_number
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.optimizers import why_untrained
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.roles import find_head, parameters_before


def half_square(weights: Iterable[Tensor], starts: Iterable[Tensor] | None = None) -> Tensor:
    """Return half the sum of all squared weights, or of their squared differences from where they started.

    Example:
        >>> half_square([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 1.0])])
        tensor(2.)
    """
    pairs = ((weight, 0.0) for weight in weights) if starts is None else zip(weights, starts, strict=True)
    return torch.stack([((weight - start) ** 2).sum() for weight, start in pairs]).sum() / 2


class StartingPoint(TransferPart):
    """One run's starting point. It is kept in checkpoints, because a resumed run begins with other weights."""

    title = "L2SP"

    def __init__(self, module: Any, *, weight: float, head_weight: float, head: str) -> None:
        super().__init__()
        self.weight, self.head_weight = weight, head_weight
        found = find_head(module, head)
        # in tuples, so that they do not become this part's own; a parameter that two layers share counts once
        self._held = tuple(dict.fromkeys(parameters_before(module, found.path)))
        self._head = tuple(param for param in found.module.parameters() if param not in {*self._held})
        for number, param in enumerate(self._held):
            self.register_buffer(f"start_{number}", param.detach().clone())
        self.options = {"weight": str(weight), "head_weight": str(head_weight), "head": found.path}

    @property
    def introduction(self) -> str:
        """Return what is held."""
        return f"holds {len(self._held)} weights and biases before the head {self.options['head']!r} at their start."

    def attach(self, module: Any) -> None:
        """Refuse a module whose network was replaced after its weights were noted."""
        if {id(param) for param in self._held} - {id(param) for param in module.parameters()}:
            raise TransferConfigError(
                "The network was replaced after L2SP had noted its weights. Build it in __init__ or configure_model."
            )

    def check(self, trainer: Any) -> None:
        """Warn if there is nothing to hold."""
        if self.weight and (reason := why_untrained(trainer, self._held)):
            warnings.warn(f"No weight that L2SP holds is trained. {reason}", NoEffectWarning, stacklevel=2)

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss with both terms added; at weight 0 exactly the user's."""
        values = {}
        if self.weight and self._held:
            values["transfer/l2_sp_distance"] = distance = half_square(self._held, self.buffers())
            loss = loss + self.weight * distance
        if self.head_weight:
            values["transfer/l2_sp_head"] = size = half_square(self._head)
            loss = loss + self.head_weight * size
        for name, value in values.items():
            self.refuse_not_finite(name, value)
        self.log({name: value.detach() for name, value in values.items()})
        return loss


class L2SP(TransferCallback):
    """Hold the weights near those of the pretrained network while it is tuned (L2-SP, arXiv 1802.01483).

    It takes the place of the optimizer's weight decay, which pulls the same weights towards 0: set that to 0. Logs
    `transfer/l2_sp_distance` and `transfer/l2_sp_head`.

    Args:
        weight: of half the squared distance to the starting point, the paper's alpha; 0 for none.
        head_weight: of half the squared weights of the head, the paper's beta; 0 for none.
        head: dotted path of the head, or "auto".

    Raises:
        TransferConfigError: an option does not fit.

    Example:
        >>> L2SP(weight=0.05)
        L2SP(weight=0.05, head_weight=0.01, head='auto')
    """

    def __init__(self, *, weight: float = 0.1, head_weight: float = 0.01, head: str = "auto") -> None:
        check_number("weight", weight)
        check_number("head_weight", head_weight)
        self.weight, self.head_weight, self.head = weight, head_weight, head

    def make_part(self, module: Any) -> StartingPoint:
        """Return the part that notes the weights as they are now."""
        return StartingPoint(module, weight=self.weight, head_weight=self.head_weight, head=self.head)

    def __repr__(self) -> str:
        return f"L2SP(weight={self.weight}, head_weight={self.head_weight}, head={self.head!r})"
