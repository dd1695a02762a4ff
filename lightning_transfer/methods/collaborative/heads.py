"""Find the classifier that a network ends in, and replace it by a new one."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class
from lightning_transfer.roles import Head, find_head, linear_layers
from lightning_transfer.surgery import replace_modules
from lightning_transfer.tracing import evaluating, run_on_a_picture


def classifier(network: nn.Module, name: str) -> Head:
    """Return the Linear that a network ends in, or its last convolutions and their global pool.

    Raises:
        TransferConfigError: there is none, or there are several.
    """
    inner = uncompiled(network)
    try:
        return find_head(inner)
    except TransferConfigError as error:
        raise TransferConfigError(
            f"{name}, {a_class(inner)}, has to be an image classifier that ends in one Linear. {error}"
        ) from None


def last_classifier(network: nn.Module, name: str) -> Head:
    """Return the classifier of a network that gives its logits, as far as a picture of noise shows.

    Raises:
        TransferConfigError: there is none, or the network gives something other than its logits.
    """
    head, inner = classifier(network, name), uncompiled(network)
    heard: list[Any] = []
    try:
        with head.module.register_forward_hook(lambda layer, args, logits: heard.append(logits)), evaluating(inner):
            given = run_on_a_picture(inner)
    except TransferConfigError:
        return head  # it takes other images
    if isinstance(given, Tensor) and heard and not _are_same_logits(given.flatten(1), heard[-1].flatten(1)):
        raise TransferConfigError(
            f"{name}, {a_class(inner)}, does not give the logits of its last layer {head.path!r}, but features "
            "(num_classes=0), or probabilities after a softmax or sigmoid. Logits are averaged: let each network end "
            "in its classifier, and leave softmax and sigmoid to the loss."
        )
    return head


def _are_same_logits(given: Tensor, logits: Tensor) -> bool:
    """Return whether both give the same probabilities: a log-softmax changes an image's logits by one number."""
    if given.shape != logits.shape:
        return False
    apart = given - logits
    return torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-4) and (given.shape[1] > 1 or not apart.any())


def renew_head(network: nn.Module, head: Head, num_classes: int) -> None:
    """Replace a network's classifier by one for other classes, with new weights."""
    layer: Any
    *_, (name, layer) = linear_layers(head.module)
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, num_classes, bias=has_bias)
    else:
        new = nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size, bias=has_bias)
    replace_modules(network, {f"{head.path}.{name}".rstrip("."): new.to(layer.weight)})
    if hasattr(network, "num_classes"):
        network.num_classes = num_classes  # type: ignore[assignment]
