"""Find the head of a user's network; if several parts may be the head, an error names them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_transfer.errors import TransferConfigError, nearest
from lightning_transfer.naming import a_class
from lightning_transfer.surgery import is_ours
from lightning_transfer.tracing import LAYERS, evaluating, run_on_a_picture
from lightning_transfer.twins import only_copies_run

HEAD_NAMES = ("fc", "classifier", "head", "heads")
FORWARDLESS = ("torch.nn.modules.module", "lightning.pytorch.core.module", "pytorch_lightning.core.module")


@dataclass(frozen=True)
class Head:
    """Holds the module that turns features into the target's logits, and its place.

    Attributes:
        path: dotted name from the LightningModule.
        module: the head itself.
    """

    path: str
    module: nn.Module

    @property
    def network_path(self) -> str:
        """Return the outermost child of the user's module that holds the head; the head's own path if it is apart."""
        return self.path.partition(".")[0]


def has_forward(module: nn.Module) -> bool:
    """Return whether a module has a forward of its own; a LightningModule may have only its steps."""
    return "forward" in vars(module) or type(module).forward.__module__ not in FORWARDLESS


def users_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `named_modules` without the parts that this package attached."""
    ours = tuple(f"{name}." for name, child in module.named_modules() if is_ours(child))
    return ((name, child) for name, child in module.named_modules() if not f"{name}.".startswith(ours))


def parameters_before(module: nn.Module, head_path: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of the user's network outside its head."""
    return (
        param
        for name, child in users_modules(module)
        if not f"{name}.".startswith(f"{head_path}.")
        for param in child.parameters(recurse=False)
    )


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in `module`, itself included, that can end a classifier: Linears, and a head's convolutions."""
    for name, child in users_modules(module):
        if isinstance(child, nn.Linear | nn.Conv2d):
            yield name, child


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the Linears of the user in `module`, itself included."""
    return ((name, child) for name, child in users_modules(module) if isinstance(child, nn.Linear))


def is_pooling(head: nn.Module) -> bool:
    """Return whether a head is convolutions and then a global pool, as SqueezeNet's is: it gives one row an image."""
    layers = list(head.modules())
    last = max((number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)), default=len(layers))
    pools = (layer for layer in layers[last:] if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d))
    return not has_linear(head) and any(pool.output_size in (1, (1, 1)) for pool in pools)


def pooling_heads(module: nn.Module) -> list[Head]:
    """Return the heads of convolutions that a network without any Linear has by a usual name."""
    return [] if has_linear(module) else _usual_names(module, is_pooling)


def has_linear(module: nn.Module) -> bool:
    """Return whether a Linear of the user is inside."""
    return any(linears(module))


def in_width(head: nn.Module) -> int:
    """Return the number of features that a head takes.

    Raises:
        TransferConfigError: it is a lazy layer, which does not know it before it has run.
    """
    first = next(layer for _, layer in linear_layers(head))
    width = int(first.in_features if isinstance(first, nn.Linear) else first.in_channels)  # type: ignore[arg-type]
    if isinstance(first, LazyModuleMixin) and not width:
        raise TransferConfigError(
            f"The head has {a_class(first)}, whose width is not known before it has run. Run an image through "
            "the network in __init__, or give the width: nn.Linear(features, classes)."
        )
    return width


def out_width(head: nn.Module) -> int:
    """Return the number of outputs of a head."""
    *_, last = (layer for _, layer in linear_layers(head))
    return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)  # type: ignore[arg-type]


def find_head(
    module: nn.Module, head: str = "auto", *, probe: Callable[[], object] | None = None, narrow: bool = True
) -> Head:
    """Find the head of a user's network.

    `"auto"` asks timm's `get_classifier()`, then looks for the usual names (fc, classifier, head, heads), then takes
    the last Linear that `probe` reaches, or else a picture of noise. Without any Linear it takes convolutions with a
    usual name that end in a global pool.

    Args:
        module: the user's module.
        head: a dotted path, or "auto".
        probe: runs the module on an example.
        narrow: whether a container of several layers is narrowed to its last Linear.

    Raises:
        TransferConfigError: nothing is found, or several candidates are; the message lists them.

    Example:
        >>> net = nn.Sequential()
        >>> net.body, net.fc = nn.Linear(4, 3), nn.Linear(3, 2)
        >>> find_head(net).path
        'fc'
    """
    return _whole(module, _named(module, head) if head != "auto" else _searched(module, probe, narrow))


