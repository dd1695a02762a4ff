"""Run source images through the user's network: in a separate pass, or together with the target's images."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_transfer.compiling import forget_graphs, is_run_again, outside_graphs
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.explaining import explain, explain_joint
from lightning_transfer.naming import a_class
from lightning_transfer.networks import beside, entry_of, find_backbone
from lightning_transfer.roles import Head, has_forward, in_width, is_pooling, parameters_before
from lightning_transfer.source.batchnorm import check_protectable, protected_batchnorm, refused_if_moved
from lightning_transfer.source.task import SourceTask
from lightning_transfer.tracing import as_taken

Draw = Callable[[], Tensor]
UNPROTECTED = (
    "after batchnorm='protect' has ended: source images would change its statistics. Pass "
    "SourceTask(batchnorm='update') or forward='joint'."
)
ALONE = (
    "where the source images that forward='joint' had appended are missing. Checkpoint its parts one by one, or use "
    "forward='separate' with batchnorm='update'."
)


class PassState:
    """Holds what a pass has taken of source images so far; a copy, deep or pickled, is idle."""

    def __init__(self) -> None:
        self.has_trained = False  # whether source images have ever passed with gradients
        self.reset()

    def __reduce__(self) -> tuple[type["PassState"], tuple[()]]:
        return (PassState, ())

    def reset(self) -> None:
        """Stop listening and forget everything."""
        self.is_idle = True
        self.listening = False
        self.draw: Draw | None = None
        self.num_target = 0
        self.num_source = 0
        self.features: Tensor | None = None
        self.is_cut = False

    def keep(self, features: Tensor) -> Tensor:
        """Keep the source rows of (target + source) features and give the target rows back."""
        self.features = features[self.num_target :]
        return features[: self.num_target]

    @property
    def is_split_due(self) -> bool:
        """Return whether the rows that pass hold source images after the target's."""
        return self.num_source > 0 and self.features is None


class _Hook(ABC):
    """Acts only in a pass with source images; abstract."""

    def __init__(self, state: PassState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Act, or let pass; compiled graphs hold one or the other, and are guarded by which."""
        return None if self.state.is_idle else self.act(module, *args)

    @abstractmethod
    def act(self, module: Any, *args: Any) -> Any:
        """Change the arguments or the output."""


def _with_first(first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call with another first one."""
    return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): first})


