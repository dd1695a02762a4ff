"""Run the command `lightning-transfer`, or `python -m lightning_transfer`: what needs no training script."""

import os
import sys
import sysconfig
import traceback
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_transfer import ranks
from lightning_transfer.advising.advice import Advice
from lightning_transfer.advising.advise import advise
from lightning_transfer.advising.ranking import Ranking, rank_networks
from lightning_transfer.checkpoints import export, strip_checkpoint
from lightning_transfer.commands.line import parser
from lightning_transfer.commands.names import check_options
from lightning_transfer.commands.project import Project, load_trained, read_project, validation_loader
from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining.diagnosis import Diagnosis
from lightning_transfer.examining.doctor import doctor, examine_checkpoint
from lightning_transfer.glue.launching import launch
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import Job
from lightning_transfer.methods.selective.selection import Selection
from lightning_transfer.reports import TransferReport

NEEDS = "Configurations need jsonargparse: pip install 'lightning_transfer[cli]'."
OTHERS = (str(Path(__file__).parent), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))


def select(
    target: AnyDataset,
    source: AnyDataset,
    cache: str,
    *,
    neighbors: Neighbors = Neighbors(),  # noqa: B008  (frozen)
    protect: list[AnyDataset] | None = None,
    num_workers: int = 0,
    fabric: dict[str, Any] | None = None,
) -> None:
    """Select neighbors and keep them in a file, for `SelectiveJointFinetuning(cache=...)` with the same options.

    Args:
        target: target training images without augmentation.
        source: source images without augmentation.
        cache: the file.
        neighbors: as the training run will have them.
        protect: datasets whose near duplicates are left out of the source.
        num_workers: processes that read images, for each process that selects.
        fabric: options of Lightning's Fabric, such as {accelerator: gpu, devices: 8, num_nodes: 2}.
    """
    device = launch(fabric or {})
    pictures = partial(Pictures, num_workers=num_workers)
    protected = [pictures(data, "protected") for data in protect or []]
    scan = Scan(cache=cache, device=device, say=print)
    selection = Job(pictures(target, "target"), pictures(source, "source"), protected, neighbors, scan).run()
    if ranks.rank() == 0:
        later = (
            f"; the first {neighbors.k} are borrowed at first, the others in later rounds" if neighbors.rounds else ""
        )
        print(f"{selection} in {cache}{later}")


def by_configuration(path: str, others: Sequence[str]) -> None:
    """Select as a file says, changed by options.

    Raises:
        TransferConfigError: a name is misspelt, or what reads such files is not installed.
    """
    try:
        from jsonargparse import CLI  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        raise TransferConfigError(NEEDS) from None
    with suppress(OSError, yaml.YAMLError):  # jsonargparse names them
        given = yaml.safe_load(Path(path).read_text())
        if isinstance(given, dict):
            check_options(select, given, path)
    CLI(select, args=["--config", path, *others], as_positional=False, prog="lightning-transfer select")


def project_of(path: str, options: Namespace, *, is_trained: bool = False) -> Project:
    """Read a LightningCLI file's project.

    Raises:
        TransferConfigError: it is not such a file, or what reads such files is not installed.
    """
    if not Path(path).exists():
        raise TransferConfigError(f"There is no file or folder {path}.")
    try:
        return read_project(path, model=options.model, datamodule=options.datamodule, is_trained=is_trained)
    except ModuleNotFoundError as error:
        if "jsonargparse" not in str(error):
            raise
        raise TransferConfigError(NEEDS) from error  # LightningCLI's own error names no extra


def check_no_classes(path: str, options: Namespace) -> None:
    """Refuse classes beside what is not a LightningCLI file.

    Raises:
        TransferConfigError: one is named.
    """
    if options.model or options.datamodule:
        raise TransferConfigError(f"{path} is not a LightningCLI file. Leave --model and --datamodule out.")


def examine(options: Namespace) -> Diagnosis:
    """Examine a LightningCLI file's project, or a checkpoint."""
    if Path(options.path).suffix not in (".yaml", ".yml", ".json"):
        check_no_classes(options.path, options)
        return examine_checkpoint(options.path)
    project = project_of(options.path, options)
    return doctor(project.module, project.data, project.trainer)


def advice_on(options: Namespace) -> Advice:
    """Compare methods on the data of a LightningCLI file's project."""
    project = project_of(options.config, options)
    asked = {"minutes": options.minutes, "steps": options.steps, "head": options.head}
    return advise(project.module, project.images, source=project.source, trainer=project.options, **asked)


def ranked(options: Namespace) -> Ranking:
    """Rank networks on the images of a folder, or of a LightningCLI file's project.

    Raises:
        TransferConfigError: the folder does not hold a folder of images for each class.
    """
    if Path(options.data).is_dir():
        check_no_classes(options.data, options)
        from torchvision.datasets import ImageFolder  # timm needs it too

        try:
            data = ImageFolder(options.data)
        except FileNotFoundError as error:
            raise TransferConfigError(f"{error} Expected a folder of images for each class in --data.") from error
    else:
        data = project_of(options.data, options).data
    asked = {name: getattr(options, name) for name in ("device", "batch_size", "num_workers", "cache", "image_size")}
    return rank_networks(options.networks, data, **asked)


def handed_on(options: Namespace) -> Path:
    """Export the network of a checkpoint, and return the folder."""
    project = project_of(options.config, options, is_trained=True)
    run = load_trained(project, options.checkpoint, weights_only=not options.trusted)
    if run is not None and options.image_size is None:
        run.val_dataloaders = validation_loader(project)
    asked = {"classes": options.classes, "onnx": options.onnx, "image_size": options.image_size}
    return export(project.module, options.folder, trainer=run, **asked)


def run(options: Namespace, others: Sequence[str]) -> None:
    """Run one command."""
    if options.command == "select":
        by_configuration(options.config, others)
    elif options.command == "doctor":
        print(diagnosis := examine(options))
        if diagnosis.findings:
            raise SystemExit(1)
    elif options.command == "report":
        selection = None if options.selection is None else Selection.load(options.selection)
        TransferReport(options.folder, selection=selection).save(options.out)
        print(options.out)
    elif options.command == "strip":
        strip_checkpoint(options.checkpoint, options.out, weights_only=not options.trusted)
        print(options.out)
    else:
        print({"advise": advice_on, "rank": ranked, "export": handed_on}[options.command](options))


def described(error: Exception) -> str:
    """Return an error of the project as one message, with the place in its code."""
    files = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OTHERS)]
    said = f"{type(error).__name__}: {error}" + "".join(f" ({at.filename}, line {at.lineno})" for at in files[-1:])
    return "\n".join([said, *getattr(error, "__notes__", [])])


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an error ends it with one message."""
    sys.path.insert(0, os.getcwd())  # a project's modules, as for `python -m`
    line = parser()
    options, others = line.parse_known_args(args)
    if others and options.command != "select":
        line.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        run(options, others)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as of a program that the signal ends
    except Exception as error:  # the project's own are of any type
        message = str(error) if isinstance(error, TransferConfigError) else described(error)
        message = message.replace("pass weights_only=False", "pass --trusted")  # the option's name on this line
        raise SystemExit(f"lightning-transfer {options.command}: {message}") from error


if __name__ == "__main__":
    main()
