"""Decide with a recurrent network, layer by layer, which filters are tuned for an image.

(h_i, c_i) = LSTMCell(A_i avgpool(x_i), (h_{i-1}, c_{i-1})), g_i = [sigmoid(U_i h_i + b_i) > 1/2]. In the paper
the gate is recurrent over the layers, shared by them and fed with the previous layer's activation; the cell, its width,
the pooling and the start are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_transfer.compiling import is_run_again
from lightning_transfer.errors import TransferConfigError, check_choice, check_count
from lightning_transfer.methods.adafilter.functional import ESTIMATORS, Estimator, straight_through_gate

SPREAD = 0.01  # standard deviation of the initial weights from a state to its gates


@dataclass
class Slot:
    """Holds what a layer keeps of a pass, for the next layer and for logging."""

    pooled: Tensor
    state: tuple[Tensor, Tensor]
    gates: Tensor
    is_taken: bool = False


class Slots:
    """Holds a slot for each layer; a copy, deep or pickled, starts empty, since a pass cannot be copied."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget the last pass and its graph."""
        self.layers: list[Slot | None] = [None] * self.num_layers

    def __reduce__(self) -> tuple[type["Slots"], tuple[int]]:
        return (Slots, (self.num_layers,))


class RecurrentFilterGate(nn.Module):
    """Runs one LSTM cell over the layers of a network, and gives each layer's gates for each image.

    The layers of a pass call the gate in their order. The state after each layer is kept in that layer's slot, which is
    not a part of the module's state_dict. A call out of order raises an error. So does a backward that recomputes a
    part of the pass with a wrong state: after two passes under activation checkpointing, or under reentrant
    checkpointing.

    Args:
        in_channels: input channels of each layer.
        out_channels: filters of each layer.
        width: of the state.
        estimator: one of those of `functional.straight_through_gate`.
        temperature: of the "gumbel" estimator.
        bias: the value at which the gates' logits start: above 0 filters tend to start tuned, below 0 frozen.

    Example:
        >>> gate = RecurrentFilterGate([3, 8], [8, 16], width=4)
        >>> images = torch.rand(2, 3, 6, 6)
        >>> gate(0, images).shape, gate(1, torch.rand(2, 8, 6, 6)).shape
        (torch.Size([2, 8]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        *,
        width: int = 128,
        estimator: Estimator = "straight_through",
        temperature: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("gate_width", width, least=1)
        check_choice("estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        self.temperature = temperature
        self.cell = nn.LSTMCell(width, width)
        self.inputs = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in in_channels)
        self.outputs = nn.ModuleList(nn.Linear(width, channels) for channels in out_channels)
        for layer in self.outputs:
            nn.init.normal_(layer.weight, std=SPREAD)  # type: ignore[arg-type]
            nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
        self.slots = Slots(len(self.inputs))

    def forward(self, layer: int, features: Tensor) -> Tensor:
        """Return the gates of a layer.

        Args:
            layer: its number in the order of the pass.
            features: (B, C, H, W), the input of the layer.

        Returns:
            (B, filters) of zeros and ones.

        Raises:
            TransferConfigError: the call is out of order, or a backward recomputes the layer with a wrong state.
        """
        weight = self.cell.weight_ih
        with torch.autocast(features.device.type, enabled=False):
            total = features.sum((2, 3), dtype=torch.promote_types(weight.dtype, torch.float32))
            pooled = (total / features.shape[2:].numel()).to(weight.dtype)  # the backward of mean() takes twice as long
            before = self._state_before(layer, pooled)
            state = self.cell(self.inputs[layer](pooled), before)
            gates = straight_through_gate(
                self.outputs[layer](state[0]),
                estimator=self.estimator,
                temperature=self.temperature,
                training=self.training,
            )
        self.slots.layers[layer] = Slot(pooled.detach(), state, gates.detach() > 0.5)
        return gates

    def _state_before(self, layer: int, pooled: Tensor) -> tuple[Tensor, Tensor] | None:
        is_again = is_run_again()
        if is_again:
            self._check_again(layer, pooled)
        elif layer == 0:
            self.slots.clear()
        if layer == 0:
            return None  # the cell starts at zero
        before = self.slots.layers[layer - 1]
        if before is None or (before.is_taken and not is_again):
            raise TransferConfigError(
                f"Gated layer {layer} ran {'twice' if before else 'without the layers before it'}, but the gates need "
                "a whole pass in the order of the layers. Run the network from its start, or do not gate layers that "
                "run alone: gated=lambda name, conv: ..."
            )
        before.is_taken = True
        return before.state

    def _check_again(self, layer: int, pooled: Tensor) -> None:
        """Refuse a layer that backward recomputes (activation checkpointing) with another state than in the pass."""
        slot = self.slots.layers[layer]
        if slot is None or not torch.equal(slot.pooled, pooled):
            raise TransferConfigError(
                "Activation checkpointing with two passes through a gated network before one backward: the gates' "
                "state of the first pass is lost. Call backward after each pass, or turn checkpointing off."
            )
        if self.cell.weight_ih.requires_grad and not slot.state[0].requires_grad:
            raise TransferConfigError(
                "Reentrant activation checkpointing cuts the gates' recurrence, so their gradients would be wrong. Use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False); in timm, "
                "timm.layers.set_reentrant_ckpt(False)."
            )