class _AppendSource(_Hook):
    """Appends the source images to the network's first call in an armed step, as a forward pre-hook."""

    @outside_graphs
    def act(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.state.draw is None or not torch.is_grad_enabled():  # without gradients it is not the step's own call
            return None
        draw, self.state.draw = self.state.draw, None
        images = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(images, Tensor):
            raise TransferConfigError(
                f"forward='joint' found {type(images).__name__} as the first input of {type(network).__name__}, "
                "not images. Use forward='separate'."
            )
        source_images = draw()
        if images.ndim != source_images.ndim:
            raise TransferConfigError(
                f"forward='joint' found an input of shape {tuple(images.shape)} at {type(network).__name__}, which "
                "holds the head but does not take the images. Use forward='separate'."
            )
        if images.shape[1:] != source_images.shape[1:]:
            raise TransferConfigError(
                f"forward='joint' needs source and target images of one shape; found {tuple(source_images.shape[1:])} "
                f"and {tuple(images.shape[1:])}. Resize the source, or use forward='separate'."
            )
        self.state.num_target, self.state.num_source, self.state.has_trained = len(images), len(source_images), True
        both = torch.cat([images, source_images.to(images.dtype)])
        return _with_first(both, args, kwargs)


class _TakeAtHead(_Hook):
    """Takes the source features that reach the head, as a forward pre-hook."""

    @outside_graphs
    def act(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, features = self.state, args[0] if args else next(iter(kwargs.values()))
        state.is_cut = not torch.is_grad_enabled()
        if state.is_split_due:
            _check_rows(features, state.num_target + state.num_source)
            return _with_first(state.keep(features), args, kwargs)
        if state.listening:
            if state.features is not None:
                raise TransferConfigError(
                    "The head ran more than once on a source batch. Return the features yourself: "
                    "SourceTask(forward=lambda module, images: module.backbone(images))."
                )
            state.features = features
        return None


class _TakeAfterBackbone(_Hook):
    """Takes the source features from the output of a backbone without its head, as a forward hook."""

    @outside_graphs
    def act(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.state.is_split_due:
            return None
        if not isinstance(output, Tensor):
            raise TransferConfigError(
                f"forward='joint' cannot split {a_class(output)} that {type(backbone).__name__} returns. "
                "Use forward='separate'."
            )
        _check_rows(output, self.state.num_target + self.state.num_source)
        return self.state.keep(output)


class _RefuseLeak(_Hook):
    """Refuses source rows in the output of the network that holds the head, as a forward hook."""

    @outside_graphs
    def act(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.state.num_source or self.state.features is None:
            return
        rows = self.state.num_target + self.state.num_source
        if any(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows for leaf in tree_leaves(output)):
            raise TransferConfigError(
                f"{type(network).__name__} returns a tensor of {rows} rows, as many as target and source images "
                "together: it seems to still hold source images, which forward='joint' would let into your own code. "
                "Use forward='separate'."
            )


class _ExplainFailure(_Hook):
    """Explains an error in the network that source images may have caused, as a forward hook."""

    @outside_graphs
    def act(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.state.is_split_due and (error := sys.exception()):
            explain_joint(error, network, self.state.num_target, self.state.num_source)


class _RefuseAgain:
    """Refuses to run a layer again in a backward through source images, as a forward pre-hook.

    Args:
        state: of the pass.
        why: the end of the message.
    """

    def __init__(self, state: PassState, why: str) -> None:
        self.state, self.why = state, why

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse; the order of the conditions keeps the state out of the guards of compiled graphs."""
        if layer.training and is_run_again() and self.state.has_trained:
            raise TransferConfigError(
                f"A {type(layer).__name__} runs again in the backward pass (activation checkpointing), {self.why}"
            )


class SourcePass:
    """Runs source images through one module and keeps the features that its head would get.

    Args:
        source: decides how images run.
        module: the user's module.
        head: its head.
    """

    def __init__(self, source: SourceTask, module: nn.Module, head: Head) -> None:
        self.source = source
        self.head = head
        self.state = PassState()
        self._has_run = False  # whether images alone have gone through
        self._unmoved: set[nn.Module] = set()  # layers in training in a pass that moved no statistics
        self.entry = "" if callable(source.forward) else entry_of(module, head)
        self._handles: list[RemovableHandle] = []
        if source.forward == "joint":
            self._handles += self._joint_hooks(module)
        elif source.batchnorm == "protect":
            check_protectable(module)
            norms = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
            refuse = _RefuseAgain(self.state, UNPROTECTED)
            self._handles += [norm.register_forward_pre_hook(refuse) for norm in norms]
        self._handles.append(head.module.register_forward_pre_hook(_TakeAtHead(self.state), with_kwargs=True))
        forget_graphs(module)

    def _joint_hooks(self, module: nn.Module) -> list[RemovableHandle]:
        network = module.get_submodule(self.head.network_path)
        hook: _Hook = _RefuseLeak(self.state)
        if not _takes_images(network, module, self.head):
            others = beside(module, self.head)
            if has_forward(module) and not (len(others) == 1 and has_forward(others[0][1])):
                network = module
            else:
                network, hook = find_backbone(module, self.head)[1], _TakeAfterBackbone(self.state)
        last = network.register_forward_hook(hook)
        failed = network.register_forward_hook(_ExplainFailure(self.state), always_call=True)
        again = network.register_forward_pre_hook(_RefuseAgain(self.state, ALONE))
        return [network.register_forward_pre_hook(_AppendSource(self.state), with_kwargs=True), last, failed, again]

    def remove(self) -> None:
        """Take the hooks out of the user's module."""
        for handle in self._handles:
            handle.remove()

    def separate(self, module: nn.Module, images: Tensor) -> Tensor:
        """Return features of source images (batch, ...) from a separate pass.

        Raises:
            TransferConfigError: the module's forward does not reach the head.
        """
        forward = self.source.forward if callable(self.source.forward) else None
        images = as_taken(images, module)
        self.state.reset()
        self.state.is_idle, self.state.listening = False, True
        try:
            protects = self.source.batchnorm == "protect"
            may_move = {layer for layer in module.modules() if layer.training} if protects else set()
            is_due = torch.is_grad_enabled() and not may_move <= self._unmoved
            with protected_batchnorm(module, on=protects), refused_if_moved(module, on=is_due):
                output = forward(module, images) if forward else module.get_submodule(self.entry)(images)
            self._unmoved |= may_move if is_due else set()
            reached, is_cut = self.state.features is not None, self.state.is_cut
            ends_at_features = forward is not None or self.entry not in ("", self.head.network_path)
            features = self.state.features if reached or not ends_at_features else output
        except Exception as error:
            if forward is None and not self._has_run:
                explain(error, module, self.head, images)
            fix = "" if images.is_floating_point() else " Give the source dataset your transform, which makes floats."
            error.add_note(f"This happened in a separate pass of images, {images.dtype} {tuple(images.shape)}.{fix}")
            raise
        finally:
            self.state.reset()
        self._has_run = True
        self.state.has_trained |= torch.is_grad_enabled()
        if features is None:
            ran = "SourceTask.forward" if forward else f"{type(module).__name__}.forward"
            raise TransferConfigError(
                f"{ran}(images) neither reaches the head {self.head.path!r} nor returns features. Name the right head, "
                "or the part that takes images: SourceTask(forward=lambda module, images: module.backbone(images))."
            )
        _check_rows(features, len(images))
        if not reached:
            trainable = any(param.requires_grad for param in parameters_before(module, self.head.path))
            is_cut = trainable and not features.requires_grad
        if is_cut and torch.is_grad_enabled():
            raise TransferConfigError(
                "The source features have no gradient, so the source loss would train nothing before the head. "
                "If forward runs under no_grad, pass a function: SourceTask(forward=lambda module, images: ...)."
            )
        return self._checked(features)

    def arm(self, draw: Draw) -> None:
        """Append the images that `draw` returns to the next call of the network."""
        self.state.reset()
        self.state.is_idle, self.state.draw = False, draw

    def disarm(self) -> None:
        """Let every call pass until the next `arm`."""
        self.state.reset()

    def take(self) -> Tensor | None:
        """Return the source features of the joint pass since `arm`; None if no source image was drawn.

        Raises:
            TransferConfigError: source images went in but did not reach the head.
        """
        features, went_in = self.state.features, self.state.num_source
        if went_in and features is None:
            raise TransferConfigError(
                f"forward='joint' put source images into the network, but the head {self.head.path!r} did not run. "
                "Use forward='separate'."
            )
        return None if features is None else self._checked(features)

    @cached_property
    def _width(self) -> int:
        return in_width(self.head.module)

    def _checked(self, features: Tensor) -> Tensor:
        """Return features that the head can take; pictures of one pixel are flattened, as the user's code does."""
        if isinstance(self.head.module, nn.Linear) and features.shape[1:].numel() == features.shape[1] == self._width:
            features = features.flatten(1)
        is_picture = features.shape[2:].numel() > 1 and not is_pooling(self.head.module)
        if is_picture and isinstance(self.head.module, nn.Conv2d | nn.Sequential):
            raise TransferConfigError(
                f"The head {self.head.path!r} is a convolution over feature maps, {tuple(features.shape[1:])}, and "
                "returns a map. Expected one row for each image: name the part that includes the pooling, head='...', "
                "or pool before the head."
            )
        if self._width not in features.shape[1:]:
            raise TransferConfigError(
                f"Source features of shape {tuple(features.shape)} do not fit the head {self.head.path!r}, which takes "
                f"{self._width} features. Use forward='separate', or SourceTask(forward=lambda module, images: "
                "features)."
            )
        return features


def _takes_images(network: nn.Module, module: nn.Module, head: Head) -> bool:
    """Return whether the child that holds the head can be called, and has convolutions if any child has."""
    has_convolutions = [any(isinstance(layer, nn.Conv2d) for layer in each.modules()) for each in (network, module)]
    return network is not head.module and has_forward(network) and has_convolutions[0] == has_convolutions[1]


def _check_rows(features: Any, rows: int) -> None:
    if not isinstance(features, Tensor) or len(features) != rows:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TransferConfigError(
            f"Before the head, {rows} images have become {found}; expected one row for each image. Pass the part that "
            "takes images: SourceTask(forward=lambda module, images: ...)."
        )
