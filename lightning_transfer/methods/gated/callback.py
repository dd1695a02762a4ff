"""Add the gated transfer network to a Trainer as a callback."""

from typing import Any

from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError, check_count, check_number
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.methods.gated.apply import (
    apply_gated_transfer,
    check_options,
    find_gated_head,
    remove_gated_transfer,
)
from lightning_transfer.methods.gated.auxiliary import AUX_WEIGHT, AuxiliaryTerm
from lightning_transfer.methods.gated.modules import GatedHead


class GatedTransfer(TransferCallback):
    """Weigh the transferred features before they are classified (arXiv 1810.12521).

    A small module before the head multiplies each feature of an image by a weight between 0 and 1. An optional
    auxiliary classifier on the second-to-last stage adds its loss in training and is not saved with the network. An
    optional warm-up trains with a frozen backbone. All of this, with its numbers, is the authors' code's. Two things
    are ours. Frozen means no gradient, no weight decay and no change of statistics. And by default there is no warm-up
    and no auxiliary classifier: without this classifier, accuracy was better on two of the four targets of our
    benchmarks and not worse on the others.

    The module stays in the network after fit: `functional.remove_gated_transfer` takes it out, and
    `load_from_checkpoint` reads its checkpoints. Logs `transfer/aux_loss` and `transfer/gate_spread`, the standard
    deviation of the weights, at the Trainer's logging interval.

    Args:
        head: dotted path of the Linear that gives the logits, or "auto".
        tap: dotted name of the layer whose output the auxiliary classifier takes; "auto" takes the second-to-last
            stage, by timm's list or by the size of outputs. For a vision transformer, name a block.
        ratio: by which the module divides the number of features; None for no module, only dropout and the auxiliary
            classifier.
        gate_dropout: inside the module.
        dropout: between the module and the head.
        aux_weight: of the auxiliary loss; 0 for no auxiliary classifier. By default the authors' .2 if `tap` names a
            layer, `labels` is given or `ratio` is None, otherwise 0, also with `tap="auto"`.
        warmup_epochs: epochs in which only the module and the classifiers are trained.
        labels: returns the labels of a batch; needed if a batch is not (images, class numbers) and does not name its
            labels.

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
        check_options(ratio, gate_dropout, dropout)
        if not callable(labels):
            raise TransferConfigError(f"labels={labels!r}; it takes a function of the batch.")
        check_count("warmup_epochs", warmup_epochs, least=0)
        self.options: dict[str, Any] = {"head": head, "ratio": ratio, "gate_dropout": gate_dropout, "dropout": dropout}
        self.tap = tap
        if aux_weight is None:  # ours: the classifier only if an option asks for it
            aux_weight = AUX_WEIGHT if tap != "auto" or labels is not find_labels or ratio is None else 0.0
        check_number("aux_weight", aux_weight)
        self.aux_weight = aux_weight
        self.warmup_epochs = warmup_epochs
        self.labels = labels

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Put the transfer module before the head."""
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
        """Take the transfer module out again."""
        remove_gated_transfer(module)

    def make_part(self, module: Any) -> AuxiliaryTerm:
        """Return the part that holds the auxiliary classifier and does the warm-up."""
        return AuxiliaryTerm(
            module, tap=self.tap, weight=self.aux_weight, warmup_epochs=self.warmup_epochs, labels=self.labels
        )

    def __repr__(self) -> str:
        names = ("ratio", "gate_dropout", "dropout")
        shown = ", ".join(f"{name}={self.options[name]!r}" for name in names)
        return f"GatedTransfer({shown}, aux_weight={self.aux_weight!r}, warmup_epochs={self.warmup_epochs!r})"
