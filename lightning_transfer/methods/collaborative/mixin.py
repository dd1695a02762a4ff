"""Collaborative fine-tuning as a mixin: explicit, and for manual optimization too."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError, check_number
from lightning_transfer.glue.checkpoints import TrainingOnly
from lightning_transfer.glue.mixin import PartMixin, noted
from lightning_transfer.methods.collaborative.agreement import Agreement
from lightning_transfer.methods.collaborative.apply import Frozen, apply_collaborative
from lightning_transfer.methods.collaborative.functional import Criterion
from lightning_transfer.methods.collaborative.members import Sources
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble


class CollaborativeMixin(PartMixin):
    """Several networks inside a LightningModule: what `CollaborativeFinetuning` does, by hand.

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

    @noted
    def add_sources(
        self,
        sources: Sources,
        *,
        model: str = "auto",
        weight: float = 0.2,
        frozen_layers: Frozen = None,
        loss: Criterion = F.cross_entropy,
        labels: Labels = find_labels,
    ) -> None:
        """Put other networks beside the module's own; call it in `__init__`, when the network is built.

        Args:
            sources: the other networks, or names of timm's; in a list, or by name.
            model: dotted name of the module's network, or of what images enter where the head stands apart; or "auto".
            weight: of the disagreement.
            frozen_layers: how many convolutions are frozen, by network, or a LayerPlan, or where one was saved.
            loss: the criterion of the training step.
            labels: finds the (B,) class numbers in a batch.

        Raises:
            TransferConfigError: an option does not fit, or no network is found.
        """
        check_number("weight", weight)
        module: Any = self
        apply_collaborative(module, sources, model=model, frozen_layers=frozen_layers)
        agreement = Agreement(module, weight=weight, loss=loss, labels=labels)
        self.lightning_transfer_collaborative = TrainingOnly("CollaborativeMixin", agreement)

    @property
    def ensemble(self) -> CollaborativeEnsemble:
        """The networks."""
        return self._agreement.ensemble

    @property
    def _agreement(self) -> Agreement:
        if not hasattr(self, "lightning_transfer_collaborative"):
            raise TransferConfigError(
                f"{type(self).__name__} has no other networks. In __init__, behind its own, write "
                "self.add_sources([network])."
            )
        return self.lightning_transfer_collaborative.part  # type: ignore[return-value]

    def collaborative_loss(self, loss: Tensor) -> Tensor:
        """The loss to return from `training_step`, or to hand to `manual_backward`: once a step.

        Args:
            loss: scalar, of the networks' mean.
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
        """Check what only now is known."""
        self._agreement.check(self._fitting)
        super().on_train_start()  # type: ignore[misc]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Follow what each network says."""
        self._joined(self._agreement).begin(self, batch)
        parent: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        return parent

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let nothing of the step be left; say so where the step made no collaborative loss."""
        if not self._agreement.has_added and outputs is not None:
            raise TransferConfigError(
                f"{type(self).__name__}.training_step never called self.collaborative_loss(loss), so its networks "
                "learn as one. Return self.collaborative_loss(loss)."
            )
        self._agreement.end()
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]

    def on_validation_batch_start(self, batch: Any, *args: Any) -> None:
        """Follow what each network says."""
        if not self._is_lent():
            self._agreement.begin_validation(self._running, self)
        super().on_validation_batch_start(batch, *args)  # type: ignore[misc]

    def on_validation_batch_end(self, outputs: Any, batch: Any, *args: Any) -> None:
        """Count what each has right."""
        if not self._is_lent():
            self._agreement.count(batch, *args[1:])
        super().on_validation_batch_end(outputs, batch, *args)  # type: ignore[misc]

    def on_validation_epoch_end(self) -> None:
        """Log it."""
        if not self._is_lent():
            self._agreement.validated(self._running)
        super().on_validation_epoch_end()  # type: ignore[misc]
