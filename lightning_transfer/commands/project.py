"""Read what a LightningCLI file names: a module, its data, and the Trainer that is to train it."""

import copy
import importlib
import os
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from lightning_transfer.advising.advise import LENGTHS
from lightning_transfer.commands.names import check_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.checkpoints import KEY, read_checkpoint, read_layers
from lightning_transfer.glue.loaders import attached, loader_of
from lightning_transfer.glue.namespaces import namespace_of
from lightning_transfer.glue.quiet import silent
from lightning_transfer.glue.trainer import options_like
from lightning_transfer.glue.trials import UNEQUAL
from lightning_transfer.methods.soft.knowledge import SourceKnowledge
from lightning_transfer.methods.statistics.callback import FrozenStatistics
from lightning_transfer.randomness import restored
from lightning_transfer.source.task import SourceTask
from lightning_transfer.stamps import is_stamped

FITS = ("ckpt_path", "weights_only")  # options of fit, that LightningCLI saves beside the rest
RAISING = {"exit_on_error": False}  # raise ArgumentError instead of printing all options


@dataclass(frozen=True)
class Project:
    """Holds the objects that a LightningCLI file names.

    Attributes:
        module: the LightningModule.
        data: the DataModule; the module if that loads its images itself.
        trainer: the Trainer.
        lengths: of the training, as far as the file says: max_epochs and max_steps.
    """

    module: Any
    data: Any
    trainer: Any
    lengths: dict[str, int]

    @property
    def source(self) -> SourceTask | SourceKnowledge | None:
        """Return the source of the first callback that has one."""
        sources = (getattr(callback, "source", None) for callback in self.trainer.callbacks)
        return next((source for source in sources if isinstance(source, SourceTask | SourceKnowledge)), None)

    @property
    def options(self) -> dict[str, Any]:
        """Return options with which a trial trains like the Trainer on one device, and those that trials refuse."""
        kept = {name: value for name in UNEQUAL if (value := getattr(self.trainer, name))}
        return {**options_like(self.trainer), **self.lengths, **kept}

    @property
    def images(self) -> Any:
        """Return the DataModule, or the train loader of a module that loads its images itself."""
        is_own = self.data is self.module
        return loader_of(self.data, type(self.trainer), options_like(self.trainer)) if is_own else self.data


def read_project(
    path: str | os.PathLike[str], *, model: str | None = None, datamodule: str | None = None, is_trained: bool = False
) -> Project:
    """Build what a LightningCLI file names.

    Args:
        path: the file, of one command, as LightningCLI saves it, or with its subcommand on top.
        model: import path of the LightningModule, if a script names it and the file holds its arguments alone.
        datamodule: the same of the DataModule.
        is_trained: whether the training is over, so that its devices are not needed, and its data is left out if it
            cannot be built.

    Raises:
        TransferConfigError: it is not such a file, or what reads such files is not installed.
    """
    try:
        given = yaml.safe_load(Path(path).read_text())
        given = given.get("fit", given)
        check_names(given)  # also if a script names the classes
        given = {**given, **_with_class(path, given, "model", model)}
        if not is_trained or datamodule:
            given |= _with_class(path, given, "data", datamodule)
        named = given["model"]["class_path"]
        home, _, name = named.rpartition(".")
        if not home:
            raise TransferConfigError(f"{path}: model={named!r} is not an import path, such as my_project.{name}.")
        namespace = namespace_of(getattr(importlib.import_module(home), name))
        if namespace is None:
            raise TransferConfigError(f"{path}: {named} is not a LightningModule. model's class_path has to name one.")
        cli_class = importlib.import_module(f"{namespace}.cli").LightningCLI
        options = {key: value for key, value in given.items() if key not in FITS}
        if is_trained:
            callbacks = (options.pop("trainer", None) or {}).get("callbacks")
            options["trainer"] = {"callbacks": callbacks, "accelerator": "cpu", "logger": False}
    except TransferConfigError:
        raise
    except (OSError, TypeError, KeyError, ValueError, AttributeError, ImportError, yaml.YAMLError) as error:
        raise TransferConfigError(
            f"{path}: {type(error).__name__}: {error}. Expected a file of LightningCLI, in the folder from which its "
            "classes can be imported."
        ) from error
    try:
        with silent():  # LightningCLI warns of arguments beside the command's own
            build = partial(cli_class, run=False, save_config_callback=None, parser_kwargs=RAISING)
            line = _built_after_training(build, options) if is_trained else build(args=options)
    except ArgumentError as error:
        raise TransferConfigError(f"{path}: {error}") from error
    lengths = {name: value for name in LENGTHS if (value := line.config["trainer"][name]) is not None}
    return Project(line.model, line.datamodule or line.model, line.trainer, lengths)


