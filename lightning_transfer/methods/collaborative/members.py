"""Prepare the networks of an ensemble: images as in each one's pretraining, and new heads for the target's classes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.collaborative.depths import find_depths
from lightning_transfer.methods.collaborative.heads import classifier, last_classifier, renew_head
from lightning_transfer.naming import a_class
from lightning_transfer.networks import check_timm_name, loaded
from lightning_transfer.roles import Head, out_width
from lightning_transfer.stamps import digest
from lightning_transfer.surgery import own_randomness
from lightning_transfer.tracing import required_size

OWN = "own"  # the user's network among the members
NORM = ("scale", "shift")
Sources: TypeAlias = Mapping[str, nn.Module | str] | Sequence[nn.Module | str]


class Member(nn.Module):
    """Run a network on images that are changed to look as in its pretraining.

    Args:
        network: gives (B, classes) logits.
        scale: factor of the pixel values, one a channel; None for no change.
        shift: added after the scale.
        size: height and width; None for no change.
        zoom: factor of the height and width.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        zoom: float = 1.0,
    ) -> None:
        super().__init__()
        self.size = size
        self.zoom = zoom
        for name, values in (("scale", scale), ("shift", shift)):
            kept = None if values is None else torch.tensor(values)[:, None, None]
            self.register_buffer(name, kept, persistent=False)
        self.network = network
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, classes) logits of (B, C, H, W) images that are preprocessed for the user's network."""
        if self.is_resized:  # a head that is apart takes features, which have no size
            height, width = self.size or (round(side * self.zoom) for side in images.shape[-2:])
            if (height, width) != tuple(images.shape[-2:]):
                images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale.to(images) + self.shift.to(images)
        logits: Tensor = self.network(images)
        return logits

    @property
    def is_resized(self) -> bool:
        """Return whether images are resized."""
        return self.size is not None or self.zoom != 1

    @property
    def is_plain(self) -> bool:
        """Return whether images enter the network unchanged."""
        return self.scale is None and not self.is_resized

    def describe(self) -> dict[str, Any]:
        """Return the changes of images as plain data."""
        values = {name: None if (value := getattr(self, name)) is None else value.flatten().tolist() for name in NORM}
        return {**values, "size": None if self.size is None else list(self.size), "zoom": self.zoom}


def adapted(network: nn.Module, own: nn.Module) -> Member:
    """Return a member that takes the images of the user's network, as far as timm's configurations describe both."""
    mine, theirs = _config(own), _config(network)
    if network is own:
        return Member(network)
    options: dict[str, Any] = {}
    if mine and theirs and (mine["mean"], mine["std"]) != (theirs["mean"], theirs["std"]):
        pairs = list(zip(mine["mean"], mine["std"], theirs["mean"], theirs["std"], strict=True))
        options["scale"] = [std / their_std for _, std, _, their_std in pairs]
        options["shift"] = [(mean - their_mean) / their_std for mean, _, their_mean, their_std in pairs]
    if theirs and theirs.get("fixed_input_size"):
        options["size"] = tuple(theirs["input_size"][-2:])
    elif mine and theirs and mine["input_size"] != theirs["input_size"]:
        options["zoom"] = theirs["input_size"][-1] / mine["input_size"][-1]
    return Member(network, **options)


def _config(network: Any) -> dict[str, Any] | None:
    """Return timm's `pretrained_cfg`, or what the user assigned to that name; None if it is incomplete."""
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        return None
    size = required_size(network)
    found = {**config, **({"input_size": (config["input_size"][0], *size)} if size else {})}
    convs = (layer for layer in uncompiled(network).modules() if isinstance(layer, nn.Conv2d))
    if getattr(next(convs, None), "in_channels", 0) == 1:  # of a grey network timm keeps the statistics of colours
        found |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    return found


