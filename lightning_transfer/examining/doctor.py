"""Find what will go wrong in a project, by its module, one step of a copy of it, and its images (ours)."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.compiling import uncompiled
from lightning_transfer.datasets import AnyDataset, origins
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining import held_out, images, pixels
from lightning_transfer.examining import module as of_module
from lightning_transfer.examining.diagnosis import Diagnosis, Finding, listed
from lightning_transfer.examining.step import Seen, step_of
from lightning_transfer.glue.checkpoints import UnsafeCheckpointError, read_checkpoint
from lightning_transfer.glue.loaders import attached, first_batches, served
from lightning_transfer.glue.namespaces import is_lightnings, namespaces_of
from lightning_transfer.glue.trainer import named, options_like, trainer_class
from lightning_transfer.naming import a_class
from lightning_transfer.randomness import reseed, restored
from lightning_transfer.twins import RunsOriginalError


def doctor(
    module: Any,
    data: Any,
    trainer: Any = None,
    *,
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    unaugmented: AnyDataset | None = None,
) -> Diagnosis:
    """Find mistakes in a project before it is trained for hours, and show the code to write.

    It looks for mistakes

    - in one training step of a copy of the module, on a few images: an error of fit, parts in eval mode, frozen
      BatchNorm whose statistics drift, parameters in no optimizer, labels that do not fit, probabilities for logits, a
      loss that is not a mean or that explodes after the step, and images that are not normalised as a pretrained timm
      network expects;
    - in the code: mixed Lightning namespaces, hyperparameters that make a checkpoint unsafe, callbacks in the wrong
      order;
    - in the training images: classes of few images, images in the order of their classes, a head of more outputs than
      classes, a last batch of one image for BatchNorm;
    - in the validation and test images: classes with other numbers than in training, labels that do not fit, another
      scale of the pixels, and images that are also training images. These are found by their files or their places in
      a dataset; if these differ, at most 2,000 images of each are compared.

    A copy of the DataModule is set up. The module, the data and the random state are left as they were; only what the
    DataModule holds that cannot be copied is shared.

    Args:
        module: the LightningModule that is to be trained.
        data: its DataModule, or its train loader.
        trainer: the Trainer that is to train it.
        adapt: turns a batch into (images, labels), for example a dictionary.
        unaugmented: the training images without augmentation, in the same order; by default those of the loader.

    Returns:
        What was found; `print` shows it.

    Raises:
        TransferConfigError: the module is not a LightningModule, or the data neither a DataModule nor a loader.

    Example:
        >>> import lightning as L
        >>> class LitModel(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(48, 2)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self.head(batch[0].flatten(1)), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> few = torch.utils.data.TensorDataset(torch.rand(12, 3, 4, 4), torch.arange(12) % 2)
        >>> print(doctor(LitModel(), torch.utils.data.DataLoader(few, batch_size=4)))
        No findings in LitModel.
    """
    not_checked: list[str] = []
    module = uncompiled(module)  # the step is not compiled
    with restored():
        found = tuple(_findings(module, data, trainer, adapt, unaugmented, not_checked))
    return Diagnosis(type(module).__name__, found, tuple(not_checked))


def _findings(
    module: Any, data: Any, trainer: Any, adapt: Any, unaugmented: Any, not_checked: list[str]
) -> Iterator[Finding]:
    if not isinstance(module, nn.Module):
        raise TransferConfigError(
            f"The first argument is {a_class(module)}; expected the LightningModule, and then its data: "
            "doctor(module, data)."
        )
    make, is_loader = trainer_class(module), _is_loader(data)
    options = {"devices": 1} if trainer is None else options_like(trainer)
    data = data if is_loader else _copied(data)
    mixed = list(of_module.namespaces(module, data, trainer))
    yield from mixed
    yield from of_module.order(trainer)
    datamodule = None if is_loader or isinstance(data, nn.Module) else data
    yield from of_module.hyperparameters({"module": module, **({"datamodule": datamodule} if datamodule else {})})
    # with the random state that the next fit will have, so it splits alike
    loaders = _loaders(data, make, options, not_checked)
    reseed(0, 0)
    loader = loaders.pop("training")
    dataset = _dataset(loader, "training", not_checked)
    batches = _batches(loader, dataset, make)
    epochs = getattr(trainer, "max_epochs", None)
    epochs = epochs if epochs and epochs > 0 else None
    callbacks = () if trainer is None else trainer.callbacks
    step = partial(
        step_of,
        module,
        make=make,
        options=options,
        callbacks=callbacks,
        loader=loader,
        datamodule=datamodule,
        epochs=epochs,
    )
    seen = step(batches)
    _leave_out(seen, not_checked)
    yield from of_module.modes_and_optimizers(seen)
    of_step = [found for found in of_module.loss_and_labels(seen) if not mixed or found.name != "fit fails"]
    yield from of_step
    yield from pixels.not_normalised(seen)
    if dataset is None:
        return

    def again(batch: Any) -> Seen:
        return step([batch])

    find_call = partial(images.call_of, batches[0], seen, adapt)
    names = {finding.name for finding in of_step}
    try:
        of_labels = [*images.labels(loader, dataset, find_call, adapt, again)]
        yield from (finding for finding in of_labels if finding.name not in names)
        names |= {finding.name for finding in of_labels}
    except TransferConfigError as error:
        not_checked.append(f"the labels of all images: {error}")
    if _is_alone(trainer):
        yield from images.last_batch(loader, seen)
    clean = dataset if unaugmented is None else served(loader, unaugmented)
    sides = _held_out(loaders, not_checked)
    if sides:
        fitting = None if "labels do not fit" in names else find_call  # their fix may be that of all labels
        yield from held_out.labels((loader, dataset), sides, fitting, adapt, again, not_checked)
        others = {name: each for name, (_, each) in sides.items()}
        yield from pixels.prepared_otherwise(dataset, clean, others, adapt)
        yield from images.leaks(dataset, clean, others, adapt, not_checked)


def _held_out(loaders: dict[str, Any], not_checked: list[str]) -> dict[str, held_out.Side]:
    """Return the loaders of held-out images, each with its images, by name; those of the same images are one."""
    found = {name: _dataset(each, name, not_checked) for name, each in loaders.items()}
    same: dict[tuple[Any, ...], list[str]] = {}  # validation and test images are often one dataset
    for name, each in found.items():
        if each is not None:
            same.setdefault(tuple(origins(each)), []).append(name)
    return {" and ".join(names): (loaders[names[0]], found[names[0]]) for names in same.values()}


def _is_loader(data: Any) -> bool:
    """Return whether the data is a train loader, and not a DataModule.

    Raises:
        TransferConfigError: it is neither.
    """
    is_loader = isinstance(data, Iterable) and not isinstance(data, Dataset)
    if isinstance(data, type) or not (is_loader or namespaces_of(data)):
        found = f"the class {data.__name__}" if isinstance(data, type) else a_class(data)
        raise TransferConfigError(
            f"The data is {found}; expected a DataModule or a train loader: doctor(module, DataLoader(dataset, "
            "batch_size=32))."
        )
    return is_loader


def _leave_out(seen: Seen, not_checked: list[str]) -> None:
    """Drop what the step cannot show, and say so."""
    if isinstance(seen.error, RunsOriginalError):
        not_checked.append(f"the training step: {seen.error}")
    elif seen.fit_error is not None:
        not_checked.append("the training step, because fit fails before it ends.")
    elif not seen.is_compared and seen.error is None and not seen.skipped:
        not_checked.append(f"optimizers and frozen BatchNorm: no optimizer took a step in {len(seen.losses)} batches.")
    if finetuning := named(seen.callbacks, {"BaseFinetuning"}):
        seen.untrained, seen.drifting = [], []
        not_checked.append(f"optimizers and frozen BatchNorm: {finetuning[0]} changes what is trained during training.")
    if named(seen.callbacks, {"ProbeStart"}):
        not_checked.append("what ProbeStart would refuse: it looks at all training images, before the first step.")
    if len(seen.losses) != 2 and seen.error is None:
        not_checked.append(
            "whether the loss is a mean: this needs automatic optimization and batches of four images or more."
        )


def _is_alone(trainer: Any) -> bool:
    """Return whether one process draws all batches of an epoch."""
    return trainer is None or (trainer.world_size == 1 and trainer.limit_train_batches == 1.0)


def _copied(data: Any) -> Any:
    """Return a copy that can be set up, with the same Trainer; it shares what cannot be copied."""
    trainer = vars(data).get("trainer", vars(data).get("_trainer"))
    try:
        return copy.deepcopy(data, {id(trainer): trainer})
    except Exception:  # whatever the objects in it raise
        return copy.copy(data)


def _batches(loader: Any, dataset: Any, make: type) -> list[Any]:
    """Return the batches of the step.

    Raises:
        TransferConfigError: there are none, or looking at them would take them from the training.
    """
    found = []
    if not isinstance(loader, GeneratorType):
        found = first_batches(loader, make) if dataset is None else images.batches_of(loader, dataset)
    if not found:
        kind = type(loader).__name__ + " of no batch" * (not isinstance(loader, GeneratorType))
        raise TransferConfigError(
            f"The train loader is a {kind}; expected one with batches that can be read again: "
            "DataLoader(dataset, batch_size=32)."
        )
    return found


def _loaders(data: Any, make: type, options: dict[str, Any], not_checked: list[str]) -> dict[str, Any]:
    """Return the loaders that a DataModule has, by what they are for; a loader alone is for training.

    Raises:
        TransferConfigError: it has none for training.
    """
    if not hasattr(data, "train_dataloader"):
        return {"training": data}
    if is_lightnings(type(data).train_dataloader):
        raise TransferConfigError(f"{type(data).__name__} has no train_dataloader; expected a DataModule that has one.")
    found = {}
    with attached(data, make, options):
        data.prepare_data()
        data.setup("fit")
        found["training"] = data.train_dataloader()
        for name, hook in (("validation", "val_dataloader"), ("test", "test_dataloader")):
            if is_lightnings(getattr(type(data), hook)):
                continue
            try:
                if name == "test":
                    data.setup(name)
                each = [one for one in tree_leaves(getattr(data, hook)()) if one is not None]
            except Exception as error:  # the user's
                not_checked.append(f"the {name} images: {type(error).__name__}: {error}")
                continue
            found |= {name if len(each) == 1 else f"{name} {place}": one for place, one in enumerate(each)}
    return found


def _dataset(loader: Any, name: str, not_checked: list[str]) -> Any:
    """Return the images that a loader serves, or say why they cannot be looked at."""
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        not_checked.append(f"the {name} images: {a_class(loader)} does not show its dataset.")
        return None
    if not len(dataset):
        not_checked.append(f"the {name} images: there are none.")
        return None
    if loader.batch_size is None and loader.batch_sampler is None:
        not_checked.append(f"the {name} images: with batch_size=None, the dataset gives whole batches.")
        return None
    try:
        return served(loader)
    except TransferConfigError as error:
        not_checked.append(f"the {name} images: {error}")
        return None


def examine_checkpoint(path: str | os.PathLike[str]) -> Diagnosis:
    """Look for what is wrong with a checkpoint, without running what it says.

    Raises:
        TransferConfigError: the file is not a Lightning checkpoint.
    """
    try:
        weights = read_checkpoint(path, weights_only=True)["state_dict"]
    except UnsafeCheckpointError as error:
        found, fix = str(error).partition(". ")[0], "self.save_hyperparameters(ignore=[...]), for new checkpoints"
        return Diagnosis(str(path), (Finding("unsafe checkpoint", str(path), found, fix),))
    bad = [key for key, value in weights.items() if isinstance(value, Tensor) and not _is_finite(value)]
    broken = Finding(
        "weights that are not numbers",
        listed(bad),
        f"{len(bad)} of {len(weights)} tensors hold NaN or infinity: the run has diverged",
        "an earlier checkpoint; and gradient_clip_val=1.0, or a lower learning rate",
    )
    return Diagnosis(str(path), (broken,) if bad else ())


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
