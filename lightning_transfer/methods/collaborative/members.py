"""Networks of any make beside each other: each gets the pictures it knows, and a new head for the target."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError, nearest
from lightning_transfer.methods.collaborative.depths import find_depths
from lightning_transfer.roles import Head, find_head, linear_layers, out_width
from lightning_transfer.surgery import own_randomness, replace_modules
from lightning_transfer.tracing import evaluating, run_on_a_picture

OWN = "own"  # the user's network among the members
Sources: TypeAlias = Mapping[str, nn.Module | str] | Sequence[nn.Module | str]


class Member(nn.Module):
    """A network, and what its pictures need to look as they did in its pretraining.

    Args:
        network: gives (B, classes) logits.
        scale: of pixel values, one a channel; None for none.
        shift: added behind the scale.
        size: height and width; None to leave them.
        zoom: by how much they grow; 1 to leave them.
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
        """(B, classes) logits of (B, C, H, W) images as the user's network takes them."""
        height, width = self.size or (round(side * self.zoom) for side in images.shape[-2:])
        if (height, width) != tuple(images.shape[-2:]):
            images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale.to(images) + self.shift.to(images)
        logits: Tensor = self.network(images)
        return logits

    @property
    def is_plain(self) -> bool:
        """Whether pictures go into the network as they are."""
        return self.scale is None and self.size is None and self.zoom == 1

    def describe(self) -> dict[str, Any]:
        """What is done to pictures, as plain data."""
        values = {name: None if (value := getattr(self, name)) is None else value.flatten().tolist() for name in NORM}
        return {**values, "size": None if self.size is None else list(self.size), "zoom": self.zoom}


NORM = ("scale", "shift")


def adapted(network: nn.Module, own: nn.Module) -> Member:
    """A network, made to take the pictures of the user's own, as far as timm's configurations say what they are."""
    mine, theirs = _config(own), _config(network)
    if network is own:
        return Member(network)
    options: dict[str, Any] = {}
    if mine and theirs and (mine["mean"], mine["std"]) != (theirs["mean"], theirs["std"]):
        pairs = list(zip(mine["mean"], mine["std"], theirs["mean"], theirs["std"], strict=True))
        options["scale"] = [std / their_std for _, std, _, their_std in pairs]
        options["shift"] = [(mean - their_mean) / their_std for mean, _, their_mean, their_std in pairs]
    if mine and theirs and mine["input_size"] != theirs["input_size"]:
        size = theirs["input_size"][-2:]
        if theirs.get("fixed_input_size"):
            options["size"] = tuple(size)
        else:
            options["zoom"] = size[-1] / mine["input_size"][-1]
    elif theirs and theirs.get("fixed_input_size"):
        options["size"] = tuple(theirs["input_size"][-2:])
    return Member(network, **options)


def _config(network: Any) -> dict[str, Any] | None:
    """Timm's `pretrained_cfg`, or what the user has put under that name."""
    config = getattr(network, "pretrained_cfg", None)
    complete = isinstance(config, Mapping) and {"mean", "std", "input_size"} <= config.keys()
    return dict(cast(Mapping[str, Any], config)) if complete else None


def named(sources: Sources) -> dict[str, nn.Module | str]:
    """Networks by name: those of a list are source1, source2 and so on.

    Raises:
        TransferConfigError: there is something else in it, or a name that cannot be one.
    """
    if isinstance(sources, Mapping):
        found = dict(sources)
    elif isinstance(sources, Sequence) and not isinstance(sources, str):
        found = {f"source{number}": source for number, source in enumerate(sources, start=1)}
    else:
        raise TransferConfigError(
            f"sources is a {type(sources).__name__}; it takes networks or names of timm's, in a list or by name: "
            "CollaborativeFinetuning([network])."
        )
    for name, source in found.items():
        if not isinstance(name, str) or not name.isidentifier() or name == OWN:
            raise TransferConfigError(f"{name!r} cannot name a source; take a word other than {OWN!r}, without dots.")
        if not isinstance(source, str | nn.Module):
            raise TransferConfigError(
                f"{name} is a {type(source).__name__}; a source is a network or a name of timm's."
            )
    return found


def make_members(
    own: nn.Module, sources: Mapping[str, nn.Module | str], example: Any = None, *, head: Head | None = None
) -> dict[str, Member]:
    """The user's network as it is, and copies of the others with new heads.

    Args:
        own: the user's network.
        sources: the others.
        example: a batch for the user's network.
        head: the user's head, where it stands apart; it is then what is among the members.

    Raises:
        TransferConfigError: a network has no head that can be told, or takes other channels.
    """
    own_head = head or last_classifier(own, OWN)
    members = {OWN: Member(own if head is None else head.module)}
    with own_randomness():
        for name, source in sources.items():
            network = copy.deepcopy(loaded(source))
            head = last_classifier(network, name)
            if (mine := _channels(own, example)) != (theirs := _channels(network)):
                raise TransferConfigError(
                    f"{name} takes {theirs} channels, and the pictures of your network have {mine}."
                )
            renew_head(network, head, out_width(own_head.module))
            reference = next(own.parameters())
            members[name] = adapted(network, own).to(reference.device, reference.dtype).train(own.training)
    return members