def find_heads(module: nn.Module, head: str, *, probe: Callable[[], object]) -> list[Head]:
    """Find the head of each of several networks that stand side by side, or else the one that `find_head` finds."""
    for path, child in users_modules(module) if head == "auto" else on_the_way(module, head):
        if hasattr(child, "heads_of_members"):
            inside: list[Head] = child.heads_of_members()  # type: ignore[operator]
            return [Head(f"{path}.{inner.path}".lstrip("."), inner.module) for inner in inside]
    return [find_head(module, head, probe=probe)]


def on_the_way(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts on the way from a module along a path, and their names, as far as there are any."""
    part: Any = module
    names = path.split(".")
    for length, name in enumerate(names, start=1):
        part = getattr(part, name, None)
        if not isinstance(part, nn.Module):
            return
        yield ".".join(names[:length]), part


def _whole(module: nn.Module, head: Head) -> Head:
    """Return the head together with what this package, or an adapter of peft, put around it."""
    for path, part in on_the_way(module, head.path):
        if hasattr(part, "is_whole_head") or is_adapted(part):
            return Head(path, part)
    return head


def is_adapted(layer: nn.Module) -> bool:
    """Return whether this is an adapter of peft around a layer, such as LoRA: layers inside are not the user's own."""
    return not isinstance(layer._modules.get("base_layer"), nn.Sequential | None)  # timm's DLA has a Sequential there


def _searched(module: nn.Module, probe: Callable[[], object] | None, narrow: bool) -> Head:
    for found in (_timm_classifiers(module), pooling_heads(module) or _usual_names(module, has_linear)):
        if len(found) == 1:
            chosen = _narrowed(found[0]) if narrow else found[0]
            if _has_several(module, found[0]):
                _last_linear(module, probe)  # raises if two heads run on the same features
            _check_is_last(module, chosen, probe)
            return chosen
        if found:
            raise _ambiguous(module, [candidate.path for candidate in found], likely=found[0].path)
    reached = _last_linear(module, probe)
    if reached is None:
        names = [name for name, _ in linears(module)]
        raise _ambiguous(module, names, likely=names[-1] if names else "")
    return reached


def _check_is_last(module: nn.Module, chosen: Head, probe: Callable[[], object] | None) -> None:
    """Raise if another Linear takes what the chosen head gives: then it is a hidden layer with a head's name."""
    inside = {id(layer) for _, layer in linear_layers(chosen.module)}
    width = out_width(chosen.module)
    takes_its_output = [
        name for name, layer in linears(module) if id(layer) not in inside and layer.in_features == width
    ]
    last = _last_linear(module, probe) if takes_its_output else None
    if last is not None and last.path in takes_its_output:
        raise _ambiguous(module, [chosen.path, last.path], likely=last.path)


def _named(module: nn.Module, path: str) -> Head:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in linears(module)]
        raise TransferConfigError(
            f"head={path!r} is not a module of {type(module).__name__}. {nearest(path, names)}"
        ) from None
    if not any(linear_layers(found)):
        raise TransferConfigError(f"head={path!r} is {a_class(found)} without a Linear layer: not a classifier.")
    if not (isinstance(found, nn.Conv2d) or has_linear(found) or is_pooling(found)):
        raise TransferConfigError(
            f"head={path!r} ends in a convolution without a global pool after it: it gives a map for each image, "
            "where one row is expected. Per-pixel heads are not supported; name the part that pools too."
        )
    _has_several(module, Head(path, found))
    return Head(path, found)


def _timm_classifiers(module: nn.Module) -> list[Head]:
    found: dict[int, Head] = {}
    children = list(users_modules(module))
    paths = {id(child): name for name, child in children}
    for _, child in children:
        if not hasattr(child, "get_classifier"):
            continue
        classifier: Any = child.get_classifier()  # type: ignore[operator]
        for part in classifier if isinstance(classifier, tuple | list) else (classifier,):
            if id(part) in paths and any(linear_layers(part)):
                found[id(part)] = Head(paths[id(part)], part)
    return list(found.values())


