"""Add the loss of networks that are tuned together to a training step, and measure each network."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_transfer.batches import Kind, find_labels, ways_to_be_right
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.first_loss import MeanLoss, is_close, kind_by, refuse_sum
from lightning_transfer.glue.logs import is_log_due, log, say
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.glue.trainer import is_run_by
from lightning_transfer.methods.collaborative.apply import find_ensemble
from lightning_transfer.methods.collaborative.functional import collaborative_loss, disagreement
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.together import Together
from lightning_transfer.naming import nesting
from lightning_transfer.pending import when
from lightning_transfer.roles import out_width
from lightning_transfer.values import value_of

FAR_BELOW = 0.2  # accuracy; a network this far below another one, plus the standard error, makes the mean worse


class Agreement(TransferPart):
    """Train networks together for one run.

    Args:
        module: the user's module, which holds the ensemble.
        together: the options.
    """

    title = "CollaborativeFinetuning"

    def __init__(self, module: Any, together: Together) -> None:
        super().__init__()
        found = find_ensemble(module)
        assert found is not None  # the caller has put it there
        self.path, self._watched = found[0], (found[1],)  # in a tuple, so that it is not registered as a child
        self.weight, self.labels = together.weight, together.labels
        self.criterion = copy.deepcopy(together.loss)  # a module with buffers moves to the device with this part
        self._batch: Any = None
        self._has_warned = False  # of a network far below another one
        self._is_foreign = False  # whether the step's loss was found to be another one than the criterion
        self.has_added = False  # to the loss of this step
        head = self.ensemble.head_of(self.ensemble.names[0]).module
        if len(self.ensemble.names) > 1 and together.loss is F.cross_entropy and out_width(head) == 1:
            raise TransferConfigError(
                "The networks give one logit, and cross_entropy takes one for each class. Pass your step's criterion: "
                "loss=lambda logits, labels: F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.float())."
            )
        self._kinds: dict[torch.Size, Kind | None] = {}  # of labels, by the shape of one label
        self._checked: set[torch.Size] = set()  # shapes of one label in training
        self._counts: Tensor | None = None  # of images in this validation: right in each network, and all
        self.options = {"model": self.path, "weight": str(together.weight), "loss": value_of(together.loss)}

    @property
    def ensemble(self) -> CollaborativeEnsemble:
        """Return the networks."""
        return self._watched[0]

    @property
    def introduction(self) -> str:
        """Return which networks there are, what of them is frozen, and how their images are changed."""
        said = []
        for name in self.ensemble.names:
            member: Any = self.ensemble.members[name]
            frozen = self.ensemble.frozen.get(name, 0)
            depth = f", {frozen} convolutions frozen" if frozen else ""
            sized = f", images of {member.size or f'{member.zoom:.3g} times the size'}" if member.is_resized else ""
            scaled = ", normalised as in its pretraining" if member.scale is not None else ""
            said.append(f"{name} ({type(self.ensemble.layers_of(name)).__name__}{depth}{sized}{scaled})")
        return f"{self.path!r} is now the mean of {', '.join(said)}."

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the user's head for a new head, and the layers before it for another network."""
        own = self.ensemble.names[0]
        head = self.ensemble.head_of(own).module
        if name in self._heads():
            return head.parameters()
        mine = {id(param) for param in head.parameters()}
        return [param for param in self.ensemble.layers_of(own).parameters() if id(param) not in mine]

    def _heads(self) -> dict[str, nn.Module]:
        found = {}
        for name in self.ensemble.names[1:]:
            head = self.ensemble.head_of(name)
            found[f"{self.path}.members.{name}.network.{head.path}"] = head.module
        return found

    def added(self, module: Any) -> dict[str, nn.Module]:
        """Return the other networks, their heads first."""
        return self._heads() | {f"{self.path}.members.{name}": other for name, other in self._others()}

    def _others(self) -> list[tuple[str, nn.Module]]:
        return list(self.ensemble.members.items())[1:]

    def renamed(self, module: Any) -> dict[str, str]:
        """Return the new name of the user's own network, and its old one."""
        return {f"{self.path}.members.{self.ensemble.names[0]}.network": self.path}

    def detach(self) -> None:
        """Forget the last pass."""
        self.end()

    def check(self, trainer: Any) -> None:
        """Refuse networks that no optimizer holds; warn if only the other networks are trained as a whole."""
        for _, other in self._others():
            optimizers.check_held(trainer, other)
        if optimizers.why_untrained(trainer, self.neighbors(trainer.lightning_module, "")):
            heads = {id(param) for head in self._heads().values() for param in head.parameters()}
            for name, other in self._others():
                if any(param.requires_grad and id(param) not in heads for param in other.parameters()):
                    warnings.warn(
                        f"Of your network only the head is trained, its backbone is frozen; of {name!r} all layers are "
                        f"trained. If you do not want this, freeze it before you pass it: "
                        f"{name}.requires_grad_(False).",
                        stacklevel=2,
                    )

    def begin(self, module: Any, batch: Any) -> None:
        """Record each network's logits."""
        self._batch, self.has_added = batch, False
        self.ensemble.passes.begin()

    def stepped(self, loss: Tensor | None) -> None:
        """Stop recording: what runs from here on is not the step's own pass."""
        self.ensemble.passes.is_followed = False

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Replace the loss of the mean logits by the networks' own losses, and add their disagreement."""
        self.has_added = True
        if len(self.ensemble.names) == 1:
            return loss  # to the bit
        logits, labels = self._last_pass(), self.labels(self._batch)
        if logits.shape[1] != len(labels):
            raise TransferConfigError(
                f"The networks ran {logits.shape[1]} images, and the batch has {len(labels)} labels. Pass "
                "labels=lambda batch: ..., one label for each image."
            )
        if labels.shape[1:] not in self._checked:
            self._check_labels(labels, logits)
            self._checked.add(labels.shape[1:])
        joint = self.criterion(logits.mean(0), labels)
        if not self._is_foreign and (self.trainer.global_step == 0 or is_log_due(self.trainer)):
            self._compare(loss, joint, logits)
        together = collaborative_loss(logits, labels, weight=self.weight, loss=self.criterion)
        self._refuse_non_finite(together.detach(), logits.detach(), labels)
        if is_log_due(self.trainer):
            self.log(self._measured(logits.detach(), labels))
        return loss + (together - joint)

    def _refuse_non_finite(self, together: Tensor, logits: Tensor, labels: Tensor) -> None:
        step = self.trainer.global_step

        def error(losses: Tensor) -> FloatingPointError:
            return FloatingPointError(
                f"The collaborative loss is {together.item()} in step {step}: the losses of "
                f"{', '.join(self.ensemble.names)} are {losses.tolist()}. {when(step, self.trainer.global_step)}"
            )

        def losses() -> Tensor:
            return torch.stack([self.criterion(each, labels) for each in logits])

        self.pending.refuse(~torch.isfinite(together), error, losses)

    def _last_pass(self) -> Tensor:
        passes = self.ensemble.passes
        if passes.number != 1 or passes.logits is None or not passes.logits.requires_grad:
            without = " without gradients" if passes.number == 1 else ""
            raise TransferConfigError(
                f"The training step ran {self.path!r} {passes.number} times{without}; the loss of the networks is "
                "computed from one pass. Run it once a step, with gradients, as self.model(images)."
            )
        return passes.logits

    def _compare(self, loss: Tensor, joint: Tensor, logits: Tensor) -> None:
        """Warn, once, if the step's loss is not the criterion of the mean logits; refuse a sum over images."""
        found, expected = float(loss.detach()), float(joint.detach())
        if not is_close(found, expected, logits.dtype):
            mean = MeanLoss(self.options["loss"], expected, (logits.shape[1], logits[0].numel()))
            refuse_sum(loss, [mean], to_do="pass that sum: loss=lambda logits, labels: ...")
            self._is_foreign = True
            warnings.warn(
                f"training_step gives a loss of {found:.4f}, and {self.options['loss']} of the networks' mean is "
                f"{expected:.4f}. Extra terms such as a regulariser are kept. If your criterion differs, pass it: "
                "CollaborativeFinetuning(..., loss=torch.nn.CrossEntropyLoss(label_smoothing=0.1)). A criterion that "
                "needs more than logits and labels, such as mixup's, cannot be used with several networks.",
                stacklevel=2,
            )

    def _check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """Refuse labels that cross-entropy cannot learn from, in the first step."""
        kind, num_outputs = self._kind(labels, logits), logits.shape[2]
        if self.criterion is not F.cross_entropy:
            return
        if kind not in ("class numbers", "soft"):
            raise TransferConfigError(
                f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}; cross_entropy cannot learn from "
                "them. Pass your step's criterion too: labels=lambda batch: batch[1], "
                "loss=torch.nn.functional.binary_cross_entropy_with_logits."
            )
        if kind == "class numbers" and int(labels.max()) >= num_outputs:
            raise TransferConfigError(
                f"Labels are up to {int(labels.max())}, and the networks give {num_outputs} logits. Pass "
                "labels=lambda batch: ..., class numbers from 0."
            )

    def _kind(self, labels: Tensor, logits: Tensor) -> Kind | None:
        """Return the kind of labels; only the first ones of a shape are read from the device."""
        if labels.shape[1:] not in self._kinds:
            self._kinds[labels.shape[1:]] = kind_by(self.criterion, logits.detach().mean(0), labels)
        return self._kinds[labels.shape[1:]]

    def _measured(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the disagreement and each accuracy of this step's images."""
        values = {"transfer/disagreement": disagreement(logits)}
        if (kind := self._kind(labels, logits)) is not None:
            ways, several = ways_to_be_right(torch.cat([logits, logits.mean(0, keepdim=True)]), labels, kind)
            *right, values["transfer/ensemble_accuracy"] = torch.where(several > 0, ways[0], ways[1]).mean(1)
            values |= {
                f"transfer/accuracy/{name}": share for name, share in zip(self.ensemble.names, right, strict=True)
            }
        return values

    def end(self) -> None:
        """Forget the step."""
        self._batch = None
        self.ensemble.passes.end()

    def begin_validation(self, trainer: Any, module: Any, *place: int) -> None:
        """Record each network's logits in a validation step, unless another Trainer runs the module.

        Args:
            trainer: of this run.
            module: the user's.
            place: of the batch in its loader, and of the loader.
        """
        if not any(place):  # an earlier validation may have been interrupted
            self._counts = None
        self.ensemble.passes.begin(lambda: is_run_by(trainer, module))

    def count(self, batch: Any, loader: int = 0) -> None:
        """Count how many images of a validation step each network has right, on the first of several loaders."""
        logits, number = self.ensemble.passes.logits, self.ensemble.passes.number
        self.ensemble.passes.end()
        if loader or logits is None or number != 1:
            return
        try:
            labels = self.labels(batch)
        except Exception as error:
            if self.labels is find_labels:
                return  # validation batches may have no labels
            error.add_note(f"This happened in labels= with a validation batch, {nesting(batch)}.")
            raise
        if logits.shape[1] != len(labels):
            return
        if (kind := self._kind(labels, logits)) is not None:
            ways, several = ways_to_be_right(logits, labels, kind)
            counts = torch.cat([ways.sum(2).flatten(), several[None], several.new_full((1,), len(labels))])
            self._counts = counts if self._counts is None else self._counts + counts

    def validated(self, trainer: Any) -> None:
        """Log each network's accuracy and give it to the ensemble; ignore the sanity check before training."""
        if trainer.sanity_checking:
            return
        none = torch.zeros(2 * len(self.ensemble.names) + 2, device=trainer.strategy.root_device)
        counts = trainer.strategy.reduce(none if self._counts is None else self._counts, reduce_op="sum")
        if counts[-1]:
            if len(trainer.num_val_batches) > 1 and not self.ensemble.accuracies:
                say(trainer, "Each network's accuracy is measured on the first of your validation loaders.")
            right = counts[:-2].view(2, -1)[0 if counts[-2] else 1]
            shares = dict(zip(self.ensemble.names, (right / counts[-1]).tolist(), strict=True))
            self.ensemble.accuracies = shares
            log(trainer, {f"transfer/val_accuracy/{name}": torch.tensor(share) for name, share in shares.items()})
            self._warn_of_one_below(shares, float(counts[-1]))

    def _warn_of_one_below(self, shares: dict[str, float], num_images: float) -> None:
        """Warn, once, of a network that is far below another one, if there are enough images to know."""
        best, worst = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        if shares[best] - shares[worst] > FAR_BELOW + num_images**-0.5 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{worst!r} has {shares[worst]:.0%} of the validation images right and {best!r} {shares[best]:.0%}, "
                "so it makes their mean worse. Check that it gets images of the size and normalisation of its "
                "pretraining, and that its learning rate is the same. If that does not help, leave it out.",
                stacklevel=2,
            )
