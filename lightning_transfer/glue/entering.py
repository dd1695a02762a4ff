"""Compare what a training step and a pass outside of it do to images before the network's first layer takes them."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lightning_transfer.compiling import is_compiled, outside_graphs
from lightning_transfer.roles import Head

# MixUp makes the deviation up to 1.6 times smaller in small batches; Normalize for timm makes it twice as large or more
SCALED = 1.75
SHIFTED = 0.5  # of the deviation
IN_STEP = "training_step changes images before the network takes them, as a normalisation does"


class Entry(NamedTuple):
    """Holds how pixels were changed before a network's first layer, as far as moments show; scalars on the device.

    Attributes:
        scale: what pixels were multiplied by.
        shift: what was added then.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, images: Tensor, taken: Tensor) -> "Entry":
        """Return what became of images before the layer took them."""
        mean, deviation = _moments(images)
        mean_after, deviation_after = _moments(taken)
        scale = deviation_after / deviation
        return cls(scale, mean_after - scale * mean)

    def is_other(self, images: Sequence[Tensor], taken: Sequence[Tensor]) -> bool:
        """Return whether the first images were clearly changed otherwise; an augmentation alone does not make it clear.

        Args:
            images: of a batch; without any, nothing is clear.
            taken: what the layer took.
        """
        if not images or not taken:
            return False
        mean, deviation = _moments(images[0])
        mean_after, deviation_after = _moments(taken[0])
        expected = self.scale * deviation
        is_scaled = (deviation_after / expected).log().abs() > math.log(SCALED)
        apart = (mean_after - self.scale * mean - self.shift).abs()
        return bool(is_scaled | (apart > SHIFTED * torch.maximum(deviation_after, expected)))


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    pixels = images.detach().float()
    return pixels.mean(), pixels.std()


def images_in(batch: Any) -> list[Tensor]:
    """Return the tensors of pictures in a batch, (B, channels, height, width)."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 4]


def first_layer(module: nn.Module, head: Head) -> tuple[nn.Module, ...]:
    """Return the first convolution of the network, or its first Linear.

    Nothing is returned if that is in the head, or if the module is compiled: a hook would make its graphs once more.
    """
    if is_compiled(module):
        return ()
    inside = {*head.module.modules()}
    parts = module.get_submodule(head.network_path), module  # the second if the head is apart from its network
    for kind, part in product((_ConvNd, nn.Linear), parts):
        for layer in part.modules():
            if isinstance(layer, kind) and layer not in inside:
                return (layer,)
    return ()


class Entering:
    """Records what a layer takes in a training step, outside of compiled graphs, as a forward pre-hook."""

    def __init__(self) -> None:
        self.taken: list[Tensor] = []
        self._is_idle = True
        self._handle: Any = None

    def __reduce__(self) -> tuple[type["Entering"], tuple[()]]:
        return (Entering, ())  # a copy does not listen

    def listen(self, *layers: nn.Module) -> None:
        """Record from now on what one layer takes, if there is one."""
        self.end()
        for layer in layers:
            self._is_idle = False
            self._handle = layer.register_forward_pre_hook(self, with_kwargs=True)

    def end(self) -> None:
        """Remove the hook and forget what was recorded."""
        if self._handle is not None:
            self._handle.remove()
        self.taken, self._is_idle, self._handle = [], True, None

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Record a call; compiled graphs that hold the hook are guarded by whether it is idle."""
        if not self._is_idle:
            self._keep(next(iter((*args, *kwargs.values())), None))

    @outside_graphs
    def _keep(self, taken: Any) -> None:
        if isinstance(taken, Tensor) and torch.is_grad_enabled():
            self.taken.append(taken.detach())
