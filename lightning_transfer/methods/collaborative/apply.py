"""Put other networks beside a module's own, and remove them again."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.collaborative.heads import last_classifier
from lightning_transfer.methods.collaborative.members import OWN, Sources, by_name, make_members
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.together import Frozen, Together
from lightning_transfer.networks import find_network
from lightning_transfer.roles import Head, find_head, has_forward, in_width, out_width
from lightning_transfer.surgery import Removal, Structure, SurgeryReport, find_all, is_ours, replace_modules
from lightning_transfer.tracing import share_right, trace


def apply_collaborative(
    module: nn.Module, sources: Sources, *, backbone: str = "auto", frozen_layers: Frozen = None
) -> SurgeryReport:
    """Put other networks beside a module's own, in place; the module then gives the mean of their logits.

    Args:
        module: holds the network.
        sources: the other networks, which are copied, or names of timm models; in a list, or by name. Their heads are
            new.
        backbone: dotted name of the network that takes images and gives logits, or features if its head is apart;
            "auto" takes the part of a LightningModule that holds all convolutions.
        frozen_layers: how many convolutions are frozen, counted from the input, by network: {"own": 4, "source1": 9};
            or a LayerPlan, or the path of a saved one.

    Returns:
        The name of what was replaced, and how many trainable parameters were added.

    Raises:
        TransferConfigError: the network is not found, or it is an ensemble already.

    Example:
        >>> flat = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> module = nn.ModuleDict({"net": flat()})
        >>> apply_collaborative(module, {"places": flat()}, backbone="net")
        SurgeryReport(replaced=('net',), added_parameters=122, left={})
    """
    return put_together(module, Together(sources, backbone=backbone, frozen_layers=frozen_layers))


def put_together(module: nn.Module, together: Together) -> SurgeryReport:
    """Do the work of `apply_collaborative`, with its options in one object."""
    path, own = _find(module, together.backbone)
    head = _head_apart(module, path, own)
    example = getattr(module, "example_input_array", None)
    apart, place = (None, path) if head is None else ((module, path), head.path)
    ensemble = CollaborativeEnsemble(make_members(own, by_name(together.sources), example, head=head), apart=apart)
    plan = together.plan
    if plan.num_layers:
        counts = {name: len(depth.convs) for name, depth in ensemble.depths(example).items()}
        if dict(plan.num_layers) != counts:
            raise TransferConfigError(
                f"The LayerPlan was made for networks of {dict(plan.num_layers)} convolutions; these have {counts}. "
                "Search again."
            )
    ensemble.freeze(plan.frozen, example)
    ensemble.put(module, place)
    others = [ensemble.members[name] for name in ensemble.names[1:]]
    added = sum(param.numel() for other in others for param in other.parameters() if param.requires_grad)
    return SurgeryReport((place,), added)


def _head_apart(module: nn.Module, path: str, own: nn.Module) -> Head | None:
    """Return the head of a network that gives features; None for a network that gives logits.

    Raises:
        TransferConfigError: the layer that gives the logits is not found.
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
            f"{path!r} of {type(module).__name__} gives no logits, and other networks are put beside a network that "
            "does. Hold the whole network in one attribute, self.model = network, or name it, backbone='...'. "
            f"({reason})"
        )
    return None


def _find(module: nn.Module, backbone: str) -> tuple[str, nn.Module]:
    changed = [path for path, child in module.named_modules() if isinstance(child, Structure) or is_ours(child)]
    if changed:
        raise TransferConfigError(
            f"{type(module).__name__} has parts of other methods, {', '.join(changed)}. Several networks are put "
            "beside a plain one: remove those parts first."
        )
    path, _ = find_network(module, backbone)
    if not path:
        raise TransferConfigError(
            f"{type(module).__name__} itself takes the images, and it cannot be replaced. Name the network, or the "
            f"part of it that images enter, backbone={_enters(module)!r}, or hold the network in one attribute, "
            "self.model = network; or use nn.CollaborativeEnsemble({...})."
        )
    return path, module.get_submodule(path)


def _enters(module: nn.Module) -> str:
    """Return the outermost part that images enter first and that can be called; "model" if none is found."""
    try:
        names = trace(module, getattr(module, "example_input_array", None))[0].path.split(".")
    except TransferConfigError:
        return "model"
    paths = (".".join(names[:length]) for length in range(1, len(names) + 1))
    return next((path for path in paths if has_forward(module.get_submodule(path))), "model")


def find_ensemble(module: nn.Module) -> tuple[str, CollaborativeEnsemble] | None:
    """Return the ensemble inside a module and its dotted name; None if there is none."""
    return next(iter(find_all(module, CollaborativeEnsemble).items()), None)


def ensemble_of(module: nn.Module) -> CollaborativeEnsemble:
    """Return the ensemble of a module that is known to hold one."""
    return next(iter(find_all(module, CollaborativeEnsemble).values()))


def remove_collaborative(module: nn.Module, keep: str = OWN, *, loader: Iterable[Any] | None = None) -> Removal:
    """Replace the ensemble by one of its networks, as it was trained and with nothing of it frozen.

    Args:
        module: holds the ensemble.
        keep: name of the network, or "best": the most accurate one in the last validation.
        loader: batches of (images, labels) as the forward takes them, to measure what that costs.

    Returns:
        Accuracies on the loader, of all networks together before and of the one that is kept after.

    Raises:
        TransferConfigError: the module holds no ensemble, or no network has this name.

    Example:
        >>> flat = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> module = nn.ModuleDict({"net": flat()})
        >>> report = apply_collaborative(module, {"places": flat()}, backbone="net")
        >>> remove_collaborative(module, keep="places")
        Removal(accuracy_before=None, accuracy_after=None)
        >>> type(module["net"]).__name__
        'Sequential'
    """
    found = find_ensemble(module)
    if found is None:
        raise TransferConfigError(f"{type(module).__name__} holds no ensemble: there is nothing to remove.")
    path, ensemble = found
    before, alone = share_right(module, loader), ensemble.alone(ensemble.best if keep == "best" else keep)
    replace_modules(module, {path: alone})
    return Removal(before, share_right(module, loader))
