"""Hand a trained network on: its weights in a folder that timm reads, with a card that says how they were made."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import options_of
from lightning_transfer.networks import find_network
from lightning_transfer.roles import find_head, out_width
from lightning_transfer.surgery import Structure, find_all
from lightning_transfer.tracing import evaluating
from lightning_transfer.version import __version__

WEIGHTS = "model.safetensors"  # timm's name
PAPERS = {
    "SoftFinetuning": "https://arxiv.org/abs/1909.02236",
    "SelectiveJointFinetuning": "https://arxiv.org/abs/1702.08690",
    "AdaFilter": "https://arxiv.org/abs/1911.09659",
    "GatedTransfer": "https://arxiv.org/abs/1810.12521",
    "CollaborativeFinetuning": "https://doi.org/10.7717/peerj-cs.2107",
    "ProbeStart": "https://arxiv.org/abs/2202.10054",
}


def export(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    trainer: Any = None,
    classes: Sequence[str] | None = None,
    onnx: bool = False,
) -> Path:
    """Write a trained network to a new folder: weights, a card, and for a timm network what timm loads it by.

    A network of timm's is loaded again before the folder is there, so that what was written is known to work:
    `timm.create_model("local-dir:FOLDER", pretrained=True)`. Of any other network the folder holds the weights.

    Args:
        module: the LightningModule that was trained, or its network.
        folder: a folder that does not exist or is empty.
        trainer: the Trainer, whose callbacks, steps and last metrics the card then names.
        classes: their names, in the order of the outputs.
        onnx: whether to write `model.onnx` too, for any number of images; needs onnx and onnxscript.

    Returns:
        The folder.

    Raises:
        TransferConfigError: the network has layers that other programs do not know, its head is outside of it, the
            folder holds something, or timm does not load what was written.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     sorted(path.name for path in export(network, Path(place, "mine")).iterdir())
        ['README.md', 'model.safetensors']
    """
    path, network = find_network(module, argument="network")
    _check_plain(network)
    head = find_head(module)
    if not f"{head.path}.".startswith(f"{path}." if path else ""):
        raise TransferConfigError(
            f"The head {head.path!r} is not in {path!r}, which takes the images, and one network is exported. Put both "
            "into one, nn.Sequential(module.backbone, module.head), and export that."
        )
    num_classes = out_width(head.module)
    if classes is not None and len(classes) != max(num_classes, 2):
        raise TransferConfigError(f"classes names {len(classes)} classes, and the head gives {num_classes} numbers.")
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise TransferConfigError(f"{place} holds something already. Name a folder that does not exist.")
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name[:40]}."))
    try:
        is_timm = _is_timm(network)
        if is_timm:
            _write_for_timm(network, part, classes)
        else:
            save_model(network, str(part / WEIGHTS))
        if onnx:
            _write_onnx(network, getattr(module, "example_input_array", None), part / "model.onnx")
        text = "\n".join(_card(network, is_timm, num_classes, classes, trainer))
        (part / "README.md").write_text(text, encoding="utf-8")
        part.chmod(0o755)
        part.replace(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return place


def _check_plain(network: nn.Module) -> None:
    for path, structure in find_all(network, Structure).items():
        raise TransferConfigError(
            f"The network has layers of {structure.callback} ({path or type(network).__name__}), which other programs "
            "do not know. Make it plain first: functional.remove_adafilter, remove_gated_transfer or "
            "remove_collaborative, which say what that costs; strip or export what they leave."
        )


def _is_timm(network: nn.Module) -> bool:
    return type(network).__module__.startswith("timm.") and bool(getattr(network, "pretrained_cfg", None))


def _write_for_timm(network: Any, folder: Path, classes: Sequence[str] | None) -> None:
    """Write timm's files, load them again, and compare.

    Raises:
        TransferConfigError: timm does not load them, or loads other weights.
    """
    import timm
    from timm.models import save_for_hf

    names = None if classes is None else {"label_names": list(classes)}
    try:
        save_for_hf(network, str(folder), model_config=names, safe_serialization=True)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
        mine = network.state_dict()
        if again.keys() != mine.keys() or not all(torch.equal(again[key], mine[key].cpu()) for key in mine):
            raise ValueError("the weights that it loads are others")
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise TransferConfigError(
            f"timm does not load this {type(network).__name__} again: {error}. If you replaced layers by hand, let "
            "timm do it before training: network.reset_classifier(num_classes). To write the weights alone, export "
            "nn.Sequential(network)."
        ) from error


def _write_onnx(network: Any, example: Any, path: Path) -> None:
    """Write a network for any number of images.

    Raises:
        TransferConfigError: the size of an image is not known, or onnx is missing.
    """
    size = (getattr(network, "pretrained_cfg", None) or {}).get("input_size")
    if not isinstance(example, Tensor) and size is None:
        raise TransferConfigError(
            "The size of an image is not known, which onnx=True needs. Set example_input_array in the LightningModule."
        )
    param = next(network.parameters())
    shape: Any = example.shape[1:] if isinstance(example, Tensor) else size
    images = torch.zeros(2, *shape, dtype=param.dtype, device=param.device)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with evaluating(network):
            torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except ModuleNotFoundError as error:
        raise TransferConfigError("onnx=True needs onnx and onnxscript: pip install onnx onnxscript.") from error


def _card(network: Any, is_timm: bool, num_classes: int, classes: Sequence[str] | None, trainer: Any) -> Iterator[str]:
    """Yield the lines of the card."""
    name = network.pretrained_cfg["architecture"] if is_timm else type(network).__name__
    yield from ("---", f"library_name: {'timm' if is_timm else 'pytorch'}", "pipeline_tag: image-classification")
    yield from ("tags:", "- image-classification", "- transfer-learning", "---", f"# {name}, fine-tuned", "")
    made = "one output" if num_classes == 1 else f"{num_classes} classes"
    yield f"Trained with lightning_transfer {__version__}; {made}{': ' + ', '.join(classes) if classes else ''}."
    yield from ("", "## Use", "", "```python")
    if is_timm:
        yield from ("import timm", "", 'network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()')
        yield "# give it images prepared as those that it was trained on"
    else:
        yield from ("from safetensors.torch import load_model", "", "network = ...  # built as it was for training")
        yield f'load_model(network, "{WEIGHTS}")'
    yield "```"
    if trainer is None:
        return
    yield from ("", "## Training", "", f"{trainer.global_step} steps, {trainer.current_epoch} epochs.", "")
    for callback in trainer.callbacks:
        if paper := PAPERS.get(name := type(callback).__name__):
            given = ", ".join(f"{key}={value}" for key, value in options_of(callback).items() if value is not None)
            yield f"- {name}({given}), {paper}"
    if metrics := trainer.callback_metrics:
        yield from ("", "## Last metrics of the run", "", "| metric | value |", "|---|---|")
        yield from (f"| {key} | {float(value):.4g} |" for key, value in sorted(metrics.items()))
