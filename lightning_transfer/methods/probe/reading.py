"""Read what a probe learns from: the class numbers of a batch, and the input of a head's last Linear."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.batches import class_numbers, kind_of, label_hint, labels_in
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.naming import a_class, nesting
from lightning_transfer.plain_linear import multiplies
from lightning_transfer.roles import Head, is_adapted, linear_layers
from lightning_transfer.tracing import comes_out

HOW = "Say how images run: ProbeStart(forward=lambda module, images: {})."
ADAPT = "ProbeStart(adapt=lambda batch: (batch[0], {}))"
UNMIXED = "ProbeStart(unaugmented=DataLoader(dataset)), with the same images and without that function"


def last_linear(head: Head) -> tuple[str, nn.Linear]:
    """Return the path of a head's last Linear, and the Linear.

    Raises:
        TransferConfigError: it is something else, has no bias, or its weight is computed from others.
    """
    *_, (name, layer) = linear_layers(head.module)
    path, own = f"{head.path}.{name}".rstrip("."), layer._parameters
    if is_adapted(head.module):
        path, found = head.path, "has an adapter of peft (name it in modules_to_save in place of target_modules)"
    elif not isinstance(layer, nn.Linear):
        found = f"ends in {a_class(layer)}"
    elif own.get("weight") is None:
        found = "has a weight that is computed from others (weight_norm, pruning)"
    elif own.get("bias") is None:
        found = "has no bias"
    else:
        return path, layer
    raise TransferConfigError(
        f"The head {path!r} {found}; a probe starts a plain nn.Linear(features, classes, bias=True). Make the head "
        "one, or leave ProbeStart out."
    )


def check_untied(module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a head that shares its weight with another layer, which would start as the probe too."""
    for path, layer in layers.items():
        mine = {layer.weight.data_ptr(), layer.bias.data_ptr()}  # weights may also be tied by their .data
        named = module.named_modules(remove_duplicate=False)  # a second name of the layer itself is not another one
        apart = [(name, other) for name, other in named if other is not layer]
        params = ((f"{name}.{own}", param) for name, other in apart for own, param in other._parameters.items())
        if others := [name for name, param in params if param is not None and param.data_ptr() in mine]:
            raise TransferConfigError(
                f"The head {path!r} shares its numbers with {', '.join(others)}, which would start as the probe too. "
                "Give the head a weight of its own, or leave ProbeStart out."
            )


def images_and_classes(batch: Any, path: str, num_outputs: int, *, what: str = "A batch is") -> tuple[Tensor, Tensor]:
    """Return the images of a batch and their (B,) class numbers.

    Args:
        batch: of the train loader, or what `adapt` made of it.
        path: of the head.
        num_outputs: of the head; with one output there are two classes.
        what: subject and verb that a message begins with.

    Raises:
        TransferConfigError: there are none, or the head does not have these classes.
    """
    images, labels = batch[0] if isinstance(batch, list | tuple) and batch else None, labels_in(batch)
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        where = "batch['image'], batch['label']" if isinstance(batch, dict) else "batch[0], batch[2]"
        where = "batch[0][1], batch[1]" if isinstance(images, list | tuple) else where
        fix = f"Say where they are: ProbeStart(adapt=lambda batch: ({where}))."
        if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(images, Tensor):  # no other place is left
            fix = f"If a collate_fn has mixed the images: {UNMIXED}. If the loader makes no batches, pass batch_size=."
        raise TransferConfigError(
            f"{what} {nesting(batch)}; expected (images, class numbers), and no other entry that may be labels. {fix}"
        )
    kind, numbers = kind_of(labels, num_outputs), class_numbers(labels)
    if kind == "one logit" and bool((labels == labels.round()).all()):
        return images, labels.flatten().long()
    if kind != "class numbers" or numbers is None:
        hint = label_hint(labels, ADAPT)
        if kind == "soft":
            hint += f" If the loader's collate_fn made these labels: {UNMIXED}."
        raise TransferConfigError(
            f"Labels have shape {tuple(labels.shape)} and type {labels.dtype}, and the head {path!r} gives "
            f"{num_outputs} numbers; a probe learns class numbers, one for each image. {hint}{' ' * bool(hint)}If "
            "the task is not classification, leave ProbeStart out."
        )
    least, largest = int(numbers.min()), int(numbers.max())
    if least < 0 or largest >= num_outputs:
        if least < 0:
            fix = "Leave images without a class out of the dataset"
        elif least >= 1 and largest == num_outputs:
            fix = f"If classes count from 1: {ADAPT.format('batch[1] - 1')}. Otherwise give the head more outputs"
        else:
            fix = f"Give the head at least {largest + 1} outputs, or name the classifier: ProbeStart(head='...')"
        raise TransferConfigError(
            f"Some labels run from {least} to {largest}, and the head {path!r} gives {num_outputs} numbers; expected "
            f"class numbers from 0 to {num_outputs - 1}. {fix}."
        )
    return images, numbers


def features_of(path: str, layer: nn.Linear, calls: list[tuple[Tensor, Tensor]], indices: list[int]) -> Tensor:
    """Return the (B, D) features that a Linear took, if it gave their scores.

    Args:
        path: of the layer.
        layer: the last of the head.
        calls: what it took and gave.
        indices: of the images that ran, in the user's dataset.

    Raises:
        TransferConfigError: it did not run once, on a row an image, features are not finite, or it gives something
            else than a Linear does.
    """
    num_images = len(indices)
    if len(calls) != 1:
        raise TransferConfigError(
            f"The head {path!r} ran {len(calls)} times on {num_images} images; expected once. Name the classifier, "
            f"ProbeStart(head='...'). {HOW.format('module.backbone(images)')}"
        )
    taken, given = calls[0]
    if len(taken) != num_images or taken.shape[1:].numel() != layer.in_features:
        raise TransferConfigError(
            f"The head {path!r} takes {tuple(taken.shape)} of {num_images} images; expected one row of "
            f"{layer.in_features} features an image. Name the classifier, ProbeStart(head='...')."
        )
    if bad := (~torch.isfinite(taken).flatten(1).all(1)).nonzero()[:, 0].tolist():
        raise TransferConfigError(
            f"Features of the training images {[indices[row] for row in bad]} are not finite. Look for pixels that are "
            "not finite, or a network that overflows."
        )
    if not multiplies(layer, taken, given):
        raise TransferConfigError(
            f"The head {path!r}, {a_class(layer)}, gives something else than weight x features + bias, as a "
            "normalised (cosine) head does; a probe starts a plain nn.Linear. Make the head one, or leave ProbeStart "
            "out."
        )
    return taken.flatten(1).cpu()


def check_comes_out(path: str, given: Tensor, output: Any) -> None:
    """Refuse a head whose scores are changed before they leave the module: the probe was not fitted to the result.

    Args:
        path: of the head's Linear.
        given: its scores.
        output: of the module, in which these or their probabilities are looked for.

    Raises:
        TransferConfigError: the output has as many numbers, and they are others.
    """
    if not comes_out(given, output):
        raise TransferConfigError(
            f"The module changes the scores of the head {path!r}: it scales them, or combines them with those of "
            "another head. The probe is fitted to the scores themselves, so training would not start from it. Leave "
            "ProbeStart out; or, if training_step takes the head's own scores, say how they are made: "
            "ProbeStart(forward=lambda module, images: module.model(images))."
        )
