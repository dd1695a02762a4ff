"""Define the transfer module before a head, and the auxiliary classifier on an earlier stage (arXiv 1810.12521)."""

from typing import Any

from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError, check_count, check_number
from lightning_transfer.methods.gated.functional import gate_features
from lightning_transfer.surgery import Structure, own_randomness, replace_modules


class LastWeights:
    """Keeps the last pass's weights for logging; a copy, deep or pickled, starts empty."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __reduce__(self) -> tuple[type["LastWeights"], tuple[()]]:
        return (LastWeights, ())


class TransferModule(nn.Module):
    """Weighs features: sigmoid(W2 dropout(relu(W1 f))) * f, without biases and without a skip connection.

    Args:
        num_features: D.
        ratio: W1 reduces D features to D / ratio.
        dropout: before W2.

    Example:
        >>> import torch
        >>> TransferModule(32, ratio=16)(torch.rand(2, 32)).shape
        torch.Size([2, 32])
    """

    is_transfer_part = True  # not one of the user's layers

    def __init__(self, num_features: int, *, ratio: int = 16, dropout: float = 0.7) -> None:
        super().__init__()
        check_count("ratio", ratio, least=1)
        check_number("dropout", dropout, most=0.99)
        if num_features % ratio:
            raise TransferConfigError(
                f"ratio={ratio} does not divide the {num_features} features. Pass a divisor, such as "
                f"ratio={max(r for r in range(1, ratio) if num_features % r == 0)}."
            )
        self.dropout = dropout
        self.squeeze = nn.Linear(num_features, num_features // ratio, bias=False)
        self.expand = nn.Linear(num_features // ratio, num_features, bias=False)
        self.last = LastWeights()

    def forward(self, features: Tensor) -> Tensor:
        """Return weighted (B, D) features."""
        weighted, weights = gate_features(
            features, self.squeeze.weight, self.expand.weight, dropout=self.dropout, training=self.training
        )
        self.last.weights = weights.detach()
        return weighted


class AuxiliaryClassifier(nn.Module):
    """Classifies the features of an earlier stage: global average pool, then a Linear.

    Of a vision transformer's tokens it takes the mean (ours).

    Args:
        num_features: channels of the stage, or the width of tokens.
        num_classes: of the target.

    Example:
        >>> import torch
        >>> AuxiliaryClassifier(8, 3)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, classes) logits of (B, C, H, W) features, or of (B, N, D) tokens."""
        logits: Tensor = self.linear(features.mean((2, 3) if features.ndim == 4 else 1))
        return logits


class GatedHead(Structure):
    """Puts a transfer module before a head: Wc dropout(w * f).

    Args:
        head: the user's own head.
        transfer: the module; None for only dropout.
        dropout: between the two.
    """

    callback, remove = "GatedTransfer", "remove_gated_transfer"
    is_whole_head = True  # a source head replaces this module, not the Linear in it

    def __init__(self, head: nn.Linear, transfer: TransferModule | None, dropout: float) -> None:
        super().__init__()
        self.transfer = transfer
        self.dropout = nn.Dropout(dropout)
        self.train(head.training)
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, classes) logits of (B, D) features."""
        weighted = features if self.transfer is None else self.transfer(features)
        logits: Tensor = self.head(self.dropout(weighted))
        return logits

    def __getattr__(self, name: str) -> Any:
        """Return the head's own attribute, such as its weight or its width."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "head":
                raise
            return getattr(self.head, name)

    def spec(self) -> dict[str, Any]:
        """Return the options by which this can be built again."""
        transfer = self.transfer
        return {
            "ratio": None if transfer is None else transfer.squeeze.in_features // transfer.squeeze.out_features,
            "gate_dropout": None if transfer is None else transfer.dropout,
            "dropout": self.dropout.p,
        }

    @classmethod
    def rebuild(cls, root: nn.Module, path: str, spec: dict[str, Any]) -> None:
        """Change a plain head as a spec describes; the weights come with the state that holds the spec."""
        head = root.get_submodule(path)
        if not isinstance(head, GatedHead):
            add_transfer(root, path, ratio=spec["ratio"], gate_dropout=spec["gate_dropout"], dropout=spec["dropout"])


def add_transfer(
    root: nn.Module, path: str, *, ratio: int | None, gate_dropout: float | None, dropout: float
) -> GatedHead:
    """Put a transfer module before the Linear at a path."""
    head: Any = root.get_submodule(path)
    transfer = None
    if ratio is not None:
        with own_randomness():
            transfer = TransferModule(head.in_features, ratio=ratio, dropout=gate_dropout or 0.0).to(head.weight)
    gated = GatedHead(head, transfer, dropout)
    replace_modules(root, {path: gated})
    return gated
