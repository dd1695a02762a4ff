"""Add loss terms to the user's training step, and remove them without side effects."""

import copy
import functools
from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

from torch import Tensor

from lightning_transfer.glue.standin import StandIn

STEP = "training_step"


class LossTerm(Protocol):
    """Something that adds to the loss of every training step."""

    def begin(self, module: Any, batch: Any) -> None:
        """Called before every step, with its batch."""

    def stepped(self, loss: Tensor | None) -> None:
        """Called after the user's step with its own loss, before any term is added; None if the step has no loss."""

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss with this term added."""

    def end(self) -> None:
        """Called after every step, also one that failed or returned None."""


class StepDispatcher(StandIn):
    """Stands in for `module.training_step` and adds named terms to the loss it returns.

    One object serves all terms, because callbacks that each wrap the step could not be removed in any order. Lightning
    reads the step's signature, so it is kept.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        super().__init__(module, STEP, trainer)
        self.terms: dict[str, LossTerm] = {}
        functools.update_wrapper(self, self.hook, updated=())

    @classmethod
    def add(cls, module: Any, name: str, term: LossTerm, trainer: Any) -> "StepDispatcher":
        """Add a term to the module's step, or replace one of the same name, and return the object that holds it."""
        top = vars(module).get(STEP)
        is_there = isinstance(top, cls) and not top.is_removed and top.run.is_of(trainer)
        dispatcher: StepDispatcher = top if is_there else cls(module, trainer)
        dispatcher.terms[name] = term
        return dispatcher

    def discard(self, name: str) -> None:
        """Remove a term; after the last one the module's step is as it was found."""
        self.terms.pop(name, None)
        if not self.terms:
            self.remove()

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and add every term; a step without a loss is a skipped batch and stays one."""
        if not self.run.get().training:  # a validation_step may call the step too
            return self.hook(*args, **kwargs)
        try:
            for term in self.terms.values():
                term.begin(self.module, args[0] if args else kwargs.get("batch"))
            output = self.hook(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            for term in self.terms.values():
                term.stepped(loss)
            if loss is None:
                return output
            for term in self.terms.values():
                loss = term.add_to(self.module, loss)
        finally:
            for term in self.terms.values():
                term.end()
        if isinstance(output, Mapping):
            output = copy.copy(output) if isinstance(output, MutableMapping) else dict(output)
            output["loss"] = loss
            return output
        return loss
