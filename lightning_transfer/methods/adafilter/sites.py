"""Where in a network filters can be gated: convolutions and the BatchNorms that follow them, in the order of a pass."""

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
from lightning_transfer.tracing import Call, trace

STEM = 0.25  # of the convolutions at most (ours)

Chosen = str | Sequence[str] | Callable[[str, nn.Module], bool]
Gated = Chosen | None  # which convolutions; by default all but the stem


@dataclass(frozen=True)
class Site:
    """A convolution that can be gated, and the norm that goes with it.

    Attributes:
        conv: dotted name in the network.
        norm: dotted name of the BatchNorm that takes what it gives, alone and nothing else; "" where there is none.
    """

    conv: str
    norm: str


def find_sites(network: nn.Module, gated: Gated, example: Any = None) -> tuple[list[Site], dict[str, str]]:
    """The convolutions to gate, in the order in which they run, and why the others are left.

    Raises:
        TransferConfigError: there is nothing to gate, or what was asked for by name cannot be.
    """
    if any(is_lazy(param) for param in network.parameters()):
        raise TransferConfigError(f"{type(network).__name__} has lazy layers. Run it once on a batch, then gate it.")
    layers = dict(network.named_modules())
    names = Counter(id(layer) for _, layer in network.named_modules(remove_duplicate=False))
    calls = trace(network, example)
    runs = Counter(call.path for call in calls)
    left = {path: "it does not run on a picture" for path, layer in layers.items() if isinstance(layer, _ConvNd)}
    sites = {}
    for number, call in enumerate(calls):
        if call.path in left and call.path not in sites:
            reason = _obstacle(layers[call.path], call, runs[call.path], names[id(layers[call.path])])
            if reason is None:
                sites[call.path] = Site(call.path, _norm_behind(layers, calls[number:], runs))
                del left[call.path]
            else:
                left[call.path] = reason
    chosen = _choose(network, list(sites), left, gated)
    for path in sites:
        if path not in chosen:
            left[path] = "it is the stem" if gated is None else "gated= leaves it out"
    return [sites[path] for path in chosen], left


def _obstacle(conv: nn.Module, call: Call, num_runs: int, num_names: int) -> str | None:
    """Why a convolution cannot be gated."""
    if not isinstance(conv, nn.Conv2d):
        return f"a {type(conv).__name__} is not supported"
    if num_names > 1:
        return f"it is in the network under {num_names} names"
    if num_runs > 1:
        return f"it runs {num_runs} times in a pass"
    if is_parametrized(conv) or conv._forward_pre_hooks or conv._forward_hooks:
        return "it has a parametrization or hooks of its own"
    if call.taken.ndim != 4 or call.taken.shape[2:].numel() == 1:
        return "it works on pooled features, not on a picture"
    return None


def _norm_behind(layers: dict[str, nn.Module], calls: list[Call], runs: Counter[str]) -> str:
    """The BatchNorm that takes what the first call gave, if that alone takes it and it takes nothing else."""
    given = calls[0].given
    behind = next((call.path for call in calls[1:] if call.taken is given), "")
    norm = layers.get(behind)
    is_alone = calls[0].num_takers == 1 and runs[behind] == 1
    return behind if is_alone and is_batch_norm(norm) else ""


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Whether a norm is a BatchNorm with statistics, perhaps with timm's activation behind it, and no hooks."""
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or norm.running_mean is None:
        return False
    is_known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or type(norm).__name__ == "BatchNormAct2d"
    return is_known and not norm._forward_pre_hooks and not norm._forward_hooks


def _choose(network: nn.Module, paths: list[str], left: dict[str, str], gated: Gated) -> list[str]:
    if gated is None:
        stem = _stem(paths)
        chosen = [path for path in paths if not f"{path}.".startswith(f"{stem}.")]
    else:
        chosen = chosen_by(gated, network, paths)
        for pattern in [] if callable(gated) else [gated] if isinstance(gated, str) else gated:
            if pattern in left:
                raise TransferConfigError(f"gated={pattern!r} cannot be gated: {left[pattern]}.")
            if not any(fnmatchcase(path, pattern) for path in [*paths, *left]):
                raise TransferConfigError(f"gated={pattern!r} matches no convolution. {nearest(pattern, paths)}")
    if chosen:
        return chosen
    is_transformer = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
    if len(paths) + len(left) <= is_transformer:
        raise without_filters(network, "only a patch embedding" if is_transformer else "none")
    reasons = "; ".join(f"{path}: {reason}" for path, reason in left.items())
    raise TransferConfigError(
        f"Nothing to gate in {type(network).__name__}: {reasons or 'only a stem'}. Pass "
        f"gated='...', a pattern of the names {', '.join(paths) or 'of another network: backbone=...'}."
    )


def without_filters(network: nn.Module, found: str) -> TransferConfigError:
    """Return the error about a network of another kind than AdaFilter is for."""
    return TransferConfigError(
        f"AdaFilter gates the filters of convolutions, and {type(network).__name__} has {found}. The other methods "
        "take networks of any kind: SoftFinetuning, SelectiveJointFinetuning, GatedTransfer, CollaborativeFinetuning."
    )


def chosen_by(gated: Chosen, network: nn.Module, paths: list[str]) -> list[str]:
    """The convolutions that patterns, or a function of name and convolution, choose."""
    if callable(gated):
        return [path for path in paths if gated(path, network.get_submodule(path))]
    patterns = [gated] if isinstance(gated, str) else gated
    return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]


def _stem(paths: list[str]) -> str:
    """The outermost part of the network that holds the first convolution and few others; as a rule that one alone."""
    parts = paths[0].split(".") if paths else []
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    sizes = ((prefix, sum(path.startswith(f"{prefix}.") for path in paths)) for prefix in prefixes)
    return next((prefix for prefix, size in sizes if size <= STEM * len(paths)), paths[0] if paths else "")
