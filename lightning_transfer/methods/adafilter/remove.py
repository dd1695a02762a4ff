"""Turn a gated network into a plain one: with the tuned filters, the pretrained ones, or a mean of both (ours)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError, check_choice
from lightning_transfer.methods.adafilter.apply import FilterGates, gates_of
from lightning_transfer.methods.adafilter.modules import GatedConv2d, folded
from lightning_transfer.naming import a_class
from lightning_transfer.surgery import FrozenBatchNorm2d, Removal
from lightning_transfer.tracing import share_right


def remove_adafilter(
    module: nn.Module, keep: Literal["tuned", "frozen", "mean"] = "tuned", *, loader: Iterable[Any] | None = None
) -> Removal:
    """Turn a gated network into a plain one, in place, with the layers, names and weights of the user's own class.

    A plain network cannot choose for each image, so its outputs differ from the gated network's. Pass a loader to
    measure what that costs.

    Args:
        module: a gated network, or a module that holds one.
        keep: "tuned" filters, "frozen" ones (the pretrained network except for its stem and head), or the "mean" of
            both, weighted by how often the gates chose each on the loader. BatchNorms are folded into mean filters: use
            those for inference, not for further training.
        loader: batches of (images, labels) as the forward takes them; "mean" needs them.

    Returns:
        Accuracies on the loader.

    Raises:
        TransferConfigError: the network is not gated, or a mean cannot be taken.

    Example:
        >>> from lightning_transfer.functional import apply_adafilter
        >>> flat = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *flat)
        >>> report = apply_adafilter(network)
        >>> remove_adafilter(network, keep="frozen")
        Removal(accuracy_before=None, accuracy_after=None)
        >>> network[1]
        Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    check_choice("keep", keep, ("tuned", "frozen", "mean"))
    gates = gates_of(module)
    if gates is None:
        raise TransferConfigError(f"{type(module).__name__} is not gated: there is nothing to remove.")
    if keep == "mean" and gates.gate is None:
        raise TransferConfigError(
            f"keep='mean' needs learned gates, not {gates.estimator!r} ones. Pass keep='tuned' or keep='frozen'."
        )
    if keep == "mean" and loader is None:
        raise TransferConfigError(
            "keep='mean' averages the gates over images: pass loader=, batches of (images, labels)."
        )
    shares, before = _run(module, gates, loader)
    if keep == "mean":
        for site, layer in zip(gates.sites, gates.layers, strict=True):
            if not layer.is_linear:
                raise TransferConfigError(
                    f"{site.conv} is {a_class(layer.tuned)}, whose weights cannot be averaged. Pass "
                    "keep='tuned' or keep='frozen'."
                )
        for site, layer in zip(gates.sites, gates.layers, strict=True):
            _average(layer, shares[site.conv])
    elif keep == "frozen":
        for layer in gates.layers:
            _reset(layer)
    gates.take_out(module)
    return Removal(before, share_right(module, loader))


def _run(module: nn.Module, gates: FilterGates, loader: Iterable[Any] | None) -> tuple[dict[str, Tensor], float | None]:
    """Return how often each gate was open, (filters,) for each layer, and the share of images classified right."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add() -> None:
        for path, chosen in gates.last_gates().items():
            sums[path] = sums.get(path, 0) + chosen.double().sum(0)
            counts[path] = counts.get(path, 0) + len(chosen)

    right = share_right(module, loader, after=add)
    return {path: total / counts[path] for path, total in sums.items()}, right


@torch.no_grad()
def _average(layer: GatedConv2d, share: Tensor) -> None:
    """Replace the two copies of each filter by their mean, weighted by the (filters,) shares."""
    share = share.to(layer.tuned.weight)
    if layer.norm is None:
        for mine, frozen in zip(layer.tuned.parameters(), layer.frozen.buffers(), strict=True):
            mine.copy_(torch.lerp(frozen, mine, share.view(-1, *[1] * (mine.ndim - 1))))
        return
    norm: Any = layer.norm.tuned
    weight, bias = folded(layer.tuned, FrozenBatchNorm2d(norm))
    frozen_weight, frozen_bias = folded(layer.frozen, layer.norm.frozen)
    layer.tuned.weight.copy_(torch.lerp(frozen_weight, weight, share[:, None, None, None]))
    if layer.tuned.bias is not None:
        layer.tuned.bias.zero_()
    norm.running_mean.copy_(-torch.lerp(frozen_bias, bias, share))
    norm.running_var.fill_(1 - norm.eps)
    if norm.affine:
        norm.weight.fill_(1)
        norm.bias.zero_()


@torch.no_grad()
def _reset(layer: GatedConv2d) -> None:
    """Copy the pretrained weights and statistics over the tuned ones."""
    for name, param in layer.tuned.named_parameters():
        param.copy_(layer.frozen.get_buffer(name))
    if layer.norm is not None:
        for name, kept in layer.norm.frozen.named_buffers():
            getattr(layer.norm.tuned, name).copy_(kept)
