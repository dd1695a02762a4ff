"""Run one training step of a copy of the user's module, and record what its criterion gets and what its loss does."""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_transfer.criteria import CriterionCall, Listening
from lightning_transfer.glue.namespaces import AnyCallback
from lightning_transfer.glue.trials import callbacks_of, fit_alone
from lightning_transfer.methods.statistics.callback import FrozenStatistics
from lightning_transfer.pixel_ranges import PixelRange
from lightning_transfer.twins import RunsOriginalError, copied, only_copies_run

REPEATS = 16  # of the batches, if the module decides by their number when it steps
EPOCHS = 100  # of a Trainer that does not say how long it trains: schedules have room


class Entered(NamedTuple):
    """Holds what entered a pretrained timm network in its first call.

    Attributes:
        kind: its class.
        mean: of the pixels of its pretraining, by channel.
        std: their standard deviation.
        pixels: of the images.
    """

    kind: str
    mean: Sequence[float]
    std: Sequence[float]
    pixels: PixelRange


@dataclass
class Seen:
    """Holds what one step showed.

    Attributes:
        calls: of criteria.
        losses: of the batches.
        callbacks: of the Trainer, and those that the module brings.
        skipped: batches of which training_step returned None, without optimizing by hand.
        step_error: that training_step raised.
        error: that anything raised.
        untrained: names of parameters that get a gradient and are in no optimizer.
        drifting: names of BatchNorm layers whose statistics move and whose weights do not.
        evaluating: names of layers that are in eval mode, act otherwise there, and are trained; without BatchNorm if
            FrozenStatistics keeps it there.
        normalizing: names of BatchNorm layers whose statistics move.
        entered: what entered each pretrained timm network, by its path.
        is_compared: whether the module was looked at before an optimizer's step.
        has_stepped: whether the optimizer of the copy has taken its step.
        loss_after: of the first batch after that; None if it was not taken.
    """

    calls: list[CriterionCall] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    callbacks: list[Any] = field(default_factory=list)
    skipped: int = 0
    step_error: Exception | None = None
    error: Exception | None = None
    untrained: list[str] = field(default_factory=list)
    drifting: list[str] = field(default_factory=list)
    evaluating: list[str] = field(default_factory=list)
    normalizing: list[str] = field(default_factory=list)
    entered: dict[str, Entered] = field(default_factory=dict)
    is_compared: bool = False
    has_stepped: bool = False
    loss_after: float | None = None

    @property
    def fit_error(self) -> Exception | None:
        """Return what fit raised outside of training_step, without the refusal of a copy that runs the original."""
        is_other = self.step_error is not None or isinstance(self.error, RunsOriginalError)
        return None if is_other else self.error


