"""Keep a convolution and its BatchNorm twice, pretrained and tuned; each filter's response is one of the two.

In training BN^S is folded into S, and the mix saves only the difference of the two responses for backward. In eval mode
S and BN^S run one after the other, so that the response is bit-identical to the pretrained network's.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.adafilter.functional import mix_filters
from lightning_transfer.methods.adafilter.gate import RecurrentFilterGate
from lightning_transfer.surgery import FrozenBatchNorm2d, as_buffers

Fixed = Literal["all_tuned", "all_frozen", "random"]
FIXED: tuple[str, ...] = get_args(Fixed)


class GatedBatchNorm2d(nn.Module):
    """Normalises the tuned and the frozen response each by its own BatchNorm, and chooses between them.

    Args:
        norm: the pretrained BatchNorm2d, which becomes the tuned one; a copy of it stays frozen.

    Example:
        >>> norm = GatedBatchNorm2d(nn.BatchNorm2d(3))
        >>> norm(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.ones(2, 3)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.tuned = norm
        self.frozen = FrozenBatchNorm2d(norm)
        self.training = norm.training

    def forward(self, tuned: Tensor, frozen: Tensor, gates: Tensor) -> Tensor:
        """Normalise both responses, (B, C, H, W), each by its own norm, and mix them by (B, C) gates."""
        return mix_filters(self.tuned(tuned), self.frozen(frozen), gates)


class GatedConv2d(nn.Module):
    """Keeps a convolution twice, with its BatchNorm if it has one.

    Args:
        conv: the pretrained convolution, which becomes the tuned one; a copy of it stays frozen.
        norm: the BatchNorm whose only input is the output of the convolution.

    Example:
        >>> layer, images = GatedConv2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.rand(2, 3, 6, 6)
        >>> layer(images, torch.randint(0, 2, (2, 8))).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.tuned = conv
        self.training = conv.training
        self.frozen = _as_buffers(conv, persistent=True)
        self.norm = None if norm is None else GatedBatchNorm2d(norm)
        self.is_linear = _is_linear(conv)  # if so, a norm can be folded in
        self._folded = _as_buffers(conv, persistent=False) if norm is not None and self.is_linear else None
        self._decider: tuple[RecurrentFilterGate, int] | Fixed | None = None
        self._fold()
        self.register_load_state_dict_post_hook(_fold_again)  # type: ignore[no-untyped-call]

    def decide_by(self, gate: RecurrentFilterGate | Fixed, layer: int = 0) -> None:
        """Take the gates from a gate, as its layer of this number, or from a fixed rule."""
        self._decider = gate if isinstance(gate, str) else (gate, layer)  # in a tuple it is not registered here
        if gate == "all_frozen":
            self.tuned.requires_grad_(requires_grad=False)
            if self.norm is not None:
                self.norm.tuned.requires_grad_(requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fold()  # weights folded in float32 differ from those folded in float64
        return self

    @torch.no_grad()
    def _fold(self) -> None:
        """Fold the frozen norm into the frozen filters."""
        if self.norm is not None and self._folded is not None:
            weight, bias = folded(self.frozen, self.norm.frozen)
            self._folded.weight, self._folded.bias = weight, bias

    def forward(self, features: Tensor, gates: Tensor | None = None) -> Tensor:
        """Return the chosen responses, normalised.

        Args:
            features: (B, C, H, W).
            gates: (B, filters); by default those that `decide_by` set.

        Raises:
            TransferConfigError: no gates are given, and `decide_by` was not called.
        """
        if gates is None and self._decider == "all_tuned":
            response: Tensor = self.tuned(features)
            return response if self.norm is None else self.norm.tuned(response)
        is_folded = self.training and self._folded is not None
        frozen_conv: Any = self._folded if is_folded else self.frozen
        if gates is None and self._decider == "all_frozen":
            response = frozen_conv(features)
            return response if self.norm is None or is_folded else self.norm.frozen(response)
        chosen = self._decide(features) if gates is None else gates
        tuned, frozen = self.tuned(features), frozen_conv(features)
        if self.norm is not None and not is_folded:
            return self.norm(tuned, frozen, chosen)  # type: ignore[no-any-return]
        tuned = tuned if self.norm is None else self.norm.tuned(tuned)
        return mix_filters(tuned, frozen, chosen, hard=gates is None)

    def _decide(self, features: Tensor) -> Tensor:
        if isinstance(self._decider, tuple):
            gate, layer = self._decider
            return gate(layer, features)  # type: ignore[no-any-return]
        if self._decider == "random":
            return torch.randint(0, 2, (len(features), self.tuned.out_channels), device=features.device)
        raise TransferConfigError("This layer has no gates. Pass gates=, or call decide_by(gate, layer).")


def folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the weights and biases of one convolution that equals a convolution and the norm after it."""
    scale, shift = norm.affine()
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else shift + conv.bias * scale


def _fold_again(layer: GatedConv2d, keys: Any) -> None:
    layer._fold()


def _is_linear(conv: nn.Conv2d) -> bool:
    """Return whether scaling the weights scales the response by the same factor."""
    cls = type(conv)
    return cls is nn.Conv2d or (cls.__name__ == "Conv2dSame" and cls.__module__.startswith("timm."))


def _as_buffers(conv: nn.Conv2d, *, persistent: bool) -> nn.Conv2d:
    """Return a copy without parameters; one that is folded has a bias."""
    twin = as_buffers(conv, persistent=persistent)
    if twin.bias is None and not persistent:
        del twin.bias
        twin.register_buffer("bias", twin.weight.new_zeros(twin.out_channels), persistent=False)
    return twin
