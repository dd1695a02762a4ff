"""Turn a network into a gated transfer network, and back into a plain one."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from lightning_transfer.errors import TransferConfigError, check_count, check_number, nearest
from lightning_transfer.methods.gated.modules import GatedHead, add_transfer
from lightning_transfer.naming import a_class
from lightning_transfer.networks import find_network
from lightning_transfer.plain_linear import is_plain_linear
from lightning_transfer.roles import find_head, has_forward, is_adapted
from lightning_transfer.surgery import Removal, SurgeryReport, find_all, replace_modules
from lightning_transfer.tracing import share_right, trace


def apply_gated_transfer(
    module: nn.Module,
    *,
    head: str = "auto",
    ratio: int | None = 16,
    gate_dropout: float = 0.7,
    dropout: float = 0.5,
) -> SurgeryReport:
    """Put a transfer module before a network's head, in place.

    Args:
        module: a network, or a module that holds one.
        head: dotted name of the Linear that gives the logits, or "auto".
        ratio: by which the module divides the number of features; None for no module, only dropout.
        gate_dropout: inside the module.
        dropout: between the module and the head.

    Returns:
        The head's name, and how many parameters were added.

    Raises:
        TransferConfigError: an option is out of range, no head is found, it is not a Linear, or it already has a
            transfer module.

    Example:
        >>> network = nn.Sequential()
        >>> network.body, network.fc = nn.Linear(4, 32), nn.Linear(32, 3)
        >>> apply_gated_transfer(network)
        SurgeryReport(replaced=('fc',), added_parameters=128, left={})
    """
    check_options(ratio, gate_dropout, dropout)
    if find_gated_head(module) is not None:
        raise TransferConfigError(
            f"{type(module).__name__} has a transfer module already. Call remove_gated_transfer(module) first."
        )
    found = find_head(module, head)
    if sum(child is found.module for _, child in module.named_modules(remove_duplicate=False)) > 1:
        raise TransferConfigError(f"The head {found.path!r} has several names in {type(module).__name__}. Keep one.")
    if not is_plain_linear(found.module):
        kind = "a Linear with an adapter of peft" if is_adapted(found.module) else a_class(found.module)
        raise TransferConfigError(
            f"The head {found.path!r} is {kind}; the transfer module weighs (B, D) features before a Linear that gives "
            "weight x features + bias. If the network ends in one, name it: head='...'. If not, GatedTransfer is not "
            "for it."
        )
    gated = add_transfer(module, found.path, ratio=ratio, gate_dropout=gate_dropout, dropout=dropout)
    added = 0 if gated.transfer is None else sum(param.numel() for param in gated.transfer.parameters())
    return SurgeryReport((found.path,), added)


def check_options(ratio: int | None, gate_dropout: float, dropout: float) -> None:
    """Raise if an option is out of range, before any layer is changed."""
    if ratio is not None:
        check_count("ratio", ratio, least=1)
    for name, share in (("gate_dropout", gate_dropout), ("dropout", dropout)):
        check_number(name, share, most=0.99)  # with all dropped nothing would be learned


def remove_gated_transfer(module: nn.Module, *, loader: Iterable[Any] | None = None) -> Removal:
    """Remove the transfer module; the user's plain network stays, as trained.

    Predictions change, because nothing is fitted again. The module multiplied each feature by a weight between 0 and 1
    that differs between images, which no plain head can do. The head was trained on these products and now gets the
    features themselves, which are larger. So logits grow, about twofold if the weights are near one half, probabilities
    are more confident, and other classes win for some images. Pass a loader to measure what that costs. To train the
    head again on the features, fit the plain module once more, with `ProbeStart`. With `ratio=None` there is no module,
    and predictions stay the same.

    Args:
        module: a gated network, or a module that holds one.
        loader: batches of (images, labels) as the forward takes them.

    Returns:
        Accuracies on the loader, before and after.

    Raises:
        TransferConfigError: there is no transfer module, or the loader's batches are not (images, labels).

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 3))
        >>> report = apply_gated_transfer(network, head="1")
        >>> remove_gated_transfer(network)
        Removal(accuracy_before=None, accuracy_after=None)
        >>> network[1]
        Linear(in_features=32, out_features=3, bias=True)
    """
    found = find_gated_head(module)
    if found is None:
        raise TransferConfigError(f"{type(module).__name__} has no transfer module: there is nothing to remove.")
    before = share_right(module, loader)
    replace_modules(module, {found[0]: found[1].head})
    return Removal(before, share_right(module, loader))


def find_gated_head(module: nn.Module) -> tuple[str, GatedHead] | None:
    """Return the dotted name of the head that has a transfer module, and both as one module; None without one."""
    return next(iter(find_all(module, GatedHead).items()), None)


def find_tap(module: nn.Module, tap: str, head: str) -> tuple[str, int]:
    """Return the layer whose output the auxiliary classifier takes, and its number of channels.

    Args:
        module: the user's module.
        tap: a dotted name; "auto" takes the second-to-last stage that timm lists, or else the last part whose output is
            larger than the last part's (layer3 of torchvision's ResNets). Blocks of transformers have to be named.
        head: dotted name of the head.

    Raises:
        TransferConfigError: no stages are found, or the output is neither (B, C, H, W) nor tokens (B, N, D); it lists
            the candidates.
    """
    path, network = _network_with(module, head if tap == "auto" else tap)
    prefix = f"{path}." if path else ""
    example = getattr(module, "example_input_array", None)
    calls = trace(network, example, watched=lambda layer: True, otherwise=", or train without it: aux_weight=0")
    shapes = {call.path: call.given.shape for call in calls if call.path}
    height, width = next((call.taken.shape[2:] for call in calls if call.taken.ndim == 4), (1, 1))
    gives = {  # maps of the picture's proportions, but for rounding
        name: (shape[1], shape[2])
        for name, shape in shapes.items()
        if len(shape) == 4 and shape[2] > 1 and abs(shape[2] * width - shape[3] * height) < max(height, width)
    }
    batch = calls[0].taken.shape[0]  # attention in windows gives rows of windows
    tokens = {
        name: shape[2] for name, shape in shapes.items() if len(shape) == 3 and shape[0] == batch and shape[1] > 1
    }
    name = _last_stage_but_one(network, gives) if tap == "auto" else tap.removeprefix(prefix)
    if name in gives or name in tokens:
        return prefix + name, gives[name][0] if name in gives else tokens[name]
    parts = [name for name in gives if network.get_submodule(name)._modules]
    known = [prefix + name for name in parts + _blocks(network, tokens) or ([] if tokens else gives)]
    raise _no_tap(module, network, tap, known)


def _network_with(module: nn.Module, place: str) -> tuple[str, nn.Module]:
    """Return the path of the network that holds a place, and it; if none does, of the one that takes images."""
    path = place.partition(".")[0]
    network: Any = getattr(module, path, None)
    is_network = isinstance(network, nn.Module) and has_forward(network) and path != place
    if not (is_network and any(isinstance(part, nn.Conv2d) for part in network.modules())):
        return find_network(module)  # the head is outside the network, or the path does not exist
    return (path, network) if hasattr(module, "training_step") else ("", module)


def _no_tap(module: nn.Module, network: nn.Module, tap: str, known: list[str]) -> TransferConfigError:
    """Return the error for a tap that is not found or has the wrong shape; `known` are the layers that fit."""
    skipped = any(getattr(layer, "grad_checkpointing", False) for layer in network.modules())
    reason = " With grad_checkpointing the layers of a stage run, but not the stage." if skipped else ""
    if not known:
        reason += " None of its layers gives (B, C, H, W), nor blocks of it tokens (B, N, D)."
    elif tap == "auto":
        reason += f" Name the second-to-last stage, or a block: tap='...', one of {', '.join(map(repr, known))}."
    if tap == "auto":
        return TransferConfigError(
            f"No stage was found for the auxiliary classifier in {type(network).__name__}.{reason} Or train without "
            "it: aux_weight=0."
        )
    return TransferConfigError(
        f"tap={tap!r} gives neither (B, C, H, W) nor tokens (B, N, D) in {type(module).__name__}.{reason} "
        f"{nearest(tap, known)}"
    )


def _blocks(network: nn.Module, tokens: Collection[str]) -> list[str]:
    """Return the names of a transformer's blocks: the outermost layers that give tokens and are of one class."""
    parts = [(name, type(part)) for name, part in network.named_modules() if name in tokens and part._modules]
    counts = Counter(cls for _, cls in parts)
    block = next((cls for _, cls in parts if counts[cls] > 1), None)
    return [name for name, cls in parts if cls is block]


def _last_stage_but_one(network: nn.Module, gives: dict[str, tuple[int, int]]) -> str:
    """Return the name of the stage by timm's list, or by the (channels, height) of outputs; "" if there is none."""
    for path, part in network.named_modules():
        info: Any = getattr(part, "feature_info", None) or []
        listed = list(info.info if hasattr(info, "info") else info)
        if len(listed) > 1:
            name: str = f"{path}.{listed[-2]['module']}".lstrip(".")
            return name if gives.get(name, [None])[0] == listed[-2]["num_chs"] else ""  # else channels come last
    parts = [name for name in gives if network.get_submodule(name)._modules]
    stages: list[str] = []
    while parts:
        stages = [name for name in parts if not any(name.startswith(f"{other}.") for other in parts)]
        inside = [name for name in parts if name.startswith(f"{stages[-1]}.")]
        parts = inside if 2 * len(inside) >= len(parts) else []  # if so the last, such as `features`, holds the stages
    larger = [name for name in stages if gives[name][1] > gives[stages[-1]][1]]
    return (larger or stages[:-1] or [""])[-1]
