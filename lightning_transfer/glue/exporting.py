"""Hand a trained network on: its weights in a folder that timm reads, with a card that says how they were made."""

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_transfer.cards import WEIGHTS, card
from lightning_transfer.compiling import uncompiled, uncompiled_path
from lightning_transfer.datasets import known_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.seen_images import warn_of_other_images
from lightning_transfer.image_sizes import check_takes, height_and_width, resized
from lightning_transfer.naming import a_class
from lightning_transfer.networks import find_network, timm_name
from lightning_transfer.roles import find_head, out_width, users_modules
from lightning_transfer.surgery import Structure, find_all
from lightning_transfer.tracing import comes_out, evaluating, required_size, runs_on_a_picture

SAME = 1e-3  # of the largest score; kernels round differently
UNUSUAL = 72, 88  # height and width that no forward resizes to
OPTION = re.compile(r"(Pass|Name) (one|it): (backbone='(?P<child>\w+)|head='(?P<top>\w+)\.|\w+=).*", re.DOTALL)


@torch.random.fork_rng(devices=[])  # timm draws weights before it loads any
def export(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    trainer: Any = None,
    classes: Sequence[str] | None = None,
    onnx: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> Path:
    """Write a trained network to a new folder: weights, a card, and the configuration of a timm network.

    A timm network is loaded again before the folder is created, to test what was written:
    `timm.create_model("local-dir:FOLDER", pretrained=True)`. For any other network, the folder holds the weights and
    the card. What the forward of the module does before or after the network is left out, with a warning. timm's
    configuration has the size, the crop and the normalisation of the pretraining. If yours differ, pass `image_size`,
    or set `pretrained_cfg` of the network before. With a trainer, one batch of its validation images, or else of its
    training images, is read to warn of another size or normalisation.

    Args:
        module: the LightningModule that was trained, or its network.
        folder: a folder that does not exist or is empty.
        trainer: the Trainer, whose callbacks, steps and last metrics the card then names.
        classes: their names, in the order of the outputs.
        onnx: whether to write `model.onnx` too, for any number of images, of `image_size`, the size of
            `example_input_array`, or the one that timm lists; needs onnx and onnxscript.
        image_size: of the images that the network was validated on, one number or height and width. timm's transform
            then resizes images to exactly this size, without a crop.

    Returns:
        The folder.

    Raises:
        TransferConfigError: the network has layers that other programs do not know, its head is outside of it, the
            folder holds something, timm does not load what was written, or the network does not take `image_size`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     sorted(path.name for path in export(network, Path(place, "mine")).iterdir())
        ['README.md', 'model.safetensors']
    """
    if not isinstance(module, nn.Module):
        raise TransferConfigError(
            f"The first argument is {a_class(module)}; expected the module, and then the folder: "
            "lt.export(module, 'mine')."
        )
    if trainer is not None and not hasattr(trainer, "callback_metrics"):
        raise TransferConfigError(f"trainer={trainer!r}; it takes the Trainer that trained the module.")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise TransferConfigError(
            "torch.jit has compiled layers of the module. Export the module before you compile it. If the compiled "
            "layers are outside of the network, export the network alone: lt.export(module.model, folder)."
        )
    module = uncompiled(module)
    _check_plain(module)
    network, num_classes = _network_and_width(module)
    if classes is not None:
        _check_classes(classes, num_classes, trainer)
    if size := height_and_width(image_size):
        check_takes(network, size, name="the network", fix="Pass the size of the images that it was validated on.")
    entries = _entries(network)
    kept = _warn_of_what_is_left_out(module, network)
    place, part = _new_folder(folder)
    try:
        architecture = timm_name(network)
        save_model(SimpleNamespace(state_dict=lambda: dict(entries)), str(part / WEIGHTS))  # type: ignore[arg-type]
        (part / WEIGHTS).chmod(0o644)  # safetensors lets its owner alone read it
        prepared = _write_for_timm(network, entries, part, classes, size) if architecture else {}
        if prepared and trainer is not None:
            warn_of_other_images(trainer, prepared, *kept, has_size=bool(size or required_size(network)))
        if onnx:
            example = getattr(module, "example_input_array", None)
            _write_onnx(network, example, prepared.get("input_size"), part / "model.onnx", size)
        lines = card(architecture or type(network).__name__, prepared, num_classes, classes, trainer, size=size)
        (part / "README.md").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        part.chmod(0o755)
        part.replace(place)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise TransferConfigError(f"The folder {str(place)!r} cannot be written: {error}.") from error
        raise
    return place


def _network_and_width(module: nn.Module) -> tuple[nn.Module, int]:
    """Return the network that takes the images, and the number of its outputs."""
    try:
        path, network = find_network(module)
        head = find_head(module)
    except TransferConfigError as error:
        fix = "Export the network itself: lt.export(module.{}, folder)."
        text = OPTION.sub(lambda found: fix.format(found["child"] or found["top"] or "network"), str(error))
        raise TransferConfigError(text) from error
    if not f"{head.path}.".startswith(f"{path}." if path else ""):
        raise TransferConfigError(
            f"The head {head.path!r} is not in {path!r}, which takes the images, and one network is exported. Put both "
            "into one, nn.Sequential(module.backbone, module.head), and export that."
        )
    return network, out_width(head.module)


def _warn_of_what_is_left_out(module: nn.Module, network: nn.Module) -> tuple[bool, bool]:
    """Warn if the module's forward does more than its network's: the network alone is exported.

    Probabilities of the network's scores are not warned of, because they keep the order of the classes.

    Returns:
        Whether the size of images, and whether their pixels, stay the same, as far as is known.
    """
    ran: dict[nn.Module, tuple[Any, Any]] = {}

    def note(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ran[part] = next(iter((*args, *kwargs.values())), None), output

    with ExitStack() as hooks:
        for part in (module, network):
            hooks.enter_context(part.register_forward_hook(note, with_kwargs=True))
        hooks.enter_context(evaluating(module))
        if not (runs_on_a_picture(module, UNUSUAL) or runs_on_a_picture(module)):
            return True, True  # its forward may take more than images: then nothing is known
        given, output = ran[module]
        if network not in ran:  # only parts of it ran, and it may not take this size
            with suppress(Exception):
                network(given)
    entered, scores = ran.get(network, (None, None))
    names = type(module).__name__, type(network).__name__
    if isinstance(scores, Tensor) and scores.ndim > 1 and scores.is_floating_point():
        rounding = max(SAME, 2 * torch.finfo(scores.dtype).eps)
        if not comes_out(scores, output, alike=rounding):
            warnings.warn(
                f"The forward of {names[0]} gives other outputs than its {names[1]}, as with a logit adjustment, a "
                "temperature or another pooling, and the network alone is exported, so its predictions differ. Change "
                "its outputs in the same way. A logit adjustment can be added to the bias of its head before.",
                stacklevel=4,  # beyond fork_rng too
            )
    if not isinstance(given, Tensor) or not isinstance(entered, Tensor):
        return True, True
    is_same = torch.equal(given, entered)
    if not is_same:
        warnings.warn(
            f"The forward of {names[0]} changes images before its {names[1]} takes them, as a normalisation does, and "
            "the network alone is exported. Give it images that are changed in that way.",
            stacklevel=4,
        )
    return given.shape[-2:] == entered.shape[-2:], is_same


def _check_classes(classes: Any, num_classes: int, trainer: Any) -> None:
    if isinstance(classes, str) or not isinstance(classes, Sequence) or {*map(type, classes)} - {str}:
        raise TransferConfigError(f"classes={classes!r}; it takes a list of names, such as ['ant', 'bee'].")
    if len(classes) != max(num_classes, 2):
        wanted = f"{num_classes} numbers" if num_classes > 1 else "one number; it takes two names, of 0 and of 1"
        raise TransferConfigError(f"classes names {len(classes)} classes, and the head gives {wanted}.")
    known = known_names(getattr(getattr(trainer, "train_dataloader", None), "dataset", None))
    if known and [*classes] != known and sorted(classes) == sorted(known):
        raise TransferConfigError(
            f"classes={[*classes]}; the training images have these classes in another order: classes={known}."
        )


def _entries(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the user's own layers, by the names that they have without torch.compile."""
    own = {name for name, _ in users_modules(network)}
    state = {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] in own}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            what = "sparse" if isinstance(value, Tensor) else a_class(value)
            raise TransferConfigError(f"{key} is {what}, and only dense tensors are exported.")
        if value.isnan().any():
            raise TransferConfigError(f"{key} holds NaN: the training went wrong. Export an earlier checkpoint.")
    return {uncompiled_path(key): value.detach().contiguous() for key, value in state.items()}


def _new_folder(folder: Any) -> tuple[Path, Path]:
    """Return the place of the folder, and a new one beside it to write in."""
    try:
        place = Path(folder)
        if not place.name or place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
            raise ValueError(f"{place} holds something already")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place, Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name[:40]}."))
    except (OSError, ValueError, TypeError) as error:
        raise TransferConfigError(
            f"The folder {str(folder)!r} cannot be written: {error}. Name a folder that does not exist."
        ) from error


def _check_plain(module: nn.Module) -> None:
    for path, structure in find_all(module, Structure).items():
        raise TransferConfigError(
            f"The network has layers of {structure.callback} ({path or type(module).__name__}), which other programs "
            f"do not know. Make it plain first by lt.functional.{structure.remove}(module, loader=...), which returns "
            "what that costs on the loader's images. Then strip or export the result."
        )


def _write_for_timm(
    network: Any,
    entries: dict[str, Tensor],
    folder: Path,
    classes: Sequence[str] | None,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Write what timm makes the network by, load it again, and compare; return how timm prepares its images.

    Raises:
        TransferConfigError: timm does not load it, or loads another network.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.models._hub import save_config_for_hf

    names = None if classes is None else {"label_names": list(classes)}
    described = network
    try:
        if image_size:
            described = copy.copy(network)  # shallow, so that the configuration of the user's network does not change
            known = {key: value for key, value in network.pretrained_cfg.items() if not key.startswith("test_")}
            described.pretrained_cfg = {**resized(known, image_size), "pool_size": None}  # that of other images
        save_config_for_hf(described, str(folder / "config.json"), model_config=names)
        again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        prepared: dict[str, Any] = resolve_model_data_config(again)
        channels, *listed = prepared["input_size"]
        prepared["input_size"] = (channels, *(required_size(again) or listed))
        if fault := _difference(network, entries, again, prepared["input_size"]):
            raise ValueError(fault)
        return prepared
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise TransferConfigError(
            f"timm does not load this {type(network).__name__} again: {error}. If you replaced layers by hand, let "
            "timm do it before training: network.reset_classifier(num_classes). If weights are computed (weight_norm, "
            "pruning), remove the parametrization. To write the weights alone, export nn.Sequential(network)."
        ) from error


def _difference(network: Any, entries: dict[str, Tensor], again: Any, size: Any) -> str:
    """Say what is different in the network that timm loads; "" if it gives the same."""
    loaded = again.state_dict()
    for key, value in entries.items():
        if value.dtype != loaded[key].dtype:
            return f"{key} is {value.dtype}, and timm loads {loaded[key].dtype}; call network.float() first"
        if not torch.equal(value.cpu(), loaded[key]):
            return f"{key} has other values in the network that timm loads"
    device = next(network.parameters()).device
    images = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.compiler.set_stance("force_eager"), evaluating(network, again):
        mine, its = network(images), again.to(device)(images)
        is_same = (mine - its).abs().max() <= SAME * mine.abs().max()
    return "" if is_same else "for the same image it gives other numbers"


def _write_onnx(network: Any, example: Any, size: Any, path: Path, image_size: tuple[int, int] | None) -> None:
    """Write a network for any number of images.

    Raises:
        TransferConfigError: the shape of an image is not known, onnx is missing, or the exporter fails.
    """
    example = example[0] if isinstance(example, tuple | list) and len(example) == 1 else example
    shape = example.shape[1:] if isinstance(example, Tensor) else size
    if shape is None:
        raise TransferConfigError(
            "The shape of an image is not known, which onnx=True needs. Set example_input_array in the LightningModule."
        )
    shape = (shape[0], *(image_size or shape[1:]))
    param = next(network.parameters())
    images = torch.zeros(2, *shape, dtype=param.dtype, device=param.device)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with evaluating(network):
            torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except ModuleNotFoundError as error:
        raise TransferConfigError("onnx=True needs onnx and onnxscript: pip install onnx onnxscript.") from error
    except Exception as error:  # the exporter raises many types
        raise TransferConfigError(f"torch.onnx does not export this {type(network).__name__}: {error}") from error
