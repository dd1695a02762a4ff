"""Add a source task to a LightningModule as a mixin, also for manual optimization."""

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue.mixin import PartMixin, takes_options_of
from lightning_transfer.methods.soft.knowledge import SourceKnowledge
from lightning_transfer.methods.soft.options import check_soft_options
from lightning_transfer.source.checks import (
    ALWAYS,
    USUAL,
    Weight,
    as_schedule,
    as_source,
    as_weight,
    check_hyperparameters,
)
from lightning_transfer.source.choosing import Borrows
from lightning_transfer.source.loss import Mix
from lightning_transfer.source.task import SourceTask, TimmSource
from lightning_transfer.source.term import SourceTerm


@dataclass(frozen=True)
class Options:
    """Holds the options of `add_source_task`: those of `SoftFinetuning`, and of what is borrowed."""

    source: SourceTask | TimmSource
    _: KW_ONLY
    weight: Weight = "auto"
    mix: Mix = "add"
    head: str = "auto"
    borrow: Borrows | None = None


class SourceTaskMixin(PartMixin):
    """Adds a source task to a LightningModule: the same numbers as the callbacks, with explicit calls.

    By default it is `SoftFinetuning`; with `borrow=Borrowing(...)` it is `SelectiveJointFinetuning`.

    The source head is a part of the module (`self.source_task`): its weights and the position in the stream of source
    images are in the module's own state_dict. A module without a source task can load such a checkpoint too.

    Example:
        >>> import lightning as L
        >>> class Lit(SourceTaskMixin, L.LightningModule):
        ...     def __init__(self, network, source=None):
        ...         super().__init__()
        ...         self.save_hyperparameters(ignore=["network", "source"])
        ...         self.model = network
        ...         if source is not None:
        ...             self.add_source_task(source)
        ...
        ...     def training_step(self, batch):
        ...         loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        ...         return self.joint_loss(loss)
    """

    source_task: SourceTerm

    @takes_options_of(Options)
    def add_source_task(self, options: Options) -> None:
        """Attach a source task; call it in `__init__`, after the network is built.

        It takes the options of `SoftFinetuning`; in manual optimization a `Schedule` needs `until_steps`. With
        `borrow=Borrowing(...)` it is selective joint fine-tuning.

        Raises:
            TransferConfigError: an option is not valid, no head is found, or the source task is a hyperparameter.
        """
        if isinstance(options.source, SourceKnowledge):
            raise TransferConfigError(
                "add_source_task takes a SourceTask. SourceKnowledge is for the callback SoftFinetuning; in a step of "
                "your own, add functional.knowledge_loss to the loss."
            )
        source, borrow = as_source(options.source), options.borrow
        schedule, measured = as_schedule(as_weight(options.weight), USUAL if borrow is None else ALWAYS)
        check_soft_options(schedule, options.mix)
        check_hyperparameters(self)
        chooser = None if borrow is None else borrow.open(source)
        self.source_task = SourceTerm(
            source,
            self,
            weight=schedule,
            mix=options.mix,
            head=options.head,
            chooser=chooser,
            measured=measured,
        )
        self.source_task.attach(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Prepare the source images of a joint pass."""
        if hasattr(self, "source_task"):
            part = self._joined(self.source_task)
            part.check_once(part.trainer)
            part.begin(self, batch)
        return super().on_train_batch_start(batch, batch_idx)

    def joint_loss(self, target_loss: Tensor) -> Tensor:
        """Return the loss for `training_step` to return, or for `manual_backward`; call it once in each step.

        Outside of training, for example in a `validation_step` that shares code with the training step, it returns the
        target's loss.

        Args:
            target_loss: scalar, the mean loss of the target batch.

        Raises:
            TransferConfigError: no source task was added.
        """
        if not self._is_training():
            return target_loss
        part: SourceTerm = self._joined(self._added("source_task", "source task", by="add_source_task(source)"))
        part.check_once(part.trainer)
        part.was_asked = True
        part.stepped(target_loss)
        loss = part.add_to(self, target_loss)
        part.end()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Clear the step's source images, and warn once if the step did not call `joint_loss`."""
        if hasattr(self, "source_task"):
            if outputs is not None and not self.source_task.was_asked:
                self.source_task.was_asked = True
                warnings.warn(
                    f"{type(self).__name__}.training_step did not call self.joint_loss(loss), so the source task "
                    "changes nothing. Return self.joint_loss(loss).",
                    NoEffectWarning,
                    stacklevel=2,
                )
            self.source_task.end()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the source task out of the checkpoint if this module has none."""
        if not hasattr(self, "source_task"):
            weights = checkpoint["state_dict"]
            for key in [key for key in weights if key.startswith("source_task.")]:
                del weights[key]
        super().on_load_checkpoint(checkpoint)
