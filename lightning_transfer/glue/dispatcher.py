"""Add loss terms to the user's training step, and remove them without side effects."""

import copy
import functools
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch._dynamo.exc import Unsupported

from lightning_transfer.glue.part import TransferPart
from lightning_transfer.glue.standin import StandIn

STEP = "training_step"


class StepDispatcher(StandIn):
    """Stands in for `module.training_step` and adds the terms of named parts to the loss it returns.

    One object serves all parts, because callbacks that each wrap the step could not be removed in any order. Lightning
    reads the step's signature, so it is kept.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        super().__init__(module, STEP, trainer)
        self.parts: dict[str, TransferPart] = {}
        functools.update_wrapper(self, self.hook, updated=())

    @classmethod
    def add(cls, module: Any, name: str, part: TransferPart, trainer: Any) -> "StepDispatcher":
        """Add a part to the module's step, or replace one of the same name, and return the object that holds it."""
        top = vars(module).get(STEP)
        is_there = isinstance(top, cls) and not top.is_removed and top.run.is_of(trainer)
        dispatcher: StepDispatcher = top if is_there else cls(module, trainer)
        dispatcher.parts[name] = part
        return dispatcher

    def discard(self, name: str) -> None:
        """Remove a part; after the last one the module's step is as it was found."""
        self.parts.pop(name, None)
        if not self.parts:
            self.remove()

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and add each part's term; a step without a loss is a skipped batch and stays one."""
        if not self.run.get().training:  # a validation_step may call the step too
            return self.hook(*args, **kwargs)
        try:
            for part in self.parts.values():
                part.begin(self.module, args[0] if args else kwargs.get("batch"))
            output = self.hook(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            for part in self.parts.values():
                part.stepped(loss)
            if loss is None:
                return output
            for part in self.parts.values():
                loss = part.add_to(self.module, loss)
        except Unsupported as error:
            error.add_note("No graph can hold hooks of lightning_transfer. Compile the network without fullgraph=True.")
            raise
        finally:
            for part in self.parts.values():
                part.end()
        if isinstance(output, Mapping):
            output = copy.copy(output) if isinstance(output, MutableMapping) else dict(output)
            output["loss"] = loss
            return output
        return loss
