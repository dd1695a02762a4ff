"""Find out which Trainer fits a module that has parts as a mixin."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import changed_hyperparameters
from lightning_transfer.glue.logs import log_options
from lightning_transfer.glue.part import TransferPart, check_pruned
from lightning_transfer.glue.trainer import Weakly, is_run_by, is_running
from lightning_transfer.naming import options_of, plain

Part = TypeVar("Part", bound=TransferPart)
Taken = ParamSpec("Taken")
Made = TypeVar("Made")
Result = TypeVar("Result")


def takes_options_of(
    make: Callable[Taken, Made],
) -> Callable[[Callable[[Any, Made], Result]], Callable[Concatenate[Any, Taken], Result]]:
    """Make a mixin's method take the options of a class: it gets the object made of them, and the loggers get them."""

    def take(add: Callable[[Any, Made], Result]) -> Callable[Concatenate[Any, Taken], Result]:
        this, _ = inspect.signature(add).parameters.values()
        mixin = add.__qualname__.partition(".")[0]

        @functools.wraps(add)
        def adding(self: Any, /, *args: Taken.args, **kwargs: Taken.kwargs) -> Result:
            made = make(*args, **kwargs)
            result = add(self, made)
            self._options = {**self._options, **plain({f"transfer/{mixin}": options_of(made)})}
            return result

        parameters = [this, *inspect.signature(make).parameters.values()]
        adding.__signature__ = inspect.signature(add).replace(parameters=parameters)  # type: ignore[attr-defined]
        return adding

    return take


_LightningModule: Any = object  # the base that follows in the user's class, of either namespace


class PartMixin(_LightningModule):  # type: ignore[misc]
    """Remembers the Trainer of a fit, even if another one runs the module in the middle of it; for the mixins.

    No hook of Lightning is called early enough: one of the user's callbacks may validate the module in another Trainer
    before the module's first hook. A Trainer is attached before all hooks.
    """

    _fit = Weakly()
    _options: Mapping[str, Any] = MappingProxyType({})  # of the parts, by their names in the loggers

    @property
    def trainer(self) -> Any:
        """Return the last Trainer that ran the module, as in Lightning."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        if trainer is not None and trainer.state.fn == "fit" and is_running(trainer):
            mine = self._fit.get()
            if mine is not None and mine is not trainer and is_running(mine):
                raise TransferConfigError(
                    f"{type(self).__name__} is in the middle of another Trainer's fit. Fit a copy of it, "
                    "copy.deepcopy(module)."
                )
            self._fit = Weakly(trainer)
        super(PartMixin, type(self)).trainer.fset(self, trainer)

    @property
    def _fitting(self) -> Any:
        """Return the Trainer of the module's fit; the last Trainer if there was no fit."""
        mine = self._fit.get()
        return self.trainer if mine is None else mine

    @property
    def _running(self) -> Any:
        """Return the Trainer of the module's fit while it runs, otherwise the last Trainer."""
        trainer = self._fitting
        return trainer if is_running(trainer) else self.trainer

    def on_fit_start(self) -> None:
        """Pass the options of this module's parts to the loggers."""
        check_pruned(self._fitting, self)
        if saved := changed_hyperparameters(self):
            warnings.warn(
                f"save_hyperparameters puts {saved}, whose layers are already changed, into every checkpoint: "
                f"{type(self).__name__} cannot be made from it again. Write self.save_hyperparameters(ignore={saved}).",
                stacklevel=2,
            )
        if self._options:
            log_options(self._fitting, dict(self._options))
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the pending checks before the checkpoint is written."""
        self._settle()
        super().on_save_checkpoint(checkpoint)

    def on_train_end(self) -> None:
        """Read the pending checks of the last steps."""
        self._settle()
        super().on_train_end()

    def _settle(self) -> None:
        for part in self.modules():
            if isinstance(part, TransferPart):
                part.settle()

    def _is_training(self) -> bool:
        """Return whether this is a step of the fit: not of its validation, and not of another Trainer's run."""
        trainer = self._fitting
        return bool(trainer.training and is_run_by(trainer, self))

    def _is_lent(self) -> bool:
        """Return whether another Trainer runs the module in the middle of the fit."""
        return not is_run_by(self._running, self)

    def _added(self, name: str, what: str, *, by: str) -> Any:
        """Return what was added in `__init__`, or raise an error with the call to write."""
        if not hasattr(self, name):
            raise TransferConfigError(
                f"{type(self).__name__} has no {what}. In __init__, after the network is built, call self.{by}."
            )
        return getattr(self, name)

    def _joined(self, part: Part) -> Part:
        """Return a part that has joined the fit."""
        part.join(self._fitting, self)
        return part