def loaded(source: nn.Module | str) -> nn.Module:
    """A network; one of timm's is loaded with its pretrained weights."""
    if isinstance(source, nn.Module):
        return source
    import timm

    if ":" not in source and not timm.is_model(source):  # names with a colon are of a hub
        raise TransferConfigError(f"timm has no model {source!r}. {nearest(source, timm.list_models())[:200]} ...")
    return timm.create_model(source, pretrained=True)


def classifier(network: nn.Module, name: str) -> Head:
    """The Linear that a network ends in, or convolutions and a global pool.

    Raises:
        TransferConfigError: there is none, or several.
    """
    inner = getattr(network, "_orig_mod", network)
    try:
        return find_head(inner)
    except TransferConfigError as error:
        raise TransferConfigError(
            f"{name}, a {type(inner).__name__}, has to be an image classifier that ends in one Linear. {error}"
        ) from None


def last_classifier(network: nn.Module, name: str) -> Head:
    """Return the classifier of a network that gives its logits, as far as a blank picture shows.

    Raises:
        TransferConfigError: there is none, or what the network gives is not its logits.
    """
    head, inner = classifier(network, name), getattr(network, "_orig_mod", network)
    heard: list[Any] = []
    handle = head.module.register_forward_hook(lambda layer, args, logits: heard.append(logits))
    try:
        with evaluating(inner):
            given = run_on_a_picture(inner)
    except TransferConfigError:
        return head  # it runs on other pictures
    finally:
        handle.remove()
    if isinstance(given, Tensor) and heard and not _are_same_logits(given.flatten(1), heard[-1].flatten(1)):
        raise TransferConfigError(
            f"{name}, a {type(inner).__name__}, does not give the logits of its last layer {head.path!r}, but features "
            "(num_classes=0), or probabilities after a softmax or sigmoid. Logits are averaged: let each network end "
            "in its classifier, and leave softmax and sigmoid to the loss."
        )
    return head


def _are_same_logits(given: Tensor, logits: Tensor) -> bool:
    """Whether both rank and weigh classes alike: after a log-softmax they differ by one number an image."""
    if given.shape != logits.shape:
        return False
    apart = given - logits
    return torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-4) and (given.shape[1] > 1 or not apart.any())


def renew_head(network: nn.Module, head: Head, num_classes: int) -> None:
    """A head of new weights for the target's classes in place of the one that was."""
    layer: Any
    *_, (name, layer) = linear_layers(head.module)
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, num_classes, bias=has_bias)
    else:
        new = nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size, bias=has_bias)
    replace_modules(network, {f"{head.path}.{name}".rstrip("."): new.to(layer.weight)})
    if hasattr(network, "num_classes"):
        network.num_classes = num_classes  # type: ignore[assignment]


def _channels(network: nn.Module, example: Any = None) -> int | None:
    """How many channels the pictures have that a network takes; None where it has no convolution."""
    inner = getattr(network, "_orig_mod", network)
    convs: list[Any] = [inner.get_submodule(path) for path in find_depths(inner, example).convs[:1]]
    return convs[0].in_channels if convs else None


def make_of(network: nn.Module) -> int:
    """A number that networks of the same layers share."""
    layers = [
        (path, type(layer).__qualname__, layer.extra_repr(), _plain(vars(layer)))
        for path, layer in network.named_modules()
    ]
    return zlib.crc32(repr(layers).encode())


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and words among a layer's attributes, by which its forward may differ from another's."""
    return {
        name: value
        for name, value in sorted(attributes.items())
        if name != "training" and isinstance(value, bool | int | float | str)
    }


def architecture(network: nn.Module) -> str | None:
    """What timm calls a network; None for one that is not timm's."""
    config = getattr(network, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name if type(network).__module__.startswith("timm.") else None


def rebuilt(
    own: nn.Module, entry: Mapping[str, Any], spec: Mapping[str, Any], *, head: Head | None = None
) -> nn.Module:
    """A network like one that a checkpoint tells of; its weights come with the checkpoint.

    Args:
        own: the user's network.
        entry: what the checkpoint tells of the network.
        spec: what it tells of all of them.
        head: the user's head, where it stands apart.

    Raises:
        TransferConfigError: it is neither that nor one of timm's.
    """
    if entry["make"] == spec["members"][0]["make"]:
        return copy.deepcopy(own)
    if entry["timm"] is None:
        raise TransferConfigError(
            f"The checkpoint holds a network {entry['name']!r} that is neither timm's nor made as your own, and no "
            "checkpoint could build it. Give it: functional.apply_collaborative(module, sources, "
            f"frozen_layers={spec['frozen']}), then module.load_state_dict(checkpoint['state_dict'])."
        )
    import timm

    num_classes, channels = out_width((head or classifier(own, OWN)).module), _channels(own)
    with own_randomness():
        return timm.create_model(entry["timm"], pretrained=False, num_classes=num_classes, in_chans=channels)
