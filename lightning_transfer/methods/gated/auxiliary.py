"""Add the auxiliary classifier's loss to the user's training step, and train only the new modules in a warm-up."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_transfer.batches import Kind, Labels, criterion_of, find_labels, kind_of
from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.first_loss import FirstLoss, is_binary, is_close, refuse_sum
from lightning_transfer.glue.logs import is_log_due
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.glue.trainer import is_dry_run
from lightning_transfer.methods.gated.apply import find_gated_head, find_tap
from lightning_transfer.methods.gated.modules import AuxiliaryClassifier
from lightning_transfer.roles import users_modules
from lightning_transfer.surgery import own_randomness

DEAD = 0.01  # if the weights spread less, all features are weighted the same
LOOKS = 10  # logged steps in a row before the warning, since new weights spread little too
AUX_WEIGHT = 0.2  # the authors'


class AuxiliaryTerm(TransferPart):
    """Holds one run's auxiliary classifier, and does the warm-up.

    Args:
        module: the user's module, its head gated.
        tap: dotted name of the layer whose output the classifier takes, or "auto".
        weight: of its loss; 0 for no classifier.
        warmup_epochs: epochs in which only the transfer module and the heads are trained.
        labels: returns the labels of a batch.
    """

    title = "GatedTransfer"

    def __init__(self, module: Any, *, tap: str, weight: float, warmup_epochs: int, labels: Labels) -> None:
        super().__init__()
        found = find_gated_head(module)
        assert found is not None  # the caller put it in
        self.head_path, self._gated = found[0], (found[1],)  # in a tuple: the user's modules are not registered here
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.labels = labels
        self._first_loss = FirstLoss(labels)
        self.classifier: AuxiliaryClassifier | None = None
        self.tap = ""
        if weight:
            self.tap, num_features = find_tap(module, tap, self.head_path)
            with own_randomness():
                self.classifier = AuxiliaryClassifier(num_features, found[1].head.out_features).to(found[1].head.weight)
        self._handle: Any = None
        self._batch: Any = None
        self._tapped: list[Tensor] = []
        self._kind: Kind | None = None  # of the labels, after the first step
        self._is_listening = False
        self.has_added = False  # to the loss of this step
        self._num_source = 0  # such images in this step
        self._frozen_norms: list[_NormBase] = []  # in this step of a warm-up
        self._is_binary = False  # by the first loss
        self._is_foreign = False  # whether a step's loss was found to be another one than the classifier's criterion
        self._num_dead = 0
        self.options = {**{key: str(value) for key, value in found[1].spec().items()}, "tap": self.tap}
        self.options |= {"aux_weight": str(weight), "warmup_epochs": str(warmup_epochs)}

    @property
    def introduction(self) -> str:
        """Return what was added, and where."""
        heard = f", and an auxiliary classifier after {self.tap!r}" if self.weight else ""
        return f"puts a transfer module before {self.head_path!r}{heard}."

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the head's parameters: new modules learn at their rate."""
        return self._gated[0].head.parameters()

    def added(self, module: Any) -> dict[str, nn.Module]:
        """Return the transfer module, by path."""
        transfer = self._gated[0].transfer
        return {} if transfer is None else {f"{self.head_path}.transfer": transfer}

    def renamed(self, module: Any) -> dict[str, str]:
        """Return the new and the old name of the head."""
        return {f"{self.head_path}.head": self.head_path}

    def attach(self, module: Any) -> None:
        """Listen at the tap."""
        self.detach()
        if self.classifier is not None:
            self._handle = module.get_submodule(self.tap).register_forward_hook(self._hear)

    def detach(self) -> None:
        """Remove the hooks from the user's module."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.end()
        self.unfreeze()

    def check(self, trainer: Any) -> None:
        """Refuse a warm-up that never ends, and a classifier that no optimizer holds."""
        optimizers.check_held(trainer, self)
        self._first_loss.reset()
        self._kind, self._is_foreign = None, False
        gated, spec = self._gated[0], self._gated[0].spec()
        if not gated.training and (spec["dropout"] or spec["gate_dropout"]):
            warnings.warn(
                f"{self.head_path!r} is in eval mode, and Lightning trains it so: dropout and gate_dropout do nothing. "
                "Call .train() on your network before fit, or pass dropout=0, gate_dropout=0.",
                NoEffectWarning,
                stacklevel=2,
            )
        num_epochs = trainer.max_epochs  # -1 or None: not known
        if num_epochs is not None and 0 < num_epochs <= self.warmup_epochs and not is_dry_run(trainer):
            raise TransferConfigError(
                f"warmup_epochs={self.warmup_epochs}, but training has {num_epochs} epochs, so the backbone would "
                "never be tuned. Pass fewer."
            )

    def begin(self, module: Any, batch: Any) -> None:
        """Start listening; in the warm-up freeze the backbone's norms."""
        self.unfreeze()
        self._batch, self.has_added = batch, False
        self._is_listening = self.classifier is not None
        if self._is_listening:
            if not self._is_foreign and self.labels is find_labels and is_log_due(self.trainer):
                self._first_loss.reset()  # mixup, for example, may begin after the first step or epoch
            self._first_loss.listen(self._gated[0], batch)
        if self._is_warming(self.trainer):
            norms = [layer for _, layer in users_modules(module) if isinstance(layer, _NormBase) and layer.training]
            for norm in norms:
                norm.training = False
            self._frozen_norms = norms  # all are the backbone's: the transfer module and the heads have none

    def stepped(self, loss: Tensor | None) -> None:
        """Stop listening: the step's own pass is over."""
        self._is_listening = False
        if loss is not None:
            self._look(loss)
        self._num_source = self.num_source

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss plus the weighted auxiliary loss."""
        self.has_added = True
        values = {}
        if self.classifier is not None:
            aux_loss = self._loss()
            values["transfer/aux_loss"] = aux_loss.detach()
            loss = loss + self.weight * aux_loss
        if is_log_due(self.trainer):
            transfer = self._gated[0].transfer
            if transfer is not None and transfer.last.weights is not None:
                values["transfer/gate_spread"] = transfer.last.weights.float().std()
                self._warn_of_death(float(values["transfer/gate_spread"]))
            self.log(values)
        return loss

    def _look(self, loss: Tensor) -> None:
        """Refuse a first loss that is a sum; warn, once, if a loss is not the criterion of the auxiliary classifier."""
        found = self._first_loss.criteria()
        if self._kind is None:  # in the first step
            self._is_binary = is_binary(loss, found)
            if self.weight <= AUX_WEIGHT:
                refuse_sum(loss, found, to_do="pass aux_weight= times the batch size")
        if not found or loss.numel() > 1 or self.labels is not find_labels:  # labels= settles what it learns from
            return
        value = float(loss.detach())
        if not any(is_close(value, known.mean, known.dtype) for known in found):
            self._is_foreign = True
            warnings.warn(
                f"training_step gives a loss of {value:.4f}, and {found[-1].name} of the head's logits and the batch's "
                f"labels, from which the auxiliary classifier learns, is {found[-1].mean:.4f}. If images are "
                "mixed, the batch's labels are wrong for them: pass aux_weight=0, or labels=lambda batch: ... with "
                "the right ones. If the loss differs by a regulariser, class weights or label smoothing, the labels "
                "are right: pass labels=lambda batch: batch[1].",
                stacklevel=2,
            )

    def _loss(self) -> Tensor:
        assert self.classifier is not None
        if len(self._tapped) != 1:
            raise TransferConfigError(
                f"The training step ran {self.tap!r} {len(self._tapped)} times with gradients, but the auxiliary "
                "classifier takes the features of one pass. Train without it: aux_weight=0."
            )
        labels = self.labels(self._batch)
        features = self._tapped[0]
        num_images = len(features) - self._num_source
        if num_images != len(labels):
            raise TransferConfigError(
                f"The network ran {num_images} images, but the batch has {len(labels)} labels, so the auxiliary "
                "classifier cannot match them. Pass labels=lambda batch: ... with one for each image, or train without "
                "it: aux_weight=0."
            )
        logits = self.classifier(features[: len(labels)])
        self._kind = self._kind or self._kind_of(labels, logits.shape[1])
        loss = criterion_of(self._kind)(logits, labels)
        self.refuse_not_finite(f"auxiliary loss after {self.tap!r}", loss)
        return loss

    def _kind_of(self, labels: Tensor, num_outputs: int) -> Kind:
        """Return the kind of the first step's labels."""
        kind = kind_of(labels, num_outputs, is_binary=self._is_binary)
        if kind is None or (kind == "class numbers" and int(labels.max()) >= num_outputs):
            raise TransferConfigError(
                f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}, up to {labels.max().item()}, and "
                f"the head {self.head_path!r} gives {num_outputs} numbers per image. The auxiliary classifier takes "
                "class numbers, one 0 or 1 for one logit, or a row of as many from 0 to 1. Pass labels=lambda batch: "
                "... that returns such labels, or train without it: aux_weight=0."
            )
        return kind

    def _hear(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._is_listening and torch.is_grad_enabled():
            self._tapped.append(output)

    def end(self) -> None:
        """Forget the step."""
        self._batch, self._is_listening = None, False
        self._first_loss.end()
        self._tapped = []

    def unfreeze(self) -> None:
        """Unfreeze the norms of a warm-up step, only after its backward, which may run them again."""
        for norm in self._frozen_norms:
            norm.training = True
        self._frozen_norms = []

    def before_optimizer_step(self, module: Any) -> None:
        """Drop the backbone's gradients in the warm-up, so that no optimizer updates or decays it, or keeps a momentum.

        Its parameters keep their requires_grad, which must not change after DDP has seen them.
        """
        self.unfreeze()
        if self._is_warming(self.trainer):
            for param in self._body_parameters(module):
                param.grad = None

    def _is_warming(self, trainer: Any) -> bool:
        return bool(trainer.current_epoch < self.warmup_epochs)

    def _body_parameters(self, module: Any) -> Iterable[nn.Parameter]:
        parts = [child for child in module.modules() if isinstance(child, TransferPart)]  # of other methods too
        new = {id(param) for part in [self._gated[0], *parts] for param in part.parameters()}
        return [param for param in module.parameters() if id(param) not in new]

    def _warn_of_death(self, spread: float) -> None:
        self._num_dead = self._num_dead + 1 if spread < DEAD else 0
        if self._num_dead == LOOKS:
            warnings.warn(
                f"The transfer module's weights are nearly equal (spread {spread:.4f}), so it scales all features by "
                "the same factor. Lower gate_dropout, or try ratio=None: only dropout and the auxiliary classifier.",
                NoEffectWarning,
                stacklevel=2,
            )