def _usual_names(module: nn.Module, is_head: Callable[[nn.Module], bool]) -> list[Head]:
    """Return the outermost candidates by name: a block's own `fc` is not the classifier."""
    named = [
        Head(name, child)
        for name, child in users_modules(module)
        if name.rpartition(".")[2] in HEAD_NAMES and is_head(child)
    ]
    depth = min((head.path.count(".") for head in named), default=0)
    return [head for head in named if head.path.count(".") == depth]


def _narrowed(head: Head) -> Head:
    """Return the last Linear of a container: what runs before it is shared by both tasks."""
    found = list(linears(head.module))
    if not found:
        return head
    name, layer = found[-1]
    return Head(f"{head.path}.{name}".rstrip("."), layer)


def _has_several(module: nn.Module, head: Head) -> bool:
    """Return whether a part with a head's name may hold several heads side by side; raise if it only lists them."""
    last = _narrowed(head)
    width = getattr(last.module, "in_features", None)
    others = [
        f"{head.path}.{name}"
        for name, layer in linear_layers(head.module)
        if layer is not last.module
        and isinstance(layer, nn.Linear)
        and layer.in_features == width != layer.out_features
    ]
    if others and not has_forward(head.module):
        raise _ambiguous(module, [*others, last.path], likely=last.path)
    return bool(others)


def _last_linear(module: nn.Module, probe: Callable[[], object] | None) -> Head | None:
    """Return the Linear that runs last when `probe` does, or else when a copy of the module runs on a picture."""
    found = _reached(module, probe) if probe else None
    try:
        twin = None if found else copy.deepcopy(module)
    except Exception:  # a part of the user's may not be copied
        twin = None
    if twin is not None:
        with only_copies_run(module, twin):
            found = _reached(twin, lambda: run_on_a_picture(twin)) if has_forward(twin) else None
            path, part = _whole_network(twin)
            if found is None and path:  # the module's forward takes no picture alone; does the part with all Linears?
                found = _reached(twin, lambda: run_on_a_picture(part))
    return found and Head(found.path, module.get_submodule(found.path))


def _whole_network(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the name of the child that can be called and holds every Linear, and it; "" and the module without one."""
    names = {name.partition(".")[0] for name, _ in linears(module)}
    parts = [(name, module.get_submodule(name)) for name in names if name]
    return parts[0] if len(parts) == 1 and has_forward(parts[0][1]) else ("", module)


def _reached(module: nn.Module, probe: Callable[[], object]) -> Head | None:
    """Return the layer that runs last when `probe` does, if it is a Linear; in eval mode.

    After the last Linear of a transformer without a head its last norm runs.
    """
    reached: list[tuple[Head, Any]] = []  # and what each took

    def note(name: str, layer: nn.Module, args: Any, _: Any) -> None:
        reached.append((Head(name, layer), args))

    with ExitStack() as hooks:
        for name, layer in users_modules(module):
            if isinstance(layer, (*LAYERS, nn.GroupNorm, nn.RMSNorm)):
                hooks.enter_context(layer.register_forward_hook(partial(note, name)))
        try:
            with evaluating(module):
                probe()
        except Exception:  # an example alone may not run, for any reason: then nothing is found
            return None
    last, taken = reached[-1] if reached else (None, ())
    if last is None or not isinstance(last.module, nn.Linear):
        return None
    rivals = {
        head.path: head
        for head, given in reached
        if isinstance(head.module, nn.Linear) and given and taken and given[0] is taken[0]
    }
    if len(rivals) > 1:  # two heads on the same features
        raise _ambiguous(module, [*rivals], likely=last.path)
    return last


def _ambiguous(module: nn.Module, candidates: list[str], *, likely: str) -> TransferConfigError:
    if not candidates:
        children = ", ".join(name for name, _ in module.named_children()) or "no submodules"
        return TransferConfigError(
            f"No classifier found in {type(module).__name__}, which has: {children}. Expected a network "
            "that ends in a Linear layer, or in `classifier`, convolutions and a global pool: one row an image; "
            "detectors and per-pixel heads are not supported."
        )
    several = f"ambiguous: {', '.join(candidates)}. Pass one"
    found = several if len(candidates) > 1 else f"not sure to be {candidates[0]!r}. Pass it"
    return TransferConfigError(f"The head of {type(module).__name__} is {found}: head={likely!r}.")