def _built_after_training(build: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Return a LightningCLI with its DataModule, or without it if it cannot be built: its images may be elsewhere."""
    try:
        return build(args=copy.deepcopy(options))
    except Exception:
        return build(args={key: value for key, value in options.items() if key != "data"})


def validation_loader(project: Project) -> Any:
    """Return the loader of a DataModule's validation images, or else of its training images; None without either.

    `prepare_data` is not called, because it may download the images.
    """
    data = project.data
    with suppress(Exception), restored(), attached(data, type(project.trainer), options_like(project.trainer)):
        if data is project.module:
            return None
        data.setup("fit")
        with suppress(Exception):
            return data.val_dataloader()
        return data.train_dataloader()
    return None


def _with_class(path: Any, given: dict[str, Any], key: str, named: str | None) -> dict[str, Any]:
    """Return an entry of a file with its class, which a script may name: LightningCLI(LitModel, Images).

    Raises:
        TransferConfigError: the class is named in no place, or in two.
    """
    entry, option = given.get(key) or {}, {"model": "--model", "data": "--datamodule"}[key]
    if named and "class_path" in entry:
        raise TransferConfigError(f"{path} names a class for {key}: {entry['class_path']}. Leave {option} out.")
    if named:
        return {key: {"class_path": named, "init_args": entry}}
    # data may also be an import path or another file's name, which LightningCLI reads
    if "class_path" not in entry and (key == "model" or (entry and isinstance(entry, dict))):
        raise TransferConfigError(
            f"{path} has no class_path in {key}. If a script names the classes, as LightningCLI(LitModel, Images) "
            "does, add --model my_project.LitModel --datamodule my_project.Images; rank, advise, doctor and export "
            "take them."
        )
    return {}


def load_trained(project: Project, path: str | os.PathLike[str], *, weights_only: bool) -> Any:
    """Load a checkpoint into a project's module, and return what it says of its run, for the card of an export.

    Raises:
        TransferConfigError: the file is not a Lightning checkpoint, or not of this project.
    """
    module, checkpoint = project.module, read_checkpoint(path, weights_only=weights_only)
    weights = checkpoint["state_dict"]
    module.configure_model()
    read_layers(module, checkpoint)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(weights, strict=module.strict_loading)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:400]
        raise TransferConfigError(
            f"{path} does not fit the {type(module).__name__} of the configuration: {said} Name the configuration of "
            "the run that wrote it."
        ) from error
    if "loops" not in checkpoint:  # not written by a Trainer: it says nothing of a run
        return None
    given = project.trainer.callbacks
    if "callbacks" in checkpoint:  # save_weights_only leaves them out
        _check_same_callbacks(path, given, checkpoint["callbacks"])
    return SimpleNamespace(
        global_step=checkpoint["global_step"],
        current_epoch=checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"],  # that have begun
        callbacks=given,
        callback_metrics={},  # which no checkpoint holds
        lightning_module=module,
        datamodule=project.data,
    )


def _check_same_callbacks(path: Any, given: list[Any], states: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run with other callbacks of this package than the configuration's.

    Raises:
        TransferConfigError: the message names both.
    """
    mine = {each.state_key for each in given if isinstance(each, TransferCallback | FrozenStatistics)}
    theirs = {key for key, state in states.items() if isinstance(state, dict) and is_stamped(state.get(KEY))}
    if mine != theirs:
        named, found = ", ".join(sorted(mine)) or "none of this package", ", ".join(sorted(theirs)) or "none"
        raise TransferConfigError(
            f"The configuration's callbacks are {named}, and {path} is of a run with {found}. Name that run's "
            f"configuration{'' if theirs else ', its checkpoint before it was stripped, or no callbacks'}."
        )
