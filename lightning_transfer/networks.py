"""Find the part of a user's module that images enter."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError, nearest
from lightning_transfer.naming import a_class
from lightning_transfer.roles import Head, has_forward, users_modules
from lightning_transfer.surgery import is_ours

HOW = "Say how images run: a forward of {}, or SourceTask(forward=lambda module, images: module.backbone(images))."


def find_network(module: nn.Module, backbone: str = "auto") -> tuple[str, nn.Module]:
    """Return the dotted path of the part that images enter ("" for the module itself), and the part.

    Args:
        module: the user's module.
        backbone: a dotted path; "auto" takes a plain network itself, and of a LightningModule the one child with
            convolutions, or the whole module if several children have some.

    Raises:
        TransferConfigError: no module has the path, there are no convolutions, or several parts hold them.
    """
    if backbone != "auto":
        try:
            network = module.get_submodule(backbone)
        except AttributeError:
            names = [name for name, _ in users_modules(module) if name]
            raise TransferConfigError(
                f"backbone={backbone!r} is not a module of {type(module).__name__}. {nearest(backbone, names)}"
            ) from None
        return backbone, uncompiled(network)
    if not hasattr(module, "training_step"):  # a plain network
        return "", module
    holders = [
        (name, child)
        for name, child in module.named_children()
        if not is_ours(child) and any(isinstance(part, nn.Conv2d) for part in child.modules())
    ]
    if len(holders) == 1 and has_forward(holders[0][1]):
        name, child = holders[0]
        return name, uncompiled(child)
    if holders and has_forward(module):
        return "", module
    if not holders:
        raise TransferConfigError(
            f"{type(module).__name__} has no convolutions, by which the part that takes images is found. Name it: "
            "backbone='...'."
        )
    known = ", ".join(repr(name) for name, _ in holders)
    raise TransferConfigError(
        f"{type(module).__name__} has several parts with convolutions: {known}. Name one: backbone={holders[0][0]!r}."
    )


def beside(module: nn.Module, head: Head) -> list[tuple[str, nn.Module]]:
    """Return the other children of the user's module that hold parameters, with their names."""
    return [
        (name, child)
        for name, child in module.named_children()
        if child is not head.module and not is_ours(child) and any(True for _ in child.parameters())
    ]


def find_backbone(module: nn.Module, head: Head) -> tuple[str, nn.Module]:
    """Return the name of the one other child that holds parameters, if the head is apart, and the child.

    Raises:
        TransferConfigError: there is none, or more than one.
    """
    others = beside(module, head)
    if len(others) != 1:
        names = ", ".join(name for name, _ in others) or "none"
        raise TransferConfigError(
            f"Expected one backbone beside the head {head.path!r}; found: {names}. {HOW.format(type(module).__name__)}"
        )
    return others[0]


def entry_of(module: nn.Module, head: Head) -> str:
    """Return the path of what can be called on images: the module, the network with its head, or the one beside it.

    Raises:
        TransferConfigError: none of these can be called.
    """
    if has_forward(module):
        return ""
    path = head.network_path if head.network_path != head.path else find_backbone(module, head)[0]
    if not has_forward(part := module.get_submodule(path)):
        raise TransferConfigError(f"{path!r}, {a_class(part)}, takes no images. {HOW.format(type(module).__name__)}")
    return path


def check_timm_name(name: str) -> None:
    """Refuse the name of a network that timm does not have, or has no weights for; nothing is downloaded.

    Raises:
        TransferConfigError: the message names those that are most similar.
    """
    import timm

    if ":" in name:  # of a hub, or a folder
        return
    is_tagged = "." in name.rpartition("/")[2]
    known = timm.list_models(pretrained=True) if is_tagged else timm.list_models()
    if not timm.is_model(name) or (is_tagged and name not in known):
        close = ", ".join(map(repr, difflib.get_close_matches(name, known)))
        guess = f"Did you mean {close}?" if close else "timm.list_models(pretrained=True) lists all."
        raise TransferConfigError(f"timm has no model {name!r}. {guess} A folder is named 'local-dir:FOLDER'.")
    if not timm.is_model_pretrained(name):
        raise TransferConfigError(
            f"timm has no weights for {name!r}; timm.list_models(pretrained=True) has the others."
        )


def loaded(source: nn.Module | str) -> nn.Module:
    """Return a network; for the name of a timm model, with its pretrained weights.

    Raises:
        TransferConfigError: timm has no such model, or its weights cannot be downloaded or read.
    """
    if isinstance(source, nn.Module):
        return source
    import timm

    check_timm_name(source)
    try:
        return timm.create_model(source, pretrained=True)
    except OSError as error:  # of huggingface_hub too, if there is no network
        raise TransferConfigError(
            f"The weights of {source!r} cannot be loaded: {str(error).rstrip('.')}. Without internet, name a folder "
            "that holds config.json and model.safetensors: 'local-dir:FOLDER'. "
            "timm.models.save_for_hf(network, 'FOLDER') writes it, where there is internet."
        ) from error


def timm_name(network: Any) -> str | None:
    """Return the name by which timm makes a network, also one that is compiled; None if timm does not make it so.

    timm does not make networks of other classes, such as one with a timm network inside or one that gives only
    features, nor one whose `pretrained_cfg` names no architecture.
    """
    network = uncompiled(network)
    config = getattr(network, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    is_whole = type(network).__module__.startswith("timm.") and hasattr(network, "reset_classifier")
    return name if is_whole else None
