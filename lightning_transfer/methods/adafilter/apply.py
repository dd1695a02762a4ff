"""Put AdaFilter into a network, and take it out again."""

import math
from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError, check_choice, check_positive
from lightning_transfer.methods.adafilter.functional import ESTIMATORS, Estimator
from lightning_transfer.methods.adafilter.gate import RecurrentFilterGate
from lightning_transfer.methods.adafilter.modules import FIXED, Fixed, GatedConv2d
from lightning_transfer.methods.adafilter.sites import IDLE, PLAIN, Gated, Site, find_sites, without_filters
from lightning_transfer.networks import find_network
from lightning_transfer.options import is_list
from lightning_transfer.surgery import Structure, SurgeryReport, own_randomness, replace_modules

NAME = "adafilter"  # of the module that is added, so its keys in a state_dict start with this
POSITIONAL = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # containers that may be read by position


class FilterGates(Structure):
    """Adds a gate and gated layers to a network, and remembers how to add them again or remove them.

    Args:
        network: the network whose layers are replaced.
        sites: the convolutions to gate.
        host: the module that gets this as a child; by default the network, or its last gated layer if the network is a
            positional container.
        name: dotted name of the network in its host.
        estimator: how gates are decided.
        width: of the gate's state.
        temperature: of the "gumbel" estimator.
        bias: the value at which the gates' logits start.
    """

    callback, remove = "AdaFilter", "remove_adafilter"
    is_transfer_part = True

    def __init__(
        self,
        network: nn.Module,
        sites: list[Site],
        *,
        host: nn.Module | None = None,
        name: str = "",
        estimator: Estimator | Fixed,
        width: int = 128,
        temperature: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple, so that it is not registered as a submodule
        self.name = name
        self.sites = sites
        self.estimator = estimator
        self.temperature = temperature
        self._norms = {site.norm: network.get_submodule(site.norm) for site in sites if site.norm}  # the user's own
        convs: list[Any] = [network.get_submodule(site.conv) for site in sites]
        norms = [_plain(self._norms[site.norm]) if site.norm else None for site in sites]
        gated = [GatedConv2d(conv, norm) for conv, norm in zip(convs, norms, strict=True)]
        self.gate: RecurrentFilterGate | None = None
        if estimator not in FIXED:
            with own_randomness():
                self.gate = RecurrentFilterGate(
                    [conv.in_channels for conv in convs],
                    [conv.out_channels for conv in convs],
                    width=width,
                    estimator=cast(Estimator, estimator),
                    temperature=temperature,
                    bias=bias,
                ).to(convs[0].weight)
        changed = gated if estimator == "all_frozen" else []  # which freezes them
        self._trained = [param for layer in changed for param in layer.parameters() if param.requires_grad]
        for number, layer in enumerate(gated):
            layer.decide_by(self.gate or cast(Fixed, estimator), number)
        activations = {path: _activation(norm) for path, norm in self._norms.items()}
        layers = {site.conv: layer for site, layer in zip(sites, gated, strict=True)}
        replace_modules(network, {**layers, **activations})
        host = host or (gated[-1] if isinstance(network, POSITIONAL) else network)
        host.add_module(NAME, self.train(network.training))

    @property
    def network(self) -> nn.Module:
        """Return the network whose layers were replaced."""
        return self._network[0]

    def spec(self) -> dict[str, Any]:
        """Return which layers are gated, and how gates are decided."""
        width = None if self.gate is None else self.gate.cell.hidden_size
        return {
            "convolutions": [site.conv for site in self.sites],
            "norms": [site.norm for site in self.sites],
            "estimator": self.estimator,
            "temperature": self.temperature,
            "width": width,
            **({"network": self.name} if self.name else {}),
        }

    @classmethod
    def rebuild(cls, root: nn.Module, path: str, spec: dict[str, Any]) -> None:
        """Gate a plain network as a spec describes; the weights come with the state that holds the spec."""
        place, name = path.rpartition(".")[0], spec.get("network", "")
        host: nn.Module | None = root.get_submodule(place)
        if not isinstance(getattr(host, NAME, None), FilterGates):
            if isinstance(host, nn.Conv2d):  # the last of the layers to gate
                host, place = None, place.removesuffix(spec["convolutions"][-1]).rstrip(".")
            network = uncompiled(root.get_submodule(f"{place}.{name}".strip(".")))
            sites = [Site(conv, norm) for conv, norm in zip(spec["convolutions"], spec["norms"], strict=True)]
            options = {"width": spec["width"]} if spec["width"] else {}
            options |= {key: spec[key] for key in ("estimator", "temperature")}
            cls(network, sites, host=host, name=name, **options)

    @property
    def layers(self) -> list[GatedConv2d]:
        """Return the gated layers of the network."""
        return [self.network.get_submodule(site.conv) for site in self.sites]  # type: ignore[misc]

    def renamed(self) -> dict[str, str]:
        """Return the tuned layers' names in the network, mapped to their names before gating."""
        convs = {f"{site.conv}.tuned": site.conv for site in self.sites}
        return convs | {f"{site.conv}.norm.tuned": site.norm for site in self.sites if site.norm}

    def last_gates(self) -> dict[str, Tensor]:
        """Return the gates of every layer in the last pass, (B, filters) each."""
        slots = [] if self.gate is None else self.gate.slots.layers
        pairs = zip(self.sites, slots, strict=False)
        return {site.conv: slot.gates.float() for site, slot in pairs if slot is not None}

    def take_out(self, root: nn.Module) -> None:
        """Remove the gates and put the tuned layers back; `root` holds the network."""
        places: dict[str, nn.Module] = {}
        for site, layer in zip(self.sites, self.layers, strict=True):
            places[site.conv] = layer.tuned
            if layer.norm is not None:
                norm = self._norms[site.norm].to(layer.norm.frozen.running_mean)
                norm.load_state_dict(layer.norm.tuned.state_dict())
                norm.training = layer.norm.tuned.training
                places[site.norm] = norm
        for param in self._trained:
            param.requires_grad = True
        delattr(next(child for child in root.modules() if getattr(child, NAME, None) is self), NAME)
        replace_modules(self.network, places)


def apply_adafilter(
    module: nn.Module,
    *,
    backbone: str = "auto",
    gate_width: int = 128,
    estimator: Estimator | Fixed = "straight_through",
    gate_bias: float = 0.05,
    gated: Gated = None,
    temperature: float = 1.0,
) -> SurgeryReport:
    """Gate the filters of a network in place; until they are trained, its output in eval mode stays the same.

    Every convolution but those of the stem is kept twice, with the BatchNorm after it: as pretrained and tuned. A
    recurrent gate chooses between the two for each image and each filter. The stem is tuned without gates.

    Args:
        module: a network, or a module that holds one.
        backbone: dotted name of the network to gate; "auto" takes the part that holds all convolutions.
        gate_width: width of the gate's state.
        estimator: how a hard choice learns: "straight_through", "semantic_hashing" or "gumbel"; or one of the baselines
            that choose without learning: "all_tuned" (fine-tuning), "all_frozen" (feature extraction), "random".
        gate_bias: the value at which the gates' logits start, plus or minus a few hundredths: at .05 nearly all filters
            start tuned, at 0 half of them, at -.05 hardly any.
        gated: the convolutions to gate: a pattern of their names in the module, such as "model.layer4.*", a list of
            patterns, or a function of name and convolution; by default all except the stem.
        temperature: of the "gumbel" estimator.

    Returns:
        The convolutions that are gated, and the others with the reason.

    Raises:
        TransferConfigError: there is nothing to gate, or the network is already gated.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
        ... )
        >>> report = apply_adafilter(network)
        >>> report.replaced, dict(report.left)
        (('2',), {'0': 'it is the stem'})
    """
    check_options(estimator, gate_bias, temperature, gated)
    if not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        raise without_filters(module, "none")
    path, network = find_network(module, backbone)
    prefix = f"{path}." if path else ""
    host, name = _host(module, path, network)
    if gates_of(network) is not None or isinstance(getattr(host, NAME, None), FilterGates):
        raise TransferConfigError(f"{type(network).__name__} is gated already. Call remove_adafilter(module) first.")
    if hasattr(host, NAME):
        raise TransferConfigError(f"{type(host).__name__} already has an attribute {NAME!r}. Rename it.")
    sites, left = find_sites(network, gated, getattr(module, "example_input_array", None), prefix=prefix)
    if backbone == "auto" and not path and hasattr(module, "training_step"):
        _refuse_copies(module, left)
    options: dict[str, Any] = {"width": gate_width, "temperature": temperature, "bias": gate_bias}
    gates = FilterGates(network, sites, host=host, name=name, estimator=estimator, **options)
    return SurgeryReport(
        tuple(prefix + site.conv for site in sites),
        sum(param.numel() for param in gates.parameters()),
        {prefix + name: reason for name, reason in left.items()},
    )


def _refuse_copies(module: nn.Module, left: Mapping[str, str]) -> None:
    """Refuse two networks of equal weights if an image runs through one: in training it may be the other one."""
    convs = [
        [(path, layer) for path, layer in child.named_modules(prefix=name) if isinstance(layer, nn.Conv2d)][:1]
        for name, child in module.named_children()
    ]
    for (one, conv), (other, twin) in combinations(chain(*convs), 2):
        is_copy = conv.weight.shape == twin.weight.shape and torch.equal(conv.weight, twin.weight)
        if is_copy and (left.get(one) == IDLE) != (left.get(other) == IDLE):
            names = [path.partition(".")[0] for path in (one, other)]
            raise TransferConfigError(
                f"{type(module).__name__} has two networks of equal weights, {names[0]!r} and {names[1]!r}; one may be "
                f"an average of the other. Name the one to train: backbone={names[0]!r}."
            )


def _host(module: nn.Module, path: str, network: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the innermost module that holds a network and is not a positional container, and the network's name in it.

    That may be the network itself. If there is no such module, return None and "".
    """
    names = path.split(".") if path else []
    for depth in range(len(names), -1, -1):
        host = network if depth == len(names) else module.get_submodule(".".join(names[:depth]))
        if not isinstance(host, POSITIONAL):
            return host, ".".join(names[depth:])
    return None, ""


def check_options(estimator: str, gate_bias: float, temperature: float, gated: Gated) -> None:
    """Refuse options that do not fit any network.

    Raises:
        TransferConfigError: naming the option.
    """
    check_choice("estimator", estimator, (*ESTIMATORS, *FIXED))
    if isinstance(gate_bias, bool) or not isinstance(gate_bias, int | float) or not math.isfinite(gate_bias):
        raise TransferConfigError(f"gate_bias={gate_bias!r}; it takes a finite number.")
    check_positive("temperature", temperature)
    patterns = gated if is_list(gated) else [gated]
    if not (gated is None or callable(gated) or all(isinstance(pattern, str) for pattern in patterns)):
        raise TransferConfigError(
            f"gated={gated!r}; it takes a pattern of names, such as 'model.layer4.*', a list of patterns, or a "
            "function of name and convolution."
        )


def gates_of(module: nn.Module) -> FilterGates | None:
    """Return the gates inside a module; None if there are none."""
    return next((child for child in module.modules() if isinstance(child, FilterGates)), None)


def _plain(norm: Any) -> nn.BatchNorm2d:
    """Return a plain BatchNorm with the same weights and statistics tensors as one that includes an activation."""
    if type(norm) in PLAIN:
        return norm  # type: ignore[no-any-return]
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=norm.affine)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    plain.training = norm.training
    return plain


def _activation(norm: Any) -> nn.Module:
    """Return what timm's BatchNorm applies after the norm; an empty Sequential for a plain BatchNorm."""
    parts = [] if type(norm) in PLAIN else [norm.drop, norm.act]
    return nn.Sequential(*parts).train(norm.training)
