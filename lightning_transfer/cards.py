"""Write the card of an exported network: how it is loaded, how its images are prepared, how it was trained."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_transfer.naming import options_of
from lightning_transfer.options import is_list
from lightning_transfer.version import __version__

WEIGHTS = "model.safetensors"  # timm's name
PAPERS = {
    "SoftFinetuning": "https://arxiv.org/abs/1909.02236",
    "SourceKnowledge": "https://arxiv.org/abs/1606.09282",
    "SelectiveJointFinetuning": "https://arxiv.org/abs/1702.08690",
    "AdaFilter": "https://arxiv.org/abs/1911.09659",
    "GatedTransfer": "https://arxiv.org/abs/1810.12521",
    "CollaborativeFinetuning": "https://doi.org/10.7717/peerj-cs.2107",
    "ProbeStart": "https://arxiv.org/abs/2202.10054",
    "FrozenStatistics": "https://arxiv.org/abs/2202.10054",
}


def _plain(text: object) -> str:
    """Return a text that neither ends a line nor a cell of a table."""
    return " ".join(str(text).split()).replace("|", r"\|")


def card(
    name: str,
    prepared: dict[str, Any],
    num_classes: int,
    classes: Sequence[str] | None,
    trainer: Any,
    *,
    size: tuple[int, int] | None,
) -> Iterator[str]:
    """Yield the lines of the card.

    Args:
        name: of the network.
        prepared: how timm prepares images, empty for a network that is not timm's.
        num_classes: number of outputs.
        classes: their names; None if they are not known.
        trainer: of the training; None if it is not known.
        size: height and width of the images that the network was validated on; None if they are not known.
    """
    yield from ("---", f"library_name: {'timm' if prepared else 'pytorch'}", "pipeline_tag: image-classification")
    yield from ("tags:", "- image-classification", "- transfer-learning", "---", f"# {name}, fine-tuned", "")
    made = "one output" if num_classes == 1 else f"{num_classes} classes"
    names = f": {', '.join(map(_plain, classes))}" if classes else ""
    yield f"Written by lightning_transfer {__version__}; {made}{names}."
    yield from ("", "## Use", "", "```python")
    if prepared:
        yield from ("import timm", "", 'network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()')
        yield "config = timm.data.resolve_model_data_config(network)"
        yield "transform = timm.data.create_transform(**config, is_training=False)  # from a PIL image"
    else:
        yield from ("from safetensors.torch import load_model", "", "")
        yield "network = ...  # built as it was for training, without what lightning_transfer attached"
        yield f'load_model(network, "{WEIGHTS}")'
    yield "```"
    if prepared:
        yield from ("", "## Images", "")
        yield "The code above makes the transform of timm's configuration, which config.json holds. If the images of"
        yield "the training were prepared in another way, prepare yours in that way."
        yield from ("", "| option | value |", "|---|---|")
        yield from (f"| {key} | {list(value) if is_list(value) else value} |" for key, value in prepared.items())
    elif size is not None:
        yield from ("", "## Images", "", f"The network was validated on images of {size[0]} x {size[1]} pixels.")
    if trainer is not None:
        yield from _training(trainer)


def _given(callback: Any) -> Iterator[str]:
    """Yield a callback's options, but not those that are None by default and in this one too."""
    known = inspect.signature(type(callback)).parameters
    for name, value in options_of(callback).items():
        if value is not None or (name in known and known[name].default is not None):
            yield f"{name}={value}"


def _training(trainer: Any) -> Iterator[str]:
    """Yield what a Trainer knows of the training: nothing of it if the Trainer only tested the network."""
    yield from ("", "## Training", "")
    if trainer.global_step:
        steps, epochs = trainer.global_step, trainer.current_epoch
        yield from (f"{steps} step{'s' * (steps != 1)}, {epochs} epoch{'s' * (epochs != 1)}.", "")
        ours = [callback for callback in trainer.callbacks if type(callback).__name__ in PAPERS]
        for callback in ours:
            name, source = (type(thing).__name__ for thing in (callback, getattr(callback, "source", None)))
            yield f"- {name}({', '.join(_given(callback))}), {PAPERS.get(source, PAPERS[name])}"
        if not ours:
            yield "No callback of lightning_transfer."
    else:
        yield "Not known: the Trainer that was given to `export` has taken no training step."
    if metrics := trainer.callback_metrics:
        yield from ("", "## Last metrics of the run", "", "| metric | value |", "|---|---|")
        yield from (f"| {_plain(key)} | {float(value):.4g} |" for key, value in sorted(metrics.items()))
