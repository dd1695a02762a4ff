"""What a callback attaches to somebody's module for the length of a fit."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import EXTRA, check_options
from lightning_transfer.glue.trainer import Weakly
from lightning_transfer.pending import PendingChecks


class TransferPart(nn.Module, ABC):
    """A method's own modules, and the term they add to the loss; abstract."""

    title = "The method"  # in messages
    is_transfer_part = True  # `roles` looks for the user's modules only
    options: Mapping[str, str] = MappingProxyType({})  # that decide what the run computes

    def __init__(self) -> None:
        super().__init__()
        self.run = self.of_module = Weakly()  # the Trainer whose fit it is in, and what is fitted
        self.pending = PendingChecks()
        self.register_load_state_dict_pre_hook(_check_same_keys)  # type: ignore[no-untyped-call]

    def join(self, trainer: Any, module: Any) -> None:
        """Belong to a Trainer's fit of a module from here on; whatever else runs the module, the fit is this one's."""
        if not self.is_of(trainer, module):
            self.run, self.of_module = Weakly(trainer), Weakly(module)
            self.pending.clear()

    def is_of(self, trainer: Any, module: Any) -> bool:
        """Whether it joined this Trainer's fit of this module."""
        return self.run.is_of(trainer) and self.of_module.is_of(module)

    @property
    def trainer(self) -> Any:
        """The Trainer whose fit it joined, which `module.trainer` is not after another one has run the module.

        Raises:
            TransferConfigError: it has joined none.
        """
        trainer = self.run.get()
        if trainer is None:
            raise TransferConfigError(f"{self.title} has joined no Trainer. Run it in Trainer.fit.")
        return trainer

    @property
    @abstractmethod
    def introduction(self) -> str:
        """One line for the log: what was found and what is done with it."""

    @abstractmethod
    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """The user's parameters whose learning rate new ones share: this part's, or those of one that `added` names."""

    @abstractmethod
    def attach(self, module: Any) -> None:
        """Reach into the user's module, when its network and optimizers exist."""

    @abstractmethod
    def detach(self) -> None:
        """Let go of the user's module and of every resource."""

    @abstractmethod
    def check(self, trainer: Any) -> None:
        """Raise or warn, at the start of training, on what cannot be right."""

    def added(self, module: Any) -> dict[str, nn.Module]:
        """New modules that stay in the network, by name: none by default. Their parameters join an optimizer too."""
        return {}

    def renamed(self, module: Any) -> dict[str, str]:
        """Modules of the user's that have another name in changed layers, and their old names; none by default."""
        return {}

    def own_group(self, module: Any) -> tuple[list[nn.Parameter], float] | None:
        """New parameters that have a learning rate of their own, and that rate; none by default."""
        return None

    def before_optimizer_step(self, module: Any) -> None:
        """Called when gradients are ready and nothing has been done with them; does nothing by default."""

    def settle(self, *_: Any) -> None:
        """Read the pending checks of all processes: before a checkpoint is written, and when training ends.

        Raises:
            FloatingPointError: a check failed in another process, whose gradients this one has got.
        """
        trainer = self.run.get()
        if trainer is None or trainer.strategy.root_device.type in self.pending.free:
            return
        error = self.pending.find()
        is_right: bool = trainer.strategy.reduce_boolean_decision(error is None, all=True)
        if error is None and not is_right:
            error = FloatingPointError(f"{self.title}: a check failed in another process, whose error names the batch.")
        if error is not None:
            raise error

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights: the options it has to be given again."""
        return {"options": dict(self.options)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other options.

        Raises:
            TransferConfigError: listing the differences.
        """
        check_options(self.title, state["options"], dict(self.options))

    @abstractmethod
    def begin(self, module: Any, batch: Any) -> None:
        """Called before every step, with its batch."""

    def stepped(self, loss: Tensor | None) -> None:
        """Called after the user's step, with its own loss, or None; does nothing by default."""

    @abstractmethod
    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """The loss with this part's term in it."""

    @abstractmethod
    def end(self) -> None:
        """Called after every step, also one that failed or returned None."""


def _check_same_keys(part: TransferPart, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Name the options that differ if a state has other keys than a part, such as those of another loss's buffers."""
    saved = state.get(f"{prefix}{EXTRA}")
    theirs = {key for key in state if key.startswith(prefix)}
    if isinstance(saved, dict) and theirs != {f"{prefix}{key}" for key in part.state_dict()}:
        check_options(part.title, saved["options"], part.get_extra_state()["options"])
