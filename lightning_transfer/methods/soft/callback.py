"""Add soft fine-tuning to a Trainer as a callback."""

from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.checkpoints import EXTRA
from lightning_transfer.methods.soft.distilling import KnowledgeTerm
from lightning_transfer.methods.soft.knowledge import SourceKnowledge
from lightning_transfer.methods.soft.options import check_soft_options
from lightning_transfer.source.checks import USUAL, Weight, as_schedule, as_source, as_weight
from lightning_transfer.source.loss import Mix
from lightning_transfer.source.task import SourceTask, TimmSource
from lightning_transfer.source.term import SourceTerm
from lightning_transfer.stamps import BEGIN_ANEW


class SoftFinetuning(TransferCallback):
    """Fine-tune with the source loss, which is annealed away (arXiv 1909.02236).

    Plain fine-tuning replaces the source objective by the target's at once. Here, if the source is near enough, every
    step adds the loss of a source batch, which runs through the user's network with the source head instead of the
    target's. Its weight falls to exactly 0; from then on each step computes and costs the same as in plain fine-tuning.
    The idea is the paper's; the weight's shape and length, and the source head on the target head's features, are ours.

    With a `SourceKnowledge` instead of a source task, no source images are needed: the kept classifier is trained on
    the target's own images, on the predictions of the pretrained network (arXiv 1606.09282).

    Logs `transfer/source_loss`, `transfer/source_weight`, `transfer/target_loss` and, if it was measured,
    `transfer/domain_gap` at the Trainer's interval; with a `SourceKnowledge`, logs `transfer/knowledge_loss`,
    `transfer/knowledge_weight` and `transfer/target_loss`.

    Args:
        source: the task that the network was pretrained on, or a mapping of the arguments of `SourceTask`; with the
            key `from_timm`, of the arguments of `SourceTask.from_timm`; or a `SourceKnowledge`.
        weight: of the source loss: a `Schedule`, or a number, which is constant. "auto" measures before the first step
            how far the target is from the source; if it is near enough, the weight is `Schedule()`, from 1 to 0 over
            the first half of training, otherwise 0 (ours). With a `SourceKnowledge`, "auto" is `Schedule()` without a
            measurement (ours; the paper's weight is 1).
        mix: "add" for target + w * source, "convex" for (1 - w) * target + w * source.
        head: dotted path of the target head, or "auto".

    Raises:
        TransferConfigError: an option is not valid.

    Example:
        >>> import torch
        >>> from lightning_transfer.schedules import Schedule
        >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8))
        >>> SoftFinetuning(SourceTask(data, num_classes=8), weight=Schedule(shape="cosine")).weight(0.25)
        0.5
    """

    mixin = "SourceTaskMixin"

    def __init__(
        self,
        source: SourceTask | TimmSource | SourceKnowledge,
        *,
        weight: Weight = "auto",
        mix: Mix = "add",
        head: str = "auto",
    ) -> None:
        if isinstance(source, SourceKnowledge):
            self.mixin = ""  # there is none for it
            self.source: SourceTask | SourceKnowledge = source
        else:
            self.source = as_source(source)
        self.weight = as_weight(weight)
        check_soft_options(as_schedule(self.weight, USUAL)[0], mix)
        self.mix = mix
        self.head = head

    def make_part(self, module: Any) -> SourceTerm | KnowledgeTerm:
        """Return the source task, or what is known, as a term of the loss."""
        weight, measured = as_schedule(self.weight, USUAL)
        if isinstance(self.source, SourceKnowledge):
            return KnowledgeTerm(self.source, module, weight=weight, mix=self.mix, head=self.head)
        return SourceTerm(self.source, module, weight=weight, mix=self.mix, head=self.head, measured=measured)

    def check_part(self, saved: dict[str, Any]) -> None:
        """Refuse the state of a run with the other kind of source.

        Raises:
            TransferConfigError: the message names both.
        """
        knew = "pretrained network" in saved[EXTRA]["options"]
        if knew != isinstance(self.source, SourceKnowledge):
            theirs, mine = ("SourceKnowledge", "SourceTask") if knew else ("SourceTask", "SourceKnowledge")
            raise TransferConfigError(
                f"SoftFinetuning was trained with a {theirs} and is resumed with a {mine}. Pass the old {theirs}. "
                f"{BEGIN_ANEW}"
            )

    def __repr__(self) -> str:
        return f"SoftFinetuning({self.source!r}, weight={self.weight!r}, mix={self.mix!r}, head={self.head!r})"
