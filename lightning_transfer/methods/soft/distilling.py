"""Add to the user's training step a loss that keeps the pretrained network's predictions for the same images."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_transfer.compiling import forget_graphs, uncompiled
from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.first_loss import FirstLoss, refuse_sum
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.methods.soft.knowledge import (
    SourceKnowledge,
    kept_classifier,
    knowledge_loss,
    normalize_alike,
    said_by,
)
from lightning_transfer.naming import a_class
from lightning_transfer.roles import Head, find_head, linear_layers, parameters_before
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.annealing import Annealing
from lightning_transfer.source.loss import Mix, fix_for_a_sum, joint_loss, sum_of_zeros

UNLIKE = 0.1  # cosine similarity of weights; trained on from the same ones they have more, otherwise about 0 (ours)


class Taken:
    """Keeps what a layer takes in the step's own passes, as a forward pre-hook; a copy of it keeps nothing."""

    def __init__(self) -> None:
        self.is_listening = False
        self.calls: list[tuple[Any, Any]] = []
        self.versions: list[int] = []  # of the last call's tensors, which count their changes in place

    def __reduce__(self) -> tuple[type["Taken"], tuple[()]]:
        return (Taken, ())

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the arguments of a pass with gradients."""
        if self.is_listening and torch.is_grad_enabled():
            self.calls.append((args, kwargs))
            self.versions = _versions(args, kwargs)


class KnowledgeTerm(TransferPart):
    """Keeps the pretrained classifier in one run.

    Args:
        knowledge: of the pretrained network.
        module: the user's module.
        weight: of the loss.
        mix: how the losses are combined.
        head: path of the target head, or "auto".
    """

    title = "SoftFinetuning"

    def __init__(self, knowledge: SourceKnowledge, module: Any, *, weight: Schedule, mix: Mix, head: str) -> None:
        super().__init__()
        self.knowledge, self.mix = knowledge, mix
        self.annealing = Annealing(weight)
        found = find_head(module, head)
        self.head_path = found.path
        self.head = kept_classifier(knowledge, found.module, found.path).to(next(found.module.parameters()))
        self.network_path = knowledge.network_in(module, self.head_path)
        _check_place(module, f"{self.network_path}.{knowledge.head}".lstrip("."), found)
        self.options = {
            "head": self.head_path,
            "backbone": self.network_path,
            "mix": mix,
            **knowledge.describe(),
            **self.annealing.describe(),
        }
        self._first_loss = FirstLoss()
        self._pretrained: tuple[nn.Module, ...] = ()  # in a tuple: it is neither trained nor saved
        self._handles: list[Any] = []
        self._images, self._features = Taken(), Taken()  # by the network, by its head

    @property
    def introduction(self) -> str:
        """Return what is kept, and where."""
        return (
            f"keeps a classifier of {self.head.out_features} classes beside the head {self.head_path!r}; the "
            f"pretrained network gets the images of {self.network_path or 'the module'!r}."
        )

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the parameters before the head: the kept classifier is pretrained too."""
        return parameters_before(module, self.head_path)

    def attach(self, module: Any) -> None:
        """Listen to the network and the head."""
        self.detach()
        if self.annealing.most:
            forget_graphs(module)
            network, head = module.get_submodule(self.network_path), module.get_submodule(self.head_path)
            self._handles = [
                network.register_forward_pre_hook(self._images, with_kwargs=True),
                head.register_forward_pre_hook(self._features, with_kwargs=True),
            ]

    def detach(self) -> None:
        """Remove the hooks and the pretrained network."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pretrained = [], ()
        self.end()

    def check(self, trainer: Any) -> None:
        """Take the length of training, and warn if nothing before the head is trained."""
        self._first_loss.reset()
        self.annealing.check(trainer)
        optimizers.check_held(trainer, self)
        if trainer.global_step == 0:
            self._check_weights(trainer.lightning_module)
        if reason := optimizers.why_untrained(trainer, parameters_before(trainer.lightning_module, self.head_path)):
            warnings.warn(
                f"No parameter before the head is trained, so SourceKnowledge changes nothing in the network. {reason}",
                NoEffectWarning,
                stacklevel=2,
            )

    def _check_weights(self, module: Any) -> None:
        """Warn if the kept classifier is a new one, or the network has other weights than the pretrained one."""
        if self.knowledge.is_new:
            warnings.warn(
                f"The classifier {self.knowledge.head!r} that SourceKnowledge keeps has the random weights of a new "
                "Linear, so it knows nothing to keep. Make SourceKnowledge before the classifier is replaced, for "
                "example before network.reset_classifier(num_classes), or of another copy of the pretrained network: "
                "SourceKnowledge(timm.create_model(name, pretrained=True)).",
                stacklevel=2,
            )
        network = module.get_submodule(self.network_path)
        similarity = self.knowledge.similarity(uncompiled(network))
        if similarity < UNLIKE:
            warnings.warn(
                f"The weights of {self.network_path or 'the module'!r} are not like those of the pretrained network "
                f"(cosine similarity {similarity:.2f}), so it does not have the knowledge to keep. Load the same "
                "weights in both.",
                stacklevel=2,
            )

    def begin(self, module: Any, batch: Any) -> None:
        """Start listening."""
        is_due = self.annealing.now(self.trainer) > 0
        self._images.is_listening = self._features.is_listening = is_due
        if is_due and self.annealing.most <= 1:
            self._first_loss.listen(module.get_submodule(self.head_path), batch)

    def stepped(self, loss: Tensor | None) -> None:
        """Stop listening, and refuse a first loss that is a sum: the loss that is added is a mean.

        Raises:
            TransferConfigError: it is one, or another method has put source images among the target's.
        """
        if self._images.is_listening and self.num_source:
            raise TransferConfigError(
                "SourceKnowledge takes the target's images alone, and a source task appends others to them. Pass "
                "SourceTask(forward='separate')."
            )
        self._images.is_listening = self._features.is_listening = False
        if loss is not None:
            refuse_sum(loss, self._first_loss.criteria(), to_do=fix_for_a_sum(self.mix))

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the step's loss with the knowledge loss added; at weight 0 exactly the step's own loss."""
        weight = self.annealing.now(self.trainer)
        values = {"transfer/target_loss": loss.detach(), "transfer/knowledge_weight": torch.tensor(weight)}
        if weight:
            kept = self._loss()
            self.refuse_not_finite("knowledge loss", kept)
            values["transfer/knowledge_loss"] = kept.detach()
            loss = joint_loss(loss, kept, weight=weight, mix=self.mix)
        else:
            self._pretrained = ()
            loss = loss + sum_of_zeros(self) if self.trainer.world_size > 1 else loss
        self.log(values)
        return loss

    def _loss(self) -> Tensor:
        images, features = self._images.calls, self._features.calls
        if len(images) != 1 or len(features) != 1:
            raise TransferConfigError(
                f"The training step ran {self.network_path or 'the module'!r} {len(images)} times and its head "
                f"{self.head_path!r} {len(features)} times with gradients; SourceKnowledge takes the images and "
                "the features of one pass. Call the network as a whole, once a step; if another part takes the images, "
                "name it: SourceKnowledge(backbone='...')."
            )
        if not self._pretrained:  # not earlier: only now its device and its precision are known
            self._pretrained = (copy.deepcopy(self.knowledge.pretrained).to(self.head.weight),)
        network = uncompiled(self.of_module.get().get_submodule(self.network_path))
        normalize_alike(self._pretrained[0], network)
        ((args, kwargs),), ((head_args, head_kwargs),) = images, features
        if self._images.versions != _versions(args, kwargs):
            raise TransferConfigError(
                f"The step changed the images in place after they entered {self.network_path or 'the module'!r}, so "
                "the pretrained network would get other images. For example, write images = images - mean instead of "
                "images.sub_(mean)."
            )
        said = said_by(self._pretrained[0], self.knowledge.head, args, kwargs)
        return knowledge_loss(self.head(*head_args, **head_kwargs), said, temperature=self.knowledge.temperature)

    def end(self) -> None:
        """Forget the step."""
        self._first_loss.end()
        for taken in (self._images, self._features):
            taken.is_listening = False
            taken.calls.clear()

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the classifier's weights."""
        return {**super().get_extra_state(), **self.annealing.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Resume a run's state.

        Raises:
            TransferConfigError: the options differ; the message lists the differences.
        """
        super().set_extra_state(state)
        self.annealing.set_state(state)


def _versions(*given: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _check_place(module: Any, place: str, head: Head) -> None:
    """Refuse a head after other layers that stand in place of the pretrained classifier: it takes their features."""
    if head.path.startswith(f"{place}."):
        layers = linear_layers(module.get_submodule(place))
        inside = [layer for name, layer in layers if not name.startswith("original_module")]  # peft's, does not run
        if inside[0] not in head.module.modules():
            raise TransferConfigError(
                f"The head {head.path!r} takes the output of {a_class(inside[0])} before it, not the features "
                f"of the pretrained classifier. Pass the whole classifier: head={place!r}."
            )
