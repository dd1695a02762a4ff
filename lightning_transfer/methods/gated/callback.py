"""The gated transfer network as a callback: one line in a Trainer."""

from typing import Any

from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError, check_count, check_number
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.methods.gated.apply import apply_gated_transfer, find_gated_head, remove_gated_transfer
from lightning_transfer.methods.gated.auxiliary import AuxiliaryTerm, aux_weight_of
from lightning_transfer.methods.gated.modules import GatedHead


class GatedTransfer(TransferCallback):
    """Weigh the transferred features before they are classified (arXiv 1810.12521).

    A small module in front of the head gives each of an image's features a weight between 0 and 1. An auxiliary
    classifier on the last stage but one, where it is asked for, adds its loss in training and is gone from what is
    saved. Both, their numbers and the warm-up in which the body rests are the authors' code's; that resting means no
    gradient, no decay and no statistics, and that there is no auxiliary classifier by default, which did better on
    two of four targets of our benchmarks and no worse on the others, is ours.

    The module stays in the network after fit, as it was trained: `functional.remove_gated_transfer` takes it out, and
    `load_from_checkpoint` reads its checkpoints. Logs `transfer/aux_loss` and `transfer/gate_spread`, the standard
    deviation of the weights, at the Trainer's interval.

    Args:
        head: dotted path of the Linear that gives the logits, or "auto".
        tap: where the auxiliary classifier listens; "auto" takes the last stage but one, by timm's list or by the size
            of pictures.
        ratio: by how much the module squeezes the features; None for no module: dropout and auxiliary classifier alone.
        gate_dropout: inside of the module.
        dropout: between the module and the head.
        aux_weight: of the auxiliary loss; 0 for no auxiliary classifier. By default the authors' .2 where `tap` or
            `labels` is given or `ratio` is None, else 0.
        warmup_epochs: in which only the module and the classifiers learn.
        labels: finds the (B,) class numbers in a batch, where that is no (images, labels) and names none.

    Raises:
        TransferConfigError: an option does not fit.

    Example:
        >>> GatedTransfer(tap="model.layer3", warmup_epochs=2)
        GatedTransfer(ratio=16, gate_dropout=0.7, dropout=0.5, aux_weight=0.2, warmup_epochs=2)
    """

    mixin = "GatedTransferMixin"
    structure = GatedHead

    def __init__(
        self,
        *,
        head: str = "auto",
        tap: str = "auto",
        ratio: int | None = 16,
        gate_dropout: float = 0.7,
        dropout: float = 0.5,
        aux_weight: float | None = None,
        warmup_epochs: int = 0,
        labels: Labels = find_labels,
    ) -> None:
        if ratio is not None:
            check_count("ratio", ratio, least=1)
        for name, share in (("gate_dropout", gate_dropout), ("dropout", dropout)):
            check_number(name, share, most=0.99)  # all dropped, nothing would be learned
        if not callable(labels):
            raise TransferConfigError(f"labels={labels!r}; it takes a function of the batch.")
        check_count("warmup_epochs", warmup_epochs, least=0)
        self.options: dict[str, Any] = {"head": head, "ratio": ratio, "gate_dropout": gate_dropout, "dropout": dropout}
        self.tap = tap
        self.aux_weight = aux_weight_of(aux_weight, tap=tap, ratio=ratio, labels=labels)
        self.warmup_epochs = warmup_epochs
        self.labels = labels

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Put the transfer module in front of the head."""
        self.refuse_mixin(module)
        found = find_gated_head(module)
        if found is None:
            apply_gated_transfer(module, **self.options)
            return True
        theirs = {key: value for key, value in found[1].spec().items() if value is not None or key == "ratio"}
        theirs["head"] = found[0] if self.options["head"] != "auto" else "auto"
        different = [f"{key}={value!r}" for key, value in theirs.items() if value != self.options[key]]
        self.refuse_other(module, "has a transfer module", different, remove="remove_gated_transfer")
        return False

    def restore_layers(self, module: Any) -> None:
        """The head alone again."""
        remove_gated_transfer(module)

    def make_part(self, module: Any) -> AuxiliaryTerm:
        """The auxiliary classifier, and the warm-up."""
        return AuxiliaryTerm(
            module, tap=self.tap, weight=self.aux_weight, warmup_epochs=self.warmup_epochs, labels=self.labels
        )

    def __repr__(self) -> str:
        names = ("ratio", "gate_dropout", "dropout")
        shown = ", ".join(f"{name}={self.options[name]!r}" for name in names)
        return f"GatedTransfer({shown}, aux_weight={self.aux_weight!r}, warmup_epochs={self.warmup_epochs!r})"