def by_name(sources: Sources) -> dict[str, nn.Module | str]:
    """Return networks by name; those of a list are named source1, source2, and so on.

    Raises:
        TransferConfigError: a source is not a network, its name cannot be used, or timm has no model of that name.
    """
    if isinstance(sources, Mapping):
        found = dict(sources)
    elif isinstance(sources, Sequence) and not isinstance(sources, str):
        found = {f"source{number}": source for number, source in enumerate(sources, start=1)}
    else:
        raise TransferConfigError(
            f"sources is {a_class(sources)}; it takes networks or names of timm models, in a list or by name: "
            "CollaborativeFinetuning([network])."
        )
    for name, source in found.items():
        if not isinstance(name, str) or not name.isidentifier() or name == OWN:
            raise TransferConfigError(f"{name!r} cannot name a source; take a word other than {OWN!r}, without dots.")
        if not isinstance(source, str | nn.Module):
            raise TransferConfigError(
                f"{name} is {a_class(source)}; a source is a network or the name of a timm model."
            )
        if isinstance(source, str):
            check_timm_name(source)
    return found


def make_members(
    own: nn.Module, sources: Mapping[str, nn.Module | str], example: Any, *, head: Head | None
) -> dict[str, Member]:
    """Return the user's network unchanged, and copies of the others with new heads.

    Args:
        own: the user's network.
        sources: the others.
        example: a batch for the user's network.
        head: the user's head if it is apart, which is then the first member; otherwise None.

    Raises:
        TransferConfigError: a network's head is not found, or the network takes images of other channels.
    """
    own_head = head or last_classifier(own, OWN)
    members = {OWN: Member(own if head is None else head.module)}
    mine, reference = _channels(own, example) if sources else None, next(own.parameters())
    with own_randomness():
        for name, source in sources.items():
            network = copy.deepcopy(loaded(source))
            if mine != (theirs := _channels(network)):
                raise TransferConfigError(
                    f"{name} takes images of {theirs} channels, and your network takes {mine}. Give a network that "
                    f"takes {mine}."
                )
            renew_head(network, last_classifier(network, name), out_width(own_head.module))
            members[name] = adapted(network, own).to(reference.device, reference.dtype).train(own.training)
    return members


def _channels(network: nn.Module, example: Any = None) -> int | None:
    """Return how many channels the images of a network have; None if it has no convolution."""
    inner = uncompiled(network)
    convs: list[Any] = [inner.get_submodule(path) for path in find_depths(inner, example).convs[:1]]
    return convs[0].in_channels if convs else None


def make_of(network: nn.Module) -> str:
    """Return a digest that is the same for networks of the same layers."""
    layers = [
        (path, type(layer).__qualname__, layer.extra_repr(), _plain(vars(layer)))
        for path, layer in network.named_modules()
    ]
    return digest(repr(layers))


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's numbers and texts, which its forward may depend on."""
    return {
        name: value
        for name, value in sorted(attributes.items())
        if name != "training" and isinstance(value, bool | int | float | str)
    }


def rebuilt(own: nn.Module, entry: Mapping[str, Any], spec: Mapping[str, Any], *, head: Head | None) -> nn.Module:
    """Return a network like the one that a checkpoint records; its weights are loaded later.

    Args:
        own: the user's network.
        entry: what the checkpoint records of the network.
        spec: what it records of all networks.
        head: the user's head if it is apart, otherwise None.

    Raises:
        TransferConfigError: the network is neither timm's nor of the make of the user's own.
    """
    if entry["make"] == spec["members"][0]["make"]:
        return copy.deepcopy(own)
    if entry["timm"] is None:
        raise TransferConfigError(
            f"The checkpoint holds a network {entry['name']!r} that is neither timm's nor made as your own, so it "
            "cannot be rebuilt from the checkpoint. Give it: functional.apply_collaborative(module, sources, "
            f"frozen_layers={spec['frozen']}), then module.load_state_dict(checkpoint['state_dict'])."
        )
    import timm

    num_classes, channels = out_width((head or classifier(own, OWN)).module), _channels(own)
    with own_randomness():
        return timm.create_model(entry["timm"], pretrained=False, num_classes=num_classes, in_chans=channels)
