"""Find the convolutions that can be gated and the BatchNorms that follow them, in the order of a pass."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_transfer.errors import TransferConfigError, nearest
from lightning_transfer.naming import a_class
from lightning_transfer.roles import is_adapted, pooling_heads
from lightning_transfer.tracing import Call, trace

GIVES_LOGITS, IDLE = "it gives the class logits", "it does not run on an image"
OTHERWISE = ", or name the network that takes the images: backbone='...'"
STEM = 0.25  # the most of all convolutions that a stem may hold (ours)
PLAIN = (nn.BatchNorm2d, nn.SyncBatchNorm)  # BatchNorms without an activation

Chosen = str | Sequence[str] | Callable[[str, nn.Module], bool]
Gated = Chosen | None  # which convolutions; by default all except the stem


@dataclass(frozen=True)
class Site:
    """Names a convolution that can be gated, and the norm that goes with it.

    Attributes:
        conv: dotted name in the network.
        norm: dotted name of the BatchNorm that alone takes its output and has no other input; "" if there is none.
    """

    conv: str
    norm: str


def find_sites(network: nn.Module, gated: Gated, example: Any, *, prefix: str) -> tuple[list[Site], dict[str, str]]:
    """Return the convolutions to gate, in the order in which they run, and why the others are not gated.

    Names in `gated` begin with the prefix, the network's place in the user's module.

    Raises:
        TransferConfigError: there is nothing to gate, or a convolution that was named cannot be gated.
    """
    if any(is_lazy(param) for param in network.parameters()):
        raise TransferConfigError(f"{type(network).__name__} has lazy layers. Run it once on a batch, then gate it.")
    layers = dict(network.named_modules())
    names = Counter(id(layer) for _, layer in network.named_modules(remove_duplicate=False))
    calls, heads = trace(network, example, otherwise=OTHERWISE), pooling_heads(network)
    runs = Counter(call.path for call in calls)
    left = {path: IDLE for path, layer in layers.items() if isinstance(layer, _ConvNd)}
    adapters = tuple(f"{path}." for path, layer in layers.items() if is_adapted(layer))
    sites = {}
    for number, call in enumerate(calls):
        if call.path in left and call.path not in sites:
            layer = layers[call.path]
            is_head = any(layer in head.module.modules() for head in heads)
            reason = GIVES_LOGITS if is_head else _obstacle(layer, call, runs[call.path], names[id(layer)])
            if call.path.startswith(adapters):
                reason = "it is in an adapter of peft"
            if reason is None:
                sites[call.path] = Site(call.path, _norm_after(layers, calls[number:], runs))
                del left[call.path]
            else:
                left[call.path] = reason
    chosen = _choose(network, list(sites), left, gated, prefix)
    for path in sites:
        if path not in chosen:
            left[path] = "it is the stem" if gated is None else "left out by gated="
    return [sites[path] for path in chosen], left


def _obstacle(conv: nn.Module, call: Call, num_runs: int, num_names: int) -> str | None:
    """Return why a convolution cannot be gated; None if it can."""
    if not isinstance(conv, nn.Conv2d):
        return f"{a_class(conv)} is not supported"
    if num_names > 1:
        return f"it is in the network under {num_names} names"
    if num_runs > 1:
        return f"it runs {num_runs} times in a pass"
    if is_parametrized(conv) or conv._forward_pre_hooks or conv._forward_hooks:
        return "it has a parametrization or hooks of its own"
    if call.taken.ndim != 4 or call.taken.shape[2:].numel() == 1:
        return "it works on pooled features, not on an image"
    return None


def _norm_after(layers: dict[str, nn.Module], calls: list[Call], runs: Counter[str]) -> str:
    """Return the name of the BatchNorm that alone takes the first call's output and has no other input, or ""."""
    given = calls[0].given
    path = next((call.path for call in calls[1:] if call.taken is given), "")
    is_alone = calls[0].num_takers == 1 and runs[path] == 1
    return path if is_alone and is_batch_norm(layers.get(path)) else ""


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Return whether a norm is a BatchNorm with statistics and without hooks; it may include timm's activation."""
    if not isinstance(norm, PLAIN) or norm.running_mean is None:
        return False
    is_known = type(norm) in PLAIN or type(norm).__name__ == "BatchNormAct2d"
    return is_known and not norm._forward_pre_hooks and not norm._forward_hooks


def _choose(network: nn.Module, paths: list[str], left: dict[str, str], gated: Gated, prefix: str) -> list[str]:
    if gated is None:
        stem = _stem(paths)
        chosen = [path for path in paths if not f"{path}.".startswith(f"{stem}.")]
    else:
        chosen = chosen_by(gated, network, paths, prefix)
        reasons = {prefix + path: reason for path, reason in left.items()}
        names = [prefix + path for path in paths]
        for pattern in [] if callable(gated) else [gated] if isinstance(gated, str) else gated:
            if pattern in reasons:
                raise TransferConfigError(f"gated={pattern!r} cannot be gated: {reasons[pattern]}.")
            if not any(fnmatchcase(name, pattern) for name in [*names, *reasons]):
                raise TransferConfigError(f"gated={pattern!r} matches no convolution. {nearest(pattern, names)}")
    if chosen:
        return chosen
    is_transformer = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
    if len(paths) + len(left) <= is_transformer:
        raise without_filters(network, "only a patch embedding" if is_transformer else "none")
    shown = "; ".join(f"{path}: {reason}" for path, reason in left.items())
    listed = ", ".join(prefix + path for path in paths)
    fix = f"gated='...', a pattern of the names {listed}" if paths else "backbone='...', another network"
    raise TransferConfigError(f"Nothing to gate in {type(network).__name__}: {shown or 'only a stem'}. Pass {fix}.")


def without_filters(network: nn.Module, found: str) -> TransferConfigError:
    """Return the error for a network without convolutions to gate."""
    return TransferConfigError(
        f"AdaFilter gates the filters of convolutions, and {type(network).__name__} has {found}. The other methods "
        "take any network: SoftFinetuning, SelectiveJointFinetuning, GatedTransfer, CollaborativeFinetuning."
    )


def chosen_by(gated: Chosen, network: nn.Module, paths: list[str], prefix: str) -> list[str]:
    """Return the convolutions that are chosen by patterns, or by a function of name and convolution."""
    if callable(gated):
        return [path for path in paths if gated(prefix + path, network.get_submodule(path))]
    patterns = [gated] if isinstance(gated, str) else gated
    return [path for path in paths if any(fnmatchcase(prefix + path, pattern) for pattern in patterns)]


def _stem(paths: list[str]) -> str:
    """Return the outermost part that holds the first convolution and few others; often that convolution itself."""
    parts = paths[0].split(".") if paths else []
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    sizes = ((prefix, sum(path.startswith(f"{prefix}.") for path in paths)) for prefix in prefixes)
    return next((prefix for prefix, size in sizes if size <= STEM * len(paths)), paths[0] if paths else "")
