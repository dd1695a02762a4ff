"""Freeze the layers below a cut, and unfreeze them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_transfer.surgery import find_all, replace_modules


class FrozenNorm(nn.Module):
    """Normalise by the running statistics of a norm, which training and `train()` do not change.

    Its weights, statistics and modules are the norm's own, under the same names. It is not a `_BatchNorm`, and the norm
    is not one of its modules, so code that synchronizes or unfreezes BatchNorms does not find it.

    Args:
        norm: the norm to freeze.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self.training = norm.training
        norm.training = False
        object.__setattr__(self, "norm", norm)

    def unfrozen(self) -> nn.Module:
        """Return the norm, in the mode that this layer is in."""
        norm: Any = self.norm
        norm.training = self.training
        return norm  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features as the norm does in eval mode."""
        normalised: Tensor = self.norm(features)  # type: ignore[operator]
        return normalised


def freeze_below(network: nn.Module, below: Sequence[str]) -> list[nn.Parameter]:
    """Replace the norms of these layers by frozen ones, and return the parameters to stop.

    Args:
        network: the network to change, in place.
        below: dotted names of the layers to freeze. A parameter that another layer shares is left out.
    """
    layers = {path: network.get_submodule(path) for path in below}
    above = {
        id(param)
        for path, layer in network.named_modules()
        if path not in layers
        for param in layer.parameters(recurse=False)
    }
    params = [param for layer in layers.values() for param in layer.parameters(recurse=False)]
    norms = {path: FrozenNorm(layer) for path, layer in layers.items() if isinstance(layer, _NormBase)}
    replace_modules(network, norms)
    return [param for param in params if param.requires_grad and id(param) not in above]


def unfreeze(root: nn.Module, stopped: Sequence[nn.Parameter]) -> None:
    """Put norms back in the place of frozen ones, and let the stopped parameters have gradients."""
    for param in stopped:
        param.requires_grad = True
    replace_modules(root, {path: layer.unfrozen() for path, layer in find_all(root, FrozenNorm).items()})
