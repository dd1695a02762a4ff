"""Several networks in the place of somebody's one, and one alone again."""

import os
from collections.abc import Mapping
from functools import partial
from typing import TypeAlias

from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.collaborative.members import OWN, Sources, last_classifier, make_members, named
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.plan import LayerPlan
from lightning_transfer.roles import Head, find_head, find_network, has_forward, in_width, out_width
from lightning_transfer.surgery import Structure, SurgeryReport, find_all, is_ours, replace_modules
from lightning_transfer.tracing import trace

Frozen: TypeAlias = LayerPlan | Mapping[str, int] | str | os.PathLike[str] | None


def apply_collaborative(
    module: nn.Module, sources: Sources, *, model: str = "auto", frozen_layers: Frozen = None
) -> SurgeryReport:
    """Put other networks beside a module's own, in place: from there on it gives the mean of their logits.

    Args:
        module: holds the network.
        sources: the others, which are copied, or names of timm's; in a list, or by name. Their heads are new.
        model: dotted name of the network that takes pictures and gives logits, or features if its head stands apart;
            "auto" takes the part of a LightningModule that holds all convolutions.
        frozen_layers: how many convolutions are frozen, counted from the input, by network: {"own": 4, "source1": 9};
            or a LayerPlan, or where one was saved.

    Returns:
        The network's name, and how many numbers came in that are trained.

    Raises:
        TransferConfigError: no such network is found, or it is an ensemble already.

    Example:
        >>> flat = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> module = nn.ModuleDict({"net": flat()})
        >>> apply_collaborative(module, {"places": flat()}, model="net")
        SurgeryReport(replaced=('net',), added_parameters=122, left={})
    """
    path, own = _find(module, model)
    head = _head_apart(module, path, own)
    example = getattr(module, "example_input_array", None)
    apart, place = (None, path) if head is None else ((module, path), head.path)
    ensemble = CollaborativeEnsemble(make_members(own, named(sources), example, head=head), apart=apart)
    plan = as_plan(frozen_layers)
    if plan.num_layers:
        counts = {name: len(depth.convs) for name, depth in ensemble.depths(example).items()}
        if dict(plan.num_layers) != counts:
            raise TransferConfigError(
                f"The LayerPlan is one for {dict(plan.num_layers)} convolutions; here there are {counts}. Search again."
            )
    ensemble.freeze(plan.frozen, example)
    ensemble.put(module, place)
    others = [ensemble.members[name] for name in ensemble.names[1:]]
    added = sum(param.numel() for other in others for param in other.parameters() if param.requires_grad)
    return SurgeryReport((place,), added)


def _head_apart(module: nn.Module, path: str, own: nn.Module) -> Head | None:
    """Return the head of a network that gives features; None for one that gives its logits itself.

    Raises:
        TransferConfigError: there are no logits, or it is not clear where.
    """
    found: list[Head | None] = []
    for find in (partial(last_classifier, own, OWN), partial(find_head, module)):
        try:
            found.append(find())
        except TransferConfigError as error:
            found.append(None)
            reason = error
    inner, outer = found
    is_apart = outer is not None and not f"{outer.path}.".startswith(f"{path}.")
    if outer is not None and is_apart and (inner is None or out_width(inner.module) == in_width(outer.module)):
        return outer
    if inner is None:
        raise TransferConfigError(
            f"{path!r} of {type(module).__name__} gives no logits. Other networks are put beside one that turns "
            f"pictures into logits: hold it in one attribute, self.model = network, or name it, model='...'. ({reason})"
        )
    return None


def as_plan(frozen_layers: Frozen) -> LayerPlan:
    """How many convolutions of each network are frozen, and of how many, where a plan tells.

    Raises:
        TransferConfigError: it is something else.
    """
    if isinstance(frozen_layers, str | os.PathLike):
        return LayerPlan.load(frozen_layers)
    if isinstance(frozen_layers, LayerPlan):
        return frozen_layers
    if frozen_layers is None or isinstance(frozen_layers, Mapping):
        return LayerPlan(dict(frozen_layers or {}), {})
    raise TransferConfigError(
        f"frozen_layers={frozen_layers!r}; it takes counts by network, {{'own': 4}}, a LayerPlan, or its path."
    )


def _find(module: nn.Module, model: str) -> tuple[str, nn.Module]:
    changed = [path for path, child in module.named_modules() if isinstance(child, Structure) or is_ours(child)]
    if changed:
        raise TransferConfigError(
            f"{type(module).__name__} has parts of other methods, {', '.join(changed)}. Several networks are put "
            "beside a plain one: remove those first."
        )
    path, _ = find_network(module, model, argument="model")
    if not path:
        raise TransferConfigError(
            f"{type(module).__name__} is itself what takes the pictures, and nothing can stand in its place. Name the "
            f"network, or the part of it that images enter, model={_enters(module)!r}, or hold the network in one "
            "attribute, self.model = network; or use nn.CollaborativeEnsemble({...})."
        )
    return path, module.get_submodule(path)


def _enters(module: nn.Module) -> str:
    """Return the outermost part that a picture enters first and that can be called; "model" if none is found."""
    try:
        names = trace(module, getattr(module, "example_input_array", None))[0].path.split(".")
    except TransferConfigError:
        return "model"
    paths = (".".join(names[:length]) for length in range(1, len(names) + 1))
    return next((path for path in paths if has_forward(module.get_submodule(path))), "model")


def find_ensemble(module: nn.Module) -> tuple[str, CollaborativeEnsemble] | None:
    """The ensemble inside of a module, and its dotted name."""
    return next(iter(find_all(module, CollaborativeEnsemble).items()), None)


def remove_collaborative(module: nn.Module, keep: str = OWN) -> None:
    """Put one network, as trained and with nothing of it frozen, back in the ensemble's place.

    Args:
        module: holds the ensemble.
        keep: the network's name, or "best": the one that was right most often in the last validation.

    Raises:
        TransferConfigError: there is no ensemble, or no such network.
    """
    found = find_ensemble(module)
    if found is None:
        raise TransferConfigError(f"{type(module).__name__} holds no ensemble: there is nothing to remove.")
    path, ensemble = found
    replace_modules(module, {path: ensemble.alone(ensemble.best if keep == "best" else keep)})
