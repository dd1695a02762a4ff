"""Define what a callback attaches to the user's module during a fit."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import EXTRA, check_options
from lightning_transfer.glue.logs import is_log_due, log
from lightning_transfer.glue.trainer import Weakly, named
from lightning_transfer.pending import PendingChecks, when
from lightning_transfer.surgery import Structure


class TransferPart(nn.Module, ABC):
    """Holds a method's own modules and adds a term to the loss; abstract.

    A part is made in `setup`, before a checkpoint is loaded, and is a child of the user's module during the fit: its
    parameters and buffers move with the module. Its `state_dict` is kept in the callback's state, not in the network's.
    An optimizer gets its parameters. So what is only remembered, such as pretrained weights, belongs in buffers, and
    modules of the user in a tuple, which does not register them.

    Only `introduction` and `add_to` have to be written. The order of the calls:

    - in each fit `join` in setup, `attach` when the optimizers are made, `check` when training starts, `settle` before
      a checkpoint and when training ends, and `detach`, also after a crash;
    - in each step `begin`, the user's step, `stepped`, `add_to`, `end`, and later `before_optimizer_step`.

    Attributes:
        title: of the method, in messages.
        options: what decides what the run computes; a run that resumes with others is refused.
    """

    title = "The method"  # in messages
    is_transfer_part = True  # `roles` looks for the user's modules only
    options: Mapping[str, str] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.run = self.of_module = Weakly()  # the Trainer whose fit it is in, and the module of that fit
        self.pending = PendingChecks()
        self.register_load_state_dict_pre_hook(_check_same_keys)  # type: ignore[no-untyped-call]

    def join(self, trainer: Any, module: Any) -> None:
        """Join a Trainer's fit of a module; other Trainers that run the module do not change that."""
        if not self.is_of(trainer, module):
            parts = (part for part in module.modules() if isinstance(part, TransferPart))
            shared = (part.pending for part in parts if part.is_of(trainer, module))
            self.pending = next(shared, PendingChecks(self.pending.free))  # the first of all that fail is the cause
            self.run, self.of_module = Weakly(trainer), Weakly(module)

    def is_of(self, trainer: Any, module: Any) -> bool:
        """Return whether it joined this Trainer's fit of this module."""
        return self.run.is_of(trainer) and self.of_module.is_of(module)

    @property
    def trainer(self) -> Any:
        """Return the Trainer whose fit it joined; `module.trainer` may be another one that ran the module later.

        Raises:
            TransferConfigError: it has not joined a fit.
        """
        trainer = self.run.get()
        if trainer is None:
            raise TransferConfigError(f"{self.title} is not in a Trainer's fit. Run it in Trainer.fit.")
        return trainer

    @property
    def num_joint(self) -> int:
        """Return how many source images it has appended to the images of this step; 0 by default."""
        return 0

    @property
    def num_source(self) -> int:
        """Return how many source images other parts have appended to this step's own; to be asked in `stepped`."""
        children = [getattr(child, "part", child) for child in self.of_module.get().children()]
        return sum(part.num_joint for part in children if isinstance(part, TransferPart))

    @property
    @abstractmethod
    def introduction(self) -> str:
        """Return one line for the log: what was found and what is done with it."""

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the user's parameters whose learning rate new ones share; `name` is the part's, or one of `added`."""
        return ()

    def attach(self, module: Any) -> None:
        """Attach to the user's module, after its network and optimizers are made; does nothing by default."""

    def detach(self) -> None:
        """Remove everything from the user's module and free all resources; does nothing by default."""

    def check(self, trainer: Any) -> None:
        """Raise or warn, at the start of training, if something cannot be right; does nothing by default."""

    def added(self, module: Any) -> dict[str, nn.Module]:
        """Return new modules that stay in the network, by name; none by default. An optimizer gets their parameters."""
        return {}

    def renamed(self, module: Any) -> dict[str, str]:
        """Return the user's modules that have another name in changed layers, and their old names; none by default."""
        return {}

    def before_optimizer_step(self, module: Any) -> None:
        """Called when gradients are computed and not yet used; does nothing by default."""

    def settle(self, *_: Any) -> None:
        """Read the pending checks of all processes: before a checkpoint is written, and when training ends.

        Raises:
            FloatingPointError: a check failed in another process, whose gradients are part of the sum.
        """
        trainer = self.run.get()
        if trainer is None or trainer.strategy.root_device.type in self.pending.free:
            return
        error = self.pending.find()
        is_right: bool = trainer.strategy.reduce_boolean_decision(error is None, all=True)
        if error is None and not is_right:
            error = FloatingPointError("A check failed in another process, whose error names the batch.")
        if error is not None:
            raise error

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides weights: the options, which have to be the same."""
        return {"options": dict(self.options)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse to resume with other options.

        Raises:
            TransferConfigError: the options differ; the message lists the differences.
        """
        check_options(self.title, state["options"], dict(self.options))

    def begin(self, module: Any, batch: Any) -> None:
        """Called before every step, with its batch; does nothing by default."""

    def stepped(self, loss: Tensor | None) -> None:
        """Called after the user's step, with its own loss, or None; does nothing by default."""

    @abstractmethod
    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss with this part's term added."""

    def end(self) -> None:
        """Called after every step, also one that failed or returned None; does nothing by default."""

    def refuse_not_finite(self, name: str, loss: Tensor) -> None:
        """Raise if a loss of this step is not finite: at once, or on a GPU when the pending checks are read.

        Raises:
            FloatingPointError: the message has the name, the value and the step.
        """
        step = self.trainer.global_step

        def error(found: Tensor) -> FloatingPointError:
            later = when(step, self.trainer.global_step)
            return FloatingPointError(f"The {name} is {found.item()} in step {step}. {later}")

        self.pending.refuse(~torch.isfinite(loss), error, loss.detach)

    def log(self, values: dict[str, Tensor]) -> None:
        """Log values in a step that logs, after the pending checks; to be called once a step, with all values."""
        if is_log_due(self.trainer):
            self.pending.read()
            log(self.trainer, values)


def check_pruned(trainer: Any, module: nn.Module) -> None:
    """Refuse Lightning's ModelPruning if it would prune layers that this package added.

    Raises:
        TransferConfigError: the message says how to name the layers to prune.
    """
    ours: set[nn.Module] = set()
    for part in module.modules():
        ours.update(part.modules() if isinstance(part, TransferPart) else [part] if isinstance(part, Structure) else [])
    for callback in trainer.callbacks:  # private: there is no other way
        if named([callback], {"ModelPruning"}) and any(layer in ours for layer, _ in callback._parameters_to_prune):
            raise TransferConfigError(
                f"{type(callback).__name__} lists layers that lightning_transfer has put into {type(module).__name__}. "
                "Name those to prune: parameters_to_prune=[(module.model.conv1, 'weight'), ...]."
            )


def _check_same_keys(part: TransferPart, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Name the options that differ if a state's keys do not fit the part, such as the buffers of another loss."""
    saved = state.get(f"{prefix}{EXTRA}")
    theirs = {key for key in state if key.startswith(prefix)}
    if isinstance(saved, dict) and theirs != {f"{prefix}{key}" for key in part.state_dict()}:
        check_options(part.title, saved["options"], part.get_extra_state()["options"])
