"""DELTA (Li et al., ICLR 2019, arXiv 1901.09229): fine-tuning that holds feature maps near the pretrained network's.

loss = the user's + alpha * mean over images (1/2 * sum over layers |maps - maps0|^2)

maps are those of the network that is tuned, and maps0 those of the pretrained one, of the same images. This is the
paper's form without attention: all channels count the same. Its second term, the squared weights of the new head, is an
optimizer's weight decay of the head. Ours: a mean over images where the authors' code has a sum, so that alpha does not
depend on the batch size. The authors' 0.01 times their batch of 64 is 0.64 here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer import TransferConfigError
from lightning_transfer.errors import check_number, nearest
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.surgery import as_buffers


def feature_distance(maps: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    """Return half the squared distance of feature maps, summed over layers: the mean over images.

    Args:
        maps: for each layer (B, ...) of the network that is tuned.
        kept: the same of the pretrained network.

    Example:
        >>> feature_distance([torch.ones(4, 2, 3, 3)], [torch.zeros(4, 2, 3, 3)])
        tensor(9.)
    """
    distances = [((tuned - old) ** 2).flatten(1).sum(1) for tuned, old in zip(maps, kept, strict=True)]
    return torch.stack(distances).sum(0).mean() / 2


class FeatureMaps(TransferPart):
    """One run's pretrained network. It is kept in checkpoints, because a resumed run begins with other weights."""

    title = "DELTA"

    def __init__(self, module: Any, *, weight: float, layers: Sequence[str]) -> None:
        super().__init__()
        known = dict(module.named_modules())
        if missing := [name for name in layers if name not in known]:
            raise TransferConfigError(f"layers={missing} are not in the module. {nearest(missing[0], known)}")
        self.weight, self.layers = weight, [*layers]
        self.network = layers[0].partition(".")[0]
        if {name.partition(".")[0] for name in layers} != {self.network}:
            raise TransferConfigError(f"layers={self.layers} are in several networks. Pass those of {self.network!r}.")
        self.pretrained = as_buffers(known[self.network]).eval() if weight else None
        self.options = {"weight": str(weight), "layers": ", ".join(layers)}
        self._handles: list[Any] = []
        self._heard: list[Any] = []  # what each layer, and last the network, took and gave in the step's own pass
        self._is_listening = False

    @property
    def introduction(self) -> str:
        """Return what is compared."""
        return f"holds the feature maps of {', '.join(self.layers)} near the pretrained network's."

    def train(self, mode: bool = True) -> "FeatureMaps":
        """Keep the pretrained network in eval mode, as the authors do."""
        return super().train(mode=False)

    def attach(self, module: Any) -> None:
        """Listen to the layers and the network."""
        self.detach()
        if self.weight:
            self._handles = self._listen(module.get_submodule(self.network), self._hear)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.end()

    def begin(self, module: Any, batch: Any) -> None:
        """Start listening."""
        self._is_listening = True

    def stepped(self, loss: Tensor | None) -> None:
        """Stop listening: later passes are of other methods, which may also have appended images to this one."""
        self._is_listening, self._num_source = False, self.num_source

    def end(self) -> None:
        """Forget the step."""
        self._is_listening, self._heard = False, []

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss with the weighted distance added; at weight 0 exactly the user's."""
        if not self.weight:
            return loss
        if len(self._heard) != len(self.layers) + 1:
            raise TransferConfigError(
                f"The training step did not run each of {self.layers} and {self.network!r} once with gradients, as "
                "DELTA needs to compare the maps of one pass. Name other layers."
            )
        *heard, (args, kwargs, _) = self._heard
        num = len(heard[0][2]) - self._num_source
        maps, kept = ([maps[:num] for *_, maps in found] for found in (heard, self._run_pretrained(args, kwargs)))
        term = feature_distance(maps, kept)
        self.refuse_not_finite("DELTA loss", term)
        self.log({"transfer/delta_loss": term.detach()})
        return loss + self.weight * term

    @torch.no_grad()
    def _run_pretrained(self, args: Any, kwargs: Any) -> list[Any]:
        assert self.pretrained is not None  # there is a weight
        heard: list[Any] = []
        handles = self._listen(self.pretrained, lambda layer, *found: heard.append(found))
        try:
            self.pretrained(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return heard[:-1]

    def _listen(self, network: nn.Module, hear: Callable[..., None]) -> list[Any]:
        layers = [network.get_submodule(name.partition(".")[2]) for name in self.layers]
        return [layer.register_forward_hook(hear, with_kwargs=True) for layer in [*layers, network]]

    def _hear(self, layer: nn.Module, *found: Any) -> None:
        if self._is_listening and torch.is_grad_enabled():
            self._heard.append(found)


class DELTA(TransferCallback):
    """Hold the feature maps near those of the pretrained network (DELTA, without attention, arXiv 1901.09229).

    Logs `transfer/delta_loss`.

    Args:
        layers: dotted names of the layers to compare, all in one network; the authors take the last of each stage.
        weight: of the distance; 0 for none.

    Raises:
        TransferConfigError: an option does not fit.

    Example:
        >>> DELTA(["model.layer3", "model.layer4"])
        DELTA(['model.layer3', 'model.layer4'], weight=0.64)
    """

    def __init__(self, layers: Sequence[str], *, weight: float = 0.64) -> None:
        check_number("weight", weight)
        if isinstance(layers, str) or not layers:
            raise TransferConfigError(f"layers={layers!r}; it takes a list of names: layers=['model.layer4'].")
        self.layers, self.weight = [*layers], weight

    def make_part(self, module: Any) -> FeatureMaps:
        """Return the part that copies the network as it is now."""
        return FeatureMaps(module, weight=self.weight, layers=self.layers)

    def __repr__(self) -> str:
        return f"DELTA({self.layers}, weight={self.weight})"
