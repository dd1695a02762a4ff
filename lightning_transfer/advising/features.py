"""Extract the features of a pretrained network, in whichever form it gives them (ours)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import nesting
from lightning_transfer.networks import timm_name
from lightning_transfer.randomness import seeded
from lightning_transfer.roles import find_head, linears
from lightning_transfer.tracing import evaluating


class Features:
    """Runs a network, and returns what its head takes, or what the network gives if it ends without a head.

    Args:
        network: a copy, which is changed.
        name: of it, for messages.
    """

    def __init__(self, network: Any, name: str) -> None:
        self.network, self.name = network, name
        self.head: nn.Module | None = None
        self.place: int | None = None  # of the head's call, whose input is ranked, among those that are heard
        self.heard: list[tuple[nn.Module, Tensor, Tensor]] = []
        if timm_name(network):
            network.reset_classifier(0)  # timm's own way to features
            return
        try:
            heads = [find_head(network).module]
        except TransferConfigError:  # none or several: the head is what gives the scores that the network gives
            heads = [layer for _, layer in linears(network)]
        for head in heads:
            head.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, layer: nn.Module, args: Any, kwargs: Any, given: Tensor) -> None:
        self.heard.append((layer, args[0] if args else next(iter(kwargs.values())), given))

    def settle(self, batches: Sequence[Tensor]) -> None:
        """Find on some batches whether the network gives a head's scores; if so, that head's input is ranked."""
        alike: list[set[int]] = []
        for images in batches:
            leaves = tree_leaves(self._given(images))
            tried = enumerate(scores for *_, scores in self.heard)
            alike.append({place for place, scores in tried if any(_ranks_alike(scores, leaf) for leaf in leaves)})
        self.place = max(set.intersection(*alike), default=None)
        self.head = None if self.place is None else self.heard[self.place][0]

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, D) features of (B, C, H, W) images."""
        found = self._given(images)
        if self.place is not None:
            found = next((taken for _, taken, _ in self.heard[self.place :]), None)
        if not isinstance(found, Tensor) or found.ndim not in (2, 4) or len(found) != len(images):
            raise TransferConfigError(
                f"{self.name} gives {nesting(found)} of {len(images)} images; expected (B, D) features or "
                "(B, classes) logits of a batch."
            )
        return (self._pooled(found, *images.shape[2:]) if found.ndim == 4 else found).float().cpu()

    def _given(self, images: Tensor) -> Any:
        self.heard.clear()
        try:
            with seeded(0, 0), torch.inference_mode(), evaluating(self.network):
                return self.network(images)
        except Exception as error:
            fix = 'network.pretrained_cfg["input_size"] = (channels, height, width)'
            if f"got {images.shape[1]} channels" in str(error):  # said by torch's convolutions
                raise TransferConfigError(
                    f"{self.name} does not run on images {tuple(images.shape)}: {error}. Networks of 3 channels can be "
                    f"ranked, and those of 1, which are given grey images. Write what it takes: {fix}."
                ) from error
            error.add_note(
                f"This happened while {self.name} ran on images {tuple(images.shape)}. If it takes others, write {fix}."
            )
            raise

    def _pooled(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Return the mean over height and width of maps, which have channels first or last."""
        channels = [axis for axis in (1, 3) if maps.shape[axis] == getattr(self.network, "num_features", None)]
        if len(channels) != 1:  # the other axes have the picture's proportions, but for rounding
            rounding = (height != width) * (height + width)
            sides = {1: maps.shape[2:], 3: maps.shape[1:3]}
            channels = [axis for axis, (h, w) in sides.items() if abs(h * width - w * height) <= rounding]
        if len(channels) != 1:
            raise TransferConfigError(
                f"{self.name} gives maps {tuple(maps.shape)}, whose channels may be first or last. Let its forward "
                "give (B, D) features: maps.mean((2, 3)), or maps.mean((1, 2)) if channels are last."
            )
        return maps.mean([axis for axis in (1, 2, 3) if axis != channels[0]])

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of the network without its head."""
        head = set() if self.head is None else {*self.head.parameters()}
        return sum(each.numel() for each in self.network.parameters() if each not in head)


def _ranks_alike(scores: Tensor, given: Any) -> bool:
    """Return whether a network gives the scores of its head, or shares made of them, some of which may be equal."""
    scores = scores.flatten(1)
    is_one = isinstance(given, Tensor) and given.shape == scores.shape
    return is_one and bool((given.gather(1, scores.argmax(1, keepdim=True))[:, 0] == given.amax(1)).all())
