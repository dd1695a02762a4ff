"""Record the inputs and outputs of layers when images run through the user's network outside of training."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_transfer.explaining import explain
from lightning_transfer.glue.entering import Entry, first_layer
from lightning_transfer.glue.moving import as_in_steps
from lightning_transfer.networks import entry_of
from lightning_transfer.roles import Head

Calls = list[tuple[Tensor, Tensor]]  # a layer's input and output, each time it ran


class Hearing:
    """Runs images through a user's module in eval mode, without gradients and in the Trainer's precision.

    Args:
        trainer: the Trainer that runs the module.
        module: the user's module.
        head: its head.
        forward: runs images, if the module's own forward takes more than images: it either reaches the head or returns
            the features.
        how: the fix to show if images alone do not run, with a place for the call.

    Raises:
        TransferConfigError: no layer is found that takes the images.
    """

    def __init__(
        self, trainer: Any, module: Any, head: Head, *, forward: Callable[[Any, Tensor], Any] | None, how: str
    ) -> None:
        self.trainer, self.module, self.head, self.forward, self.how = trainer, module, head, forward, how
        self.path = entry_of(module, head) if forward is None else ""
        # whether the network that takes the images does not include the head
        self.is_apart = self.path not in ("", head.network_path)
        self.entry: Entry | None = None  # of the first images
        self.first = first_layer(module, head)

    def hear(self, images: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Calls], Any]:
        """Return the inputs and outputs of each layer when images run, and what comes out in the end, all detached.

        Args:
            images: (B, ...), on the device.
            layers: inside the head, or the head itself.
        """
        heard: dict[nn.Module, Calls] = {layer: [] for layer in layers}

        def note(layer: nn.Module, args: Any, kwargs: Any, given: Tensor) -> None:
            heard[layer].append((args[0] if args else next(iter(kwargs.values())), given))

        def enter(layer: nn.Module, args: Any) -> None:
            if self.entry is None and args and isinstance(args[0], Tensor):
                self.entry = Entry.of(images, args[0])

        try:
            with ExitStack() as hooks, as_in_steps(self.trainer, self.module):
                hooks.enter_context(torch.compiler.set_stance("force_eager"))  # earlier graphs do not run new hooks
                for layer in layers:
                    hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
                for layer in self.first:
                    hooks.enter_context(layer.register_forward_pre_hook(enter))
                output = self._run(images, lambda: any(heard.values()))
        except Exception as error:
            if self.forward is None:
                explain(error, self.module, self.head, images, how=self.how)
            raise
        # the user's forward may enable gradients
        calls = [[(taken.detach(), given.detach()) for taken, given in each] for each in heard.values()]
        return calls, tree_map_only(Tensor, Tensor.detach, output)

    def _run(self, images: Tensor, is_reached: Callable[[], bool]) -> Any:
        if self.forward is None:
            output = self.module.get_submodule(self.path)(images)
        else:
            output = self.forward(self.module, images)
        if self.is_apart or (self.forward is not None and not is_reached()):
            return self.head.module(output)
        return output
