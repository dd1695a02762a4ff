"""Decide whether a layer is a plain Linear: it gives weight x features + bias, with weights that are its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_transfer.surgery import own_randomness
from lightning_transfer.tracing import ALIKE, evaluating


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a layer is an `nn.Linear`, or a subclass that computes the same, as timm's own Linear does.

    It is False for a subclass with other parameters or layers (LoRA), with weights of another class (quantised) or
    computed from others (parametrized), or with another forward (ArcFace).

    Example:
        >>> from timm.layers import Linear
        >>> is_plain_linear(Linear(4, 2)), is_plain_linear(nn.Conv2d(4, 2, 1))
        (True, False)
    """
    if type(layer) is nn.Linear:
        return True
    own = layer._parameters
    if not isinstance(layer, nn.Linear) or layer._modules or own.keys() != {"weight", "bias"}:
        return False
    if type(own["weight"]) is not nn.Parameter:
        return False
    with own_randomness():
        taken = torch.randn(2, layer.in_features).to(layer.weight)
    try:
        with evaluating(layer):
            return multiplies(layer, taken, layer.forward(taken))  # not a call, which would run the user's hooks
    except Exception:  # it may take labels too, or not run on this device
        return False


def multiplies(layer: nn.Linear, taken: Tensor, given: Tensor) -> bool:
    """Return whether what a layer gave is its weight x the features that it took + its bias."""
    scores = F.linear(taken.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
    return not bool((scores - given.float()).abs().max() > ALIKE * scores.abs().max())