class _Shown(Iterable[Any]):
    """Gives the batches of the step, and what hooks read of the user's loader."""

    def __init__(self, batches: Sequence[Any], loader: Any) -> None:
        self.batches = batches
        self.dataset, self.batch_size = (getattr(loader, name, None) for name in ("dataset", "batch_size"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _StepDoneError(Exception):
    """Ends the fit."""


class _Watch(AnyCallback):
    """Looks at the module before its first step, and when its gradients are there."""

    def __init__(self, seen: Seen, keeps_statistics: bool) -> None:
        self.seen, self.keeps_statistics = seen, keeps_statistics
        self.before: dict[str, Tensor] = {}
        self.required: set[int] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen to what enters pretrained timm networks."""
        for path, network in pl_module.named_modules():
            config = getattr(network, "pretrained_cfg", None) or {}
            if {"mean", "std"} <= {*config} and _is_pretrained(network):
                network.register_forward_pre_hook(functools.partial(self._hear, path, config))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the statistics, and what is trained before `toggle_optimizer` hides a part of it."""
        self.before = self.before or {name: layer.running_mean.clone() for name, layer in _tracking(pl_module)}
        self.required = self.required or {id(param) for param in pl_module.parameters() if param.requires_grad}

    def _hear(self, path: str, config: Mapping[str, Any], network: nn.Module, args: Any) -> None:
        is_first = path not in self.seen.entered and args and isinstance(args[0], Tensor)
        if is_first and args[0].ndim == 4 and args[0].shape[1] == len(config["mean"]):
            pixels = PixelRange.of(args[0])
            self.seen.entered[path] = Entered(type(network).__name__, config["mean"], config["std"], pixels)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Compare, and end."""
        groups = (group for each in trainer.optimizers for group in each.param_groups)
        held = {id(param) for group in groups for param in group["params"]}
        trained = self.required & held
        self.seen.untrained = [
            name for name, param in pl_module.named_parameters() if param.grad is not None and id(param) not in held
        ]
        moved = [pair for pair in _tracking(pl_module) if not torch.equal(pair[1].running_mean, self.before[pair[0]])]
        self.seen.normalizing = [name for name, _ in moved]
        self.seen.drifting = [
            name for name, layer in moved if (own := {id(param) for param in layer.parameters()}) and not own & trained
        ]
        self.seen.evaluating = list(_evaluating(pl_module, trained, self.keeps_statistics))
        self.seen.is_compared = True
        own = {id(param) for param in pl_module.parameters()}
        if not pl_module.automatic_optimization or not held <= own:  # an optimizer may hold what is not of the copy
            raise _StepDoneError
        self.seen.has_stepped = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End without a step: hooks of the module that come next may need a validation."""
        raise _StepDoneError


def _tracking(module: nn.Module) -> list[tuple[str, Any]]:
    named = module.named_modules()
    return [(name, layer) for name, layer in named if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def _is_pretrained(network: nn.Module) -> bool:
    """Return whether the weights of a network's normalisation layers vary, as those of a new network do not.

    A network without such layers counts as new.
    """
    kinds = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
    weights = [layer.weight for layer in network.modules() if isinstance(layer, kinds) and layer.weight is not None]
    return any(bool((weight != weight.flatten()[0]).any()) for weight in weights)


def _evaluating(module: nn.Module, trained: set[int], keeps_statistics: bool) -> Iterator[str]:
    """Yield the layers in eval mode that act otherwise in it, if their weights, or those beside them, are trained."""
    for path, layer in module.named_modules():
        owner = layer if next(layer.parameters(), None) is not None else module.get_submodule(path.rpartition(".")[0])
        is_trained = any(id(param) in trained for param in owner.parameters())
        is_kept = keeps_statistics and isinstance(layer, _BatchNorm)
        if not layer.training and is_trained and not is_kept and _acts_otherwise(layer):
            yield path


def _acts_otherwise(layer: Any) -> bool:
    """Return whether a layer, without its parts, acts otherwise in eval mode."""
    if isinstance(layer, _BatchNorm):
        return True
    return bool(layer.p) if isinstance(layer, _DropoutNd) else bool(getattr(layer, "drop_prob", 0))


def step_of(
    module: Any,
    batches: Sequence[Any],
    *,
    make: type,
    options: Mapping[str, Any],
    callbacks: Sequence[Any],
    loader: Any,
    datamodule: Any,
    epochs: int | None,
) -> Seen:
    """Return what the first optimizer step of a copy of the module shows, and the loss after it.

    Of the callbacks, only FrozenStatistics takes part.

    Args:
        module: the user's.
        batches: of the step, as the loader collates them.
        make: Lightning's Trainer.
        options: of it.
        callbacks: of the user's Trainer.
        loader: the user's.
        datamodule: whose hooks move batches; None where there is none.
        epochs: of the user's training; None if it is not known.
    """
    seen = Seen()
    twin = copied(module)
    seen.callbacks = [*callbacks, *callbacks_of(twin)]
    kept = [copy.deepcopy(each) for each in seen.callbacks if isinstance(each, FrozenStatistics)]
    twin.configure_callbacks = list
    twin.training_step = _watched(twin, seen)
    watching = [_Watch(seen, bool(kept)), *kept]
    given = {**options, "max_epochs": epochs or EPOCHS, "limit_train_batches": 1.0, "callbacks": watching}
    shown = [*batches]
    if twin.automatic_optimization:
        given["accumulate_grad_batches"] = len(batches)
        shown.append(batches[0])
    else:
        shown *= REPEATS
    try:
        with torch.compiler.set_stance("force_eager"), only_copies_run(module, twin):
            fit_alone(make, twin, _Shown(shown, loader), datamodule, given, seed=0)
    except _StepDoneError:
        pass
    except Exception as error:
        seen.error = error
    return seen


def _watched(module: Any, seen: Seen) -> Callable[..., Any]:
    """Return a training step that runs the module's own and records it; after the optimizer's step it ends the fit."""
    step = module.training_step

    @functools.wraps(step)  # Lightning reads its arguments
    def watched(*args: Any, **kwargs: Any) -> Any:
        if seen.has_stepped:
            seen.loss_after = _number(step(*args, **kwargs))
            raise _StepDoneError
        try:
            with Listening(seen.calls):
                given = step(*args, **kwargs)
        except (_StepDoneError, RunsOriginalError):  # a step by hand; what is not the user's mistake
            raise
        except Exception as error:
            seen.step_error = error
            raise
        seen.skipped += given is None and module.automatic_optimization
        seen.losses.append(_number(given))
        return given

    return watched


def _number(given: Any) -> float:
    """Return the loss that a step has given; NaN if there is none."""
    loss = given.get("loss") if isinstance(given, Mapping) else given
    return float(loss.detach()) if isinstance(loss, Tensor) else math.nan
