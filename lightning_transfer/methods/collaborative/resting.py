"""Layers below a cut: norms that keep their statistics, and all of them awake again."""

from typing import Any

from torch import Tensor, nn

from lightning_transfer.surgery import replace_modules


class RestingNorm(nn.Module):
    """Somebody's norm that neither training nor `train()` moves: it normalises by its running statistics.

    Its weights, statistics and modules are the norm's own, under the same names. It is no `_BatchNorm` and the norm is
    none of its modules, so whatever looks for those, to synchronize or to thaw them, finds nothing.

    Args:
        norm: what is to rest.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self.training = norm.training
        norm.training = False
        object.__setattr__(self, "norm", norm)

    def woken(self) -> nn.Module:
        """The norm, in the mode that it would be in."""
        norm: Any = self.norm
        norm.training = self.training
        return norm  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Normalised, as outside of training."""
        normalised: Tensor = self.norm(features)  # type: ignore[operator]
        return normalised


def weights(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a layer, not of those inside of it."""
    return list(layer.parameters(recurse=False))


def wake(root: nn.Module, stopped: list[nn.Parameter]) -> None:
    """Norms in the place of those that rest, and gradients for the parameters that were stopped."""
    for param in stopped:
        param.requires_grad = True
    resting = {path: layer for path, layer in root.named_modules() if isinstance(layer, RestingNorm)}
    replace_modules(root, {path: layer.woken() for path, layer in resting.items()})
