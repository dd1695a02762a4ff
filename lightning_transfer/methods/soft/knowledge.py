"""Keep what a pretrained network predicts for the target's images (Learning without Forgetting, arXiv 1606.09282).

L = L_target + w * T^2 * KL(softmax(g(x) / T) || softmax(h_s(f(x)) / T))

g is the pretrained network with its classifier, f the network that is tuned without its head, and h_s a copy of that
classifier, which is tuned too. That the old classifier is kept on the new images, w = 1 and T = 2 are the paper's.
Ours: by default w is annealed, as a source loss is; g runs on the images of each step, where the paper runs it once
before training; the factor T^2, which keeps the size of the gradient; and KL instead of cross-entropy, which has the
same gradient and is 0 as long as nothing is forgotten.
"""

import copy
import math
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError, check_positive
from lightning_transfer.naming import a_class
from lightning_transfer.networks import find_network, loaded
from lightning_transfer.roles import find_head, in_width, users_modules
from lightning_transfer.stamps import digest
from lightning_transfer.tracing import comes_out, run_on_a_picture


def knowledge_loss(logits: Tensor, pretrained_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Return how far a classifier's predictions are from the pretrained one's, as a mean over images.

    Args:
        logits: (B, classes) of the classifier that is tuned.
        pretrained_logits: (B, classes) of the pretrained one, of the same images.
        temperature: by which both are divided; a larger one counts unlikely classes more.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> knowledge_loss(logits, logits).item()
        0.0
    """
    said, kept = ((one / temperature).log_softmax(1) for one in (logits, pretrained_logits))
    return temperature**2 * F.kl_div(said, kept, log_target=True, reduction="batchmean")


@dataclass(frozen=True, eq=False, repr=False)
class SourceKnowledge:
    """Keeps what a pretrained network knows, without source images (arXiv 1606.09282).

    The network's classifier is kept beside the new head. Both are trained on the target's images: the new head on the
    labels, the kept classifier on the predictions of the pretrained network. Make this object before you replace the
    classifier, because it copies the network. It is not shown to help: with an ImageNet network and the default
    weight it is between 1.7 points below fine-tuning and 1.1 above on six targets (examples/benchmarks/regime.md).

    Args:
        network: the pretrained network with its classifier, or the name of a timm model to load with its weights.
        head: dotted path of the classifier in it, a Linear, or "auto".
        backbone: dotted path of the network in your module that takes the images; "auto" takes the part of the same
            class.
        temperature: of both predictions.

    Raises:
        TransferConfigError: an option is not valid, or the network has no such classifier.

    Example:
        >>> import timm
        >>> SourceKnowledge(timm.create_model("resnet10t", num_classes=7))
        SourceKnowledge(ResNet, 7 classes, temperature=2.0)
    """

    network: nn.Module | str
    _: KW_ONLY
    head: str = "auto"
    backbone: str = "auto"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.network, str | nn.Module):
            raise TransferConfigError(
                f"network is {a_class(self.network)}; expected the pretrained network with its classifier, or "
                "the name of a timm model."
            )
        check_positive("temperature", self.temperature)
        network = copy.deepcopy(uncompiled(loaded(self.network))).eval().requires_grad_(requires_grad=False)
        is_timms = self.head == "auto" and hasattr(network, "get_classifier")
        if is_timms and isinstance(network.get_classifier(), nn.Identity):
            raise TransferConfigError(
                f"{type(network).__name__} has no classifier (num_classes=0). Load the pretrained network with its own."
            )
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "head", find_head(network, self.head).path)
        if not isinstance(self.classifier, nn.Linear):
            raise TransferConfigError(
                f"The classifier {self.head!r} is {a_class(self.classifier)}; expected a Linear. Pass "
                "head='...', its dotted path."
            )
        self._check_alone()

    def _check_alone(self) -> None:
        """Refuse a network that predicts by more than its classifier, as far as a picture of noise shows it."""
        scores: list[Tensor] = []
        hook = self.classifier.register_forward_hook(lambda *heard: scores.append(heard[2]))
        with suppress(TransferConfigError), hook, torch.no_grad():  # it may not run on a picture
            output = run_on_a_picture(self.pretrained)
        if len(scores) and not comes_out(scores[-1], output):
            raise TransferConfigError(
                f"The pretrained {type(self.pretrained).__name__} predicts by more than its classifier {self.head!r}: "
                "it scales the scores, or combines them with those of another head. SourceKnowledge keeps one "
                "classifier; take a network that predicts by one."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SourceKnowledge":
        return self  # never changes

    def __repr__(self) -> str:
        classes = self.classifier.out_features
        return f"SourceKnowledge({type(self.network).__name__}, {classes} classes, temperature={self.temperature})"

    @property
    def classifier(self) -> Any:
        """Return the pretrained classifier."""
        return self.pretrained.get_submodule(self.head)

    @property
    def pretrained(self) -> nn.Module:
        """Return the pretrained network, in eval mode and without gradients."""
        assert isinstance(self.network, nn.Module)  # loaded
        return self.network

    @property
    def is_new(self) -> bool:
        """Return whether the classifier looks new: its bias is 0, or its weights are uniform, as torch draws them."""
        weight: Tensor = self.classifier.weight.detach().float()
        bias: Tensor | None = self.classifier.bias
        if bias is not None and not bias.any():
            return True  # timm draws new weights in several ways and sets the new bias to 0
        bound = weight.shape[1] ** -0.5
        is_inside = float(weight.abs().max()) <= 1.005 * bound  # also in half precision; trained weights reach further
        is_uniform = abs(float(weight.std()) * 3**0.5 / bound - 1) < 0.1
        return is_inside and is_uniform and weight.numel() >= 200

    def network_in(self, module: nn.Module, head_path: str) -> str:
        """Return the path of the network in the user's module that takes the images as the pretrained one does.

        With `backbone="auto"` that is the part of the same class, because a module around it may normalise the images
        first.

        Args:
            module: the user's module.
            head_path: of the target head.
        """
        if self.backbone == "auto":
            kind = type(self.pretrained)
            alike = [name for name, part in users_modules(module) if type(part) is kind]
            holding = [name for name in alike if f"{head_path}.".startswith(f"{name}.{self.head}.".lstrip("."))]
            for found in (holding, alike):
                if len(found) == 1:
                    return found[0].removesuffix("_orig_mod").rstrip(".")
        return find_network(module, self.backbone)[0]

    def similarity(self, network: nn.Module) -> float:
        """Return the cosine similarity of a network's weights to the pretrained ones; 1 if none has the same name."""
        theirs = dict(network.named_parameters())
        product = square = other_square = 0.0
        for name, mine in self.pretrained.named_parameters():
            if mine.ndim > 1 and name in theirs and theirs[name].shape == mine.shape:
                one, other = (weight.detach().cpu().float().flatten() for weight in (mine, theirs[name]))
                product += float(one @ other)
                square += float(one @ one)
                other_square += float(other @ other)
        return product / math.sqrt(square * other_square) if square * other_square else 1.0

    @cached_property
    def _digest(self) -> str:
        return digest(self.pretrained.state_dict())  # once, for all runs that share this object

    def describe(self) -> dict[str, str]:
        """Return what decides what a run computes, as strings that a checkpoint can hold and compare."""
        return {"pretrained network": self._digest, "temperature": f"{self.temperature:g}"}


def normalize_alike(pretrained: nn.Module, network: nn.Module) -> None:
    """Let each BatchNorm use the statistics of the batch if that of the tuned network does, without changing its own.

    Otherwise the two networks differ before anything is forgotten, and the loss pulls the tuned one away from what fits
    the batch: with an ImageNet network this cost 6 points on flowers (examples/benchmarks/regime.md).

    Args:
        pretrained: in eval mode otherwise.
        network: the tuned one.
    """
    tuned = dict(network.named_modules())
    uses_batch = any(isinstance(one, _BatchNorm) and one.training for one in tuned.values())
    for name, layer in pretrained.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False  # it normalises by the batch in training, without keeping statistics
            other = tuned.get(name)  # a method may have moved the layer
            layer.training = other.training if isinstance(other, _BatchNorm) else uses_batch


def said_by(network: nn.Module, head: str, args: Any, kwargs: Any) -> Tensor:
    """Return the output of a network's classifier, also if the network returns it in a dict.

    Args:
        network: in eval mode.
        head: path of its classifier.
        args: what the network is called with.
        kwargs: the same by name.

    Raises:
        TransferConfigError: the classifier does not run once, on one row of features an image.
    """
    said: list[Tensor] = []
    name = type(network).__name__
    try:
        with network.get_submodule(head).register_forward_hook(lambda *heard: said.append(heard[2])), torch.no_grad():
            network(*args, **kwargs)
    except Exception as error:
        error.add_note(
            f"This happened in the pretrained {name}, which was called with the inputs of the tuned network. Both take "
            "only images. If another part takes the images, name it: SourceKnowledge(backbone='...')."
        )
        raise
    if len(said) != 1 or said[0].ndim != 2:
        shapes = ", ".join(str(tuple(one.shape)) for one in said) or "nothing"
        raise TransferConfigError(
            f"The classifier {head!r} of the pretrained {name} gave {shapes}; expected one tensor (images, classes). "
            "Name the Linear that gives the prediction: SourceKnowledge(head='...')."
        )
    return said[0]


def kept_classifier(knowledge: SourceKnowledge, head: nn.Module, path: str) -> nn.Linear:
    """Return a copy of the pretrained classifier for one run.

    Args:
        knowledge: of the pretrained network.
        head: the target head.
        path: of it.

    Raises:
        TransferConfigError: it takes other features than the target head, or is that head.
    """
    kept: nn.Linear = copy.deepcopy(knowledge.classifier).train().requires_grad_()
    if in_width(head) != kept.in_features:
        raise TransferConfigError(
            f"The kept classifier takes {kept.in_features} features, the target head {path!r} takes {in_width(head)}. "
            "Keep the classifier of the network that is tuned, or name the module that replaces it: head='...'."
        )
    weight = getattr(head, "weight", torch.empty(0))
    if weight.shape == kept.weight.shape and torch.equal(weight.cpu(), kept.weight.cpu()):
        raise TransferConfigError(
            f"SourceKnowledge holds the head {path!r} that is tuned, not a pretrained classifier. Make it before the "
            "classifier is replaced, for example before network.reset_classifier(num_classes), or of another copy of "
            "the pretrained network: SourceKnowledge(timm.create_model(name, pretrained=True))."
        )
    return kept
