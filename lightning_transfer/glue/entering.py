"""Compare what a training step and a pass outside of it do to images before the network's first layer takes them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from lightning_transfer.compiling import is_compiled, outside_graphs
from lightning_transfer.pixel_ranges import RAW
from lightning_transfer.roles import Head

OUTSIDE = 0.3  # share of pixels outside of the expected range; augmentation leaves at most .15 there (ours)
STRETCHED = 5.0  # how many times as large, or as small, their deviation may be (ours)
MARGIN = 0.02  # share of the range's width that is added at both ends
LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, _DropoutNd)
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
        """Return whether the first images were clearly changed otherwise than this; augmentation alone does not count.

        Args:
            images: of a batch; False without any.
            taken: what the layer took; False if it has another number of pixels.
        """
        if not images or not taken or images[0].numel() != taken[0].numel():
            return False
        return is_unlike(images[0], taken[0], scale=self.scale, shift=self.shift)


def is_unlike(images: Tensor, taken: Tensor, *, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> bool:
    """Return whether pixels clearly have another range than images that are multiplied and shifted."""
    before, after = images.detach().float(), taken.detach().float()
    least, largest = before.min(), before.max()
    full = torch.where(largest > 1, torch.where(largest > RAW, 255.0, largest), 1.0)  # a batch may have no white pixel
    low, high = torch.where(least < 0, least, 0.0), torch.where(least < 0, largest, full)
    margin = MARGIN * (high - low)
    is_outside = (after < (low - margin) * scale + shift) | (after > (high + margin) * scale + shift)
    stretched = (after.std() / (scale * before.std())).log().abs()
    return bool((is_outside.float().mean() > OUTSIDE) | (stretched > math.log(STRETCHED)))


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    pixels = images.detach().float()
    return pixels.mean(), pixels.std()


def images_in(batch: Any) -> list[Tensor]:
    """Return the tensors of pictures in a batch, (B, channels, height, width)."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 4]


def first_layer(module: nn.Module, head: Head) -> tuple[nn.Module, ...]:
    """Return the network's first layer before the head, by the order in which layers are registered.

    The tuple is empty without one, or if the module is compiled: for a hook, torch would compile it again.
    """
    if is_compiled(module):
        return ()
    inside, network = {*head.module.modules()}, module.get_submodule(head.network_path)
    is_whole = any(isinstance(layer, _ConvNd) for layer in network.modules())  # else the head may be apart from it
    layers = (network if is_whole else module).modules()
    return tuple(layer for layer in layers if isinstance(layer, LAYERS) and layer not in inside)[:1]


class Entering:
    """Records what a layer takes in a training step, as a forward pre-hook outside of compiled graphs."""

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
