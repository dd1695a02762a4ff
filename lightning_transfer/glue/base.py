"""The life cycle that every callback of this package shares, under `lightning` and `pytorch_lightning` alike."""

import importlib
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import checkpoints, optimizers
from lightning_transfer.glue.dispatcher import StepDispatcher
from lightning_transfer.glue.source_term import SourceTerm
from lightning_transfer.glue.trainer import check_supported, say


def _callback_classes() -> tuple[type, ...]:
    """The Callback class of every installed namespace."""
    found: list[type] = []
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        package = name.partition(".")[0]
        log, level = rank_zero.log, logging.getLogger(package).level
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
        if len(found) > 1:  # the second namespace has taken over where the first one logs, and with what level
            rank_zero.log = log
            logging.getLogger(package).setLevel(level or logging.INFO)
    return tuple(found)


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _AnyCallback
else:

    class _AnyCallback(*_callback_classes()):
        """A Callback of every namespace: each Trainer, and each command line, takes only its own."""


# these copy the module in their own setup and then pair parameters by order, so our parts must be there before
COPYING_CALLBACKS = {"WeightAveraging", "StochasticWeightAveraging"}


class TransferCallback(_AnyCallback):
    """A part that joins the user's module for the length of a fit and leaves it as it was found; abstract.

    The part is attached in `setup`, before optimizers and DDP exist, or, where the network is built only later, right
    behind `configure_model`. A run's part is its own: a Trainer that starts at step 0 gets a fresh one.
    """

    part: SourceTerm | None = None
    _restored: dict[str, Any] | None = None

    @abstractmethod
    def make_part(self, module: Any) -> SourceTerm:
        """What this callback adds to a user's module."""

    @property
    def part_name(self) -> str:
        """The name under which the part sits in the user's module."""
        return f"{checkpoints.KEY}_{type(self).__name__}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach, when the stage is fit."""
        if stage != "fit":
            return
        check_supported(trainer)
        if not pl_module.automatic_optimization:
            raise TransferConfigError(
                f"{type(pl_module).__name__} optimizes by hand, so {type(self).__name__} cannot add to its loss. Use "
                "lightning_transfer.SourceTaskMixin and call self.joint_loss(loss) in front of manual_backward."
            )
        try:
            self._attach(trainer, pl_module)
        except TransferConfigError:
            if not _is_built_later(pl_module):
                raise
            self._check_before_copies(trainer, late=True)
            _once_after_configure_model(pl_module, lambda: self._attach(trainer, pl_module))

    def _attach(self, trainer: Any, module: Any) -> None:
        self._check_before_copies(trainer, late=False)
        if self.part is None or trainer.global_step == 0:
            self.part = self.make_part(module)
            self._restored = None
        say(trainer, f"{type(self).__name__}: the source task joins at head {self.part.head_path!r}.")
        setattr(module, self.part_name, checkpoints.TrainingOnly(type(self).__name__, self.part))
        self.part.attach(module)
        StepDispatcher.add(module, self.part_name, self.part)

    def _check_before_copies(self, trainer: Any, *, late: bool) -> None:
        callbacks = trainer.callbacks
        earlier = callbacks if late else callbacks[: callbacks.index(self)]
        copying = [cb for cb in earlier if COPYING_CALLBACKS & {cls.__name__ for cls in type(cb).__mro__}]
        if copying:
            advice = "Build the network in __init__" if late else f"Put {type(self).__name__} first in callbacks"
            raise TransferConfigError(
                f"{type(copying[0]).__name__} copies the module before {type(self).__name__} has joined it. {advice}."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the part's parameters into the user's optimizer, before its state is restored."""
        assert self.part is not None  # attached in setup or configure_model
        added = optimizers.join(trainer, self.part_name, self.part)
        if added:
            say(trainer, f"{type(self).__name__}: {len(added)} parameters join the optimizer's first group.")
        self.part.check_effect(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what only now is known: how long training takes."""
        assert self.part is not None
        self.part.check_length(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was found."""
        self._detach(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same after a crash or Ctrl-C, when Lightning calls no teardown."""
        self._detach(pl_module)

    def _detach(self, module: Any) -> None:
        StepDispatcher.remove(module, self.part_name)
        if self.part is not None:
            self.part.detach()
        if hasattr(module, self.part_name):
            delattr(module, self.part_name)

    def state_dict(self) -> dict[str, Any]:
        """The part's weights and its place in the stream of source images."""
        if self.part is None:
            return self._restored or {}
        return {checkpoints.KEY: checkpoints.stamp(), "part": dict(self.part.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        if not state_dict:
            return
        checkpoints.check_stamp(state_dict[checkpoints.KEY])
        self._restored = state_dict
        if self.part is not None:
            self.part.load_state_dict(state_dict["part"])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep our parameters out of the optimizer's state, which a run without us would refuse."""
        checkpoints.hide_optimizer_states(trainer.optimizers, checkpoint)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put them back."""
        owners = {type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, TransferCallback)}
        checkpoints.unhide_optimizer_states(owners, checkpoint)


def _is_built_later(module: Any) -> bool:
    """Whether the module's author wrote a hook that may build the network after `setup` of the callbacks."""
    theirs = [
        cls
        for cls in type(module).__mro__
        if cls.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
    ]
    return any(hook in vars(cls) for cls in theirs for hook in ("setup", "configure_model"))


def _once_after_configure_model(module: Any, then: Callable[[], None]) -> None:
    """Run `then` behind the module's own configure_model, which Lightning calls last before devices and optimizers."""
    own = module.configure_model

    def configure_model() -> None:  # a plain function: Lightning asks its __code__ whether the hook is overridden
        del module.configure_model
        own()
        then()

    module.configure_model = configure_model
