"""Loss terms added to somebody else's training step, and taken out again without a trace."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

STEP = "training_step"


class LossTerm(Protocol):
    """Something that adds to the loss of every training step."""

    def begin(self, module: nn.Module) -> None:
        """Called in front of the user's step."""

    def add_to(self, module: nn.Module, loss: Tensor) -> Tensor:
        """The loss with this term in it."""


class StepDispatcher:
    """Stands in for `module.training_step` and adds named terms to the loss it returns.

    One object serves all terms, because callbacks that each wrap the step cannot be taken out in any order. Lightning
    reads the step's signature, so it is kept. A copy of the module, pickled or deep, gets the user's own step back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = vars(module).get(STEP)  # a compiled module already owns a step on the instance
        self.step: Callable[..., Any] = getattr(module, STEP)
        self.terms: dict[str, LossTerm] = {}
        functools.update_wrapper(self, self.step, updated=())

    @classmethod
    def add(cls, module: nn.Module, name: str, term: LossTerm) -> None:
        """Add a term to the module's step, in place of one of the same name."""
        dispatcher = vars(module).get(STEP)
        if not isinstance(dispatcher, cls):
            dispatcher = cls(module)
            setattr(module, STEP, dispatcher)
        dispatcher.terms[name] = term

    @classmethod
    def remove(cls, module: nn.Module, name: str) -> None:
        """Take a term out; with the last one the module's step is as it was found."""
        dispatcher = vars(module).get(STEP)
        if not isinstance(dispatcher, cls):
            return
        dispatcher.terms.pop(name, None)
        if not dispatcher.terms:
            delattr(module, STEP)
            if dispatcher.own is not None:
                setattr(module, STEP, dispatcher.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step with every term added; a step that returns None is a skipped batch and stays one."""
        for term in self.terms.values():
            term.begin(self.module)
        output = self.step(*args, **kwargs)
        if output is None:
            return None
        loss = output["loss"] if isinstance(output, dict) else output
        for term in self.terms.values():
            loss = term.add_to(self.module, loss)
        if isinstance(output, dict):
            output = copy.copy(output)
            output["loss"] = loss
            return output
        return loss

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return (_itself, (self.step,))


def _itself(step: Any) -> Any:
    return step
