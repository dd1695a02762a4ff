"""Several networks in the place of somebody's one, and one alone again."""

import os
from collections.abc import Mapping
from typing import TypeAlias

from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.collaborative.members import OWN, Sources, last_classifier, make_members, named
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.plan import LayerPlan
from lightning_transfer.roles import find_network
from lightning_transfer.surgery import Structure, SurgeryReport, find_all, is_ours, replace_modules

Frozen: TypeAlias = LayerPlan | Mapping[str, int] | str | os.PathLike[str] | None


def apply_collaborative(
    module: nn.Module, sources: Sources, *, model: str = "auto", frozen_layers: Frozen = None
) -> SurgeryReport:
    """Put other networks beside a module's own, in place: from there on it gives the mean of their logits.

    Args:
        module: holds the network.
        sources: the others, which are copied, or names of timm's; in a list, or by name. Their heads are new.
        model: dotted name of the network that takes pictures and gives logits; "auto" takes the part of a
            LightningModule that holds all convolutions.
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
    try:
        last_classifier(own, OWN)
    except TransferConfigError as error:
        raise TransferConfigError(
            f"{path!r} of {type(module).__name__} gives no logits. Other networks are put beside one that turns "
            f"pictures into logits: hold it in one attribute, self.model = network, or name it, model='...'. ({error})"
        ) from None
    example = getattr(module, "example_input_array", None)
    ensemble, plan = CollaborativeEnsemble(make_members(own, named(sources), example)), as_plan(frozen_layers)
    if plan.num_layers:
        counts = {name: len(depth.convs) for name, depth in ensemble.depths(example).items()}
        if dict(plan.num_layers) != counts:
            raise TransferConfigError(
                f"The LayerPlan is one for {dict(plan.num_layers)} convolutions; here there are {counts}. Search again."
            )
    ensemble.freeze(plan.frozen, example)
    replace_modules(module, {path: ensemble})
    mine = {id(param) for param in own.parameters()}
    added = sum(param.numel() for param in ensemble.parameters() if param.requires_grad and id(param) not in mine)
    return SurgeryReport((path,), added)


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
            f"{type(module).__name__} is itself what takes the pictures, and nothing can stand in its place. Hold the "
            "network in one attribute, self.model = network; where others beside it have convolutions too, name it, "
            "model='model'; or use nn.CollaborativeEnsemble({...})."
        )
    return path, module.get_submodule(path)


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
