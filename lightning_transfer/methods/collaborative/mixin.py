"""Add collaborative fine-tuning to a LightningModule as a mixin, also for manual optimization."""

from typing import Any

from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import TrainingOnly
from lightning_transfer.glue.mixin import PartMixin, takes_options_of
from lightning_transfer.methods.collaborative.agreement import Agreement
from lightning_transfer.methods.collaborative.apply import put_together
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.together import Together


class CollaborativeMixin(PartMixin):
    """Tune several networks together inside a LightningModule, as `CollaborativeFinetuning` does.

    The networks are a part of the module, so its own load_from_checkpoint reads its checkpoints.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> class Lit(CollaborativeMixin, L.LightningModule):
        ...     def __init__(self, network, places):
        ...         super().__init__()
        ...         self.model = network
        ...         self.add_sources({"places": places})
        ...
        ...     def training_step(self, batch):
        ...         loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        ...         return self.collaborative_loss(loss)
    """

    @takes_options_of(Together)
    def add_sources(self, together: Together) -> None:
        """Put other networks beside the module's own; call it in `__init__`, after the network is built.

        It takes the options of `CollaborativeFinetuning`, except `search`.

        Raises:
            TransferConfigError: an option does not fit, or the network is not found.
        """
        put_together(self, together)
        self.lightning_transfer_collaborative = TrainingOnly("CollaborativeMixin", Agreement(self, together))

    @property
    def ensemble(self) -> CollaborativeEnsemble:
        """Return the networks."""
        return self._agreement.ensemble

    @property
    def _agreement(self) -> Agreement:
        held = self._added("lightning_transfer_collaborative", "other networks", by="add_sources([network])")
        agreement: Agreement = held.part
        return agreement

    def collaborative_loss(self, loss: Tensor) -> Tensor:
        """Return the loss for `training_step` to return, or for `manual_backward`; call it once a step.

        Args:
            loss: scalar, of the mean logits.
        """
        if not self._is_training():
            return loss
        agreement = self._joined(self._agreement)
        if agreement.has_added:
            raise TransferConfigError(
                "collaborative_loss was called twice in a step. Call it once, with the whole loss."
            )
        agreement.stepped(loss)
        return agreement.add_to(self, loss)

    def on_train_start(self) -> None:
        """Check what is known only now."""
        self._agreement.check(self._fitting)
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Record each network's logits."""
        self._joined(self._agreement).begin(self, batch)
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the step; raise if it never called `collaborative_loss`."""
        if not self._agreement.has_added and outputs is not None:
            raise TransferConfigError(
                f"{type(self).__name__}.training_step never called self.collaborative_loss(loss), so its networks "
                "do not learn each by itself. Return self.collaborative_loss(loss)."
            )
        self._agreement.end()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_validation_batch_start(self, batch: Any, *place: int) -> None:
        """Record each network's logits."""
        if not self._is_lent():
            self._agreement.begin_validation(self._running, self, *place)
        super().on_validation_batch_start(batch, *place)

    def on_validation_batch_end(self, outputs: Any, batch: Any, *args: Any) -> None:
        """Count how many images each network has right."""
        if not self._is_lent():
            self._agreement.count(batch, *args[1:])
        super().on_validation_batch_end(outputs, batch, *args)

    def on_validation_epoch_end(self) -> None:
        """Log each network's accuracy."""
        if not self._is_lent():
            self._agreement.validated(self._running)
        super().on_validation_epoch_end()
