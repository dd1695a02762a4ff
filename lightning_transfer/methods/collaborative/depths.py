"""Find how deep a network may be frozen: its convolutions in the order in which they run, and what is below a cut.

Convolutions are counted from the input, without those of downsampling shortcuts, as the authors count them (PeerJ CS
10:e2107). All layers that have run before the first convolution above the cut are below it; for networks other than
ResNets this is our reading.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_transfer.tracing import Call, trace

SHORTCUTS = {"downsample", "shortcut"}  # what timm and torchvision call them


@dataclass(frozen=True)
class Depths:
    """List the layers of a network in the order in which they run.

    Attributes:
        convs: dotted names of the counted convolutions, in the order in which they first run.
        order: the place of the last run of every layer with weights, by dotted name.
        starts: the place of each counted convolution's first run.
    """

    convs: tuple[str, ...]
    order: dict[str, int]
    starts: tuple[int, ...]

    @property
    def most(self) -> int:
        """Return how many convolutions can be frozen: all but the last."""
        return max(len(self.convs) - 1, 0)

    def below(self, num_frozen: int) -> list[str]:
        """Return dotted names of the layers below a cut: all that have run when convolution `num_frozen` + 1 begins."""
        return [] if num_frozen == 0 else [path for path, last in self.order.items() if last < self.starts[num_frozen]]


def find_depths(network: nn.Module, example: Any = None, *, head: str = "") -> Depths:
    """Run a network on an image and return which layers it runs.

    Args:
        network: takes (1, channels, height, width).
        example: a batch to run it on instead of a picture of noise.
        head: dotted name of the classifier, whose convolutions are not counted.

    Raises:
        TransferConfigError: the network does not run.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten())
        >>> depths = find_depths(network)
        >>> depths.convs, depths.below(1)
        (('0', '2'), ['0', '1'])
    """
    calls = trace(network, example, watched=_has_weights)
    left_out = _shortcuts(calls)
    convs: dict[str, int] = {}
    order: dict[str, int] = {}
    for place, call in enumerate(calls):
        order[call.path] = place
        is_head = head != "" and f"{call.path}.".startswith(f"{head}.")
        if isinstance(network.get_submodule(call.path), _ConvNd) and call.path not in left_out and not is_head:
            convs.setdefault(call.path, place)
    return Depths(tuple(convs), order, tuple(convs.values()))


def _has_weights(layer: nn.Module) -> bool:
    return any(True for own in (layer.parameters(recurse=False), layer.buffers(recurse=False)) for _ in own)


def _shortcuts(calls: list[Call]) -> set[str]:
    """Return the layers of downsampling shortcuts, by name and because no other layer takes what they give directly.

    The name is not enough: ConvNeXt gives it to a part of its main path.
    """
    branches: dict[str, list[Call]] = {}
    for call in calls:
        parts = call.path.split(".")
        end = next((number for number, part in enumerate(parts) if part in SHORTCUTS), None)
        if end is not None:
            branches.setdefault(".".join(parts[: end + 1]), []).append(call)
    return {
        call.path
        for inside in branches.values()
        if not any(other.taken is inside[-1].given for other in calls if other not in inside)
        for call in inside
    }
