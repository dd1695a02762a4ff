"""Add the gated transfer network to a LightningModule as a mixin, also for manual optimization."""

from typing import Any

from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import KEY, TrainingOnly
from lightning_transfer.glue.mixin import PartMixin, takes_options_of
from lightning_transfer.methods.gated.apply import apply_gated_transfer
from lightning_transfer.methods.gated.auxiliary import AuxiliaryTerm
from lightning_transfer.methods.gated.callback import GatedTransfer
from lightning_transfer.stamps import stamped, unstamped

STATE = f"{KEY}_gated"  # the key in a checkpoint of what only training needs


class GatedTransferMixin(PartMixin):
    """Weigh features and add an auxiliary classifier inside a LightningModule, as `GatedTransfer` does.

    The transfer module is a part of the network, so the module's own load_from_checkpoint reads its checkpoints. A
    checkpoint holds the auxiliary classifier beside the state_dict, not in it.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> class Lit(GatedTransferMixin, L.LightningModule):
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.model = network
        ...         self.add_gated_transfer(tap="model.layer3")
        ...
        ...     def training_step(self, batch):
        ...         loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        ...         return self.gated_loss(loss)
    """

    @takes_options_of(GatedTransfer)
    def add_gated_transfer(self, callback: GatedTransfer) -> None:
        """Put a transfer module before the head; call it in `__init__`, after the network is built.

        It takes the options of `GatedTransfer`.

        Raises:
            TransferConfigError: an option does not fit, or no head or tap is found.
        """
        apply_gated_transfer(self, **callback.options)
        term = callback.make_part(self)
        self.lightning_transfer_gated = TrainingOnly("GatedTransferMixin", term)
        term.attach(self)

    @property
    def _term(self) -> AuxiliaryTerm:
        held = self._added("lightning_transfer_gated", "transfer module", by="add_gated_transfer()")
        term: AuxiliaryTerm = held.part
        return term

    def gated_loss(self, loss: Tensor) -> Tensor:
        """Return the loss for `training_step` to return, or for `manual_backward`; call it once a step.

        With a source task, call `gated_loss` first: `self.joint_loss(self.gated_loss(loss))`.

        Args:
            loss: scalar, of the target batch.

        Raises:
            TransferConfigError: it is called twice in a step, or after `joint_loss`.
        """
        if not self._is_training():
            return loss
        term = self._joined(self._term)
        if term.has_added:
            raise TransferConfigError("gated_loss was called twice in a step. Call it once, with the whole loss.")
        if term.weight and getattr(getattr(self, "source_task", None), "has_added", False):
            raise TransferConfigError(
                "joint_loss was called before gated_loss, so the auxiliary classifier would get the source images too. "
                "Write self.joint_loss(self.gated_loss(loss))."
            )
        term.stepped(loss)
        return term.add_to(self, loss)

    def on_train_start(self) -> None:
        """Check what is known only now."""
        self._term.check(self._fitting)
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Listen at the tap; in the warm-up freeze the backbone's norms."""
        self._joined(self._term).begin(self, batch)
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the step; raise if it never called `gated_loss`."""
        if self._term.weight and not self._term.has_added and outputs is not None:
            raise TransferConfigError(
                f"{type(self).__name__}.training_step never called self.gated_loss(loss), so the auxiliary classifier "
                "learns nothing. Return self.gated_loss(loss), or add_gated_transfer(aux_weight=0)."
            )
        self._term.end()
        self._joined(self._term).before_optimizer_step(self)  # so that a later step finds no gradient of the warm-up
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Drop the backbone's gradients in the warm-up."""
        self._joined(self._term).before_optimizer_step(self)
        super().on_before_optimizer_step(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what only training needs."""
        checkpoint[STATE] = stamped({"part": dict(self._term.state_dict())})
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what only training needs; a checkpoint of only weights does not have it."""
        if STATE in checkpoint:
            self._term.load_state_dict(unstamped(checkpoint[STATE])["part"])
        super().on_load_checkpoint(checkpoint)
