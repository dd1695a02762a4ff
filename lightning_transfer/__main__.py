"""The command `lightning-transfer`, or `python -m lightning_transfer`: what needs no training script."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_transfer import ranks
from lightning_transfer.checkpoints import strip_checkpoint
from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining.diagnosis import Diagnosis
from lightning_transfer.examining.doctor import doctor, examine_checkpoint
from lightning_transfer.glue.launching import launch
from lightning_transfer.glue.proxy import NAMESPACES
from lightning_transfer.glue.quiet import silent
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import Job
from lightning_transfer.methods.selective.selection import Selection
from lightning_transfer.reports import TransferReport
from lightning_transfer.version import __version__

FITS = ("ckpt_path", "weights_only")  # options of fit, that LightningCLI saves beside the rest

SELECT = """\
a configuration:

  target: {class_path: my_project.SeenImages}    # training images without augmentation
  source: {class_path: my_project.SourceImages}  # likewise
  cache: chosen.safetensors                      # the file that is written
  neighbors: {k: 300}                            # as in the training run
  protect: [{class_path: my_project.TestImages}] # their near duplicates are left out of the source
  num_workers: 8                                 # that read images, for each process that selects
  fabric: {accelerator: gpu, devices: 8}         # options of Lightning's Fabric

Every entry can be given as an option too: --neighbors.k=100
"""

DOCTOR = """\
a configuration, as for LightningCLI:

  model: {class_path: my_project.LitModel, init_args: {...}}
  data: {class_path: my_project.Images}       # the DataModule
  trainer: {max_epochs: 20, callbacks: [...]}

One training step of a copy is run on a few images. Exit code: 1 if something is found, else 0. In Python:
lightning_transfer.doctor(module, datamodule, trainer)
"""


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
    protected = [Pictures(data, "protected") for data in protect or []]
    scan = Scan(cache=cache, num_workers=num_workers, device=device, say=print)
    job = Job.of(Pictures(target, "target"), Pictures(source, "source"), protected, neighbors=neighbors, scan=scan)
    selection = job.run()
    if ranks.rank() == 0:
        print(f"{selection} in {cache}")


def by_configuration(path: str, others: Sequence[str]) -> None:
    """Select as a file says, changed by options.

    Raises:
        TransferConfigError: what reads such files is not installed.
    """
    try:
        from jsonargparse import CLI  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        raise TransferConfigError("Configurations need jsonargparse: pip install 'lightning_transfer[cli]'.") from None
    CLI(select, args=["--config", path, *others], as_positional=False, prog="lightning-transfer select")


def examine(path: str) -> Diagnosis:
    """Examine a LightningCLI file's project, or a checkpoint.

    Raises:
        TransferConfigError: the file is neither, or what reads such files is not installed.
    """
    if Path(path).suffix not in (".yaml", ".yml", ".json"):
        return examine_checkpoint(path)
    try:
        import yaml

        given = yaml.safe_load(Path(path).read_text())
        given = given.get("fit", given)  # as LightningCLI saves it, or with its subcommand on top
        model = given["model"]["class_path"]
        home, _, name = model.rpartition(".")
        bases = [cls.__module__ for cls in getattr(importlib.import_module(home), name).__mro__]
        namespace = next(each for each in NAMESPACES if any(base.startswith(f"{each}.") for base in bases))
        cli_class = importlib.import_module(f"{namespace}.cli").LightningCLI
    except (OSError, TypeError, KeyError, ValueError, AttributeError, ImportError, StopIteration) as error:
        raise TransferConfigError(
            f"{path}: {type(error).__name__}: {error}. Expected a file of LightningCLI with model: {{class_path: "
            "my_project.LitModel}, read by python -m lightning_transfer in the folder of my_project, and pip install "
            "'lightning_transfer[cli]'."
        ) from error
    options = {key: value for key, value in given.items() if key not in FITS}
    with silent():  # LightningCLI warns of arguments beside the command's own
        line = cli_class(run=False, save_config_callback=None, args=options)
    return doctor(line.model, line.datamodule or line.model, line.trainer)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser("lightning-transfer", description="Transfer learning for Lightning projects.")
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "select",
        help="select source images ahead of training, alone or under torchrun",
        epilog=SELECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see below")
    one = commands.add_parser("strip", help="write a checkpoint without anything of this package", allow_abbrev=False)
    one.add_argument("checkpoint", help="the file to read")
    one.add_argument("out", help="the file to write")
    one.add_argument("--trusted", action="store_true", help="read any object; the file then runs whatever it says")
    one = commands.add_parser(
        "doctor",
        help="name what will go wrong in a project, or is wrong with a checkpoint",
        epilog=DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("path", metavar="CONFIG_OR_CKPT", help="a YAML file of LightningCLI, or a checkpoint")
    one = commands.add_parser("report", help="write one HTML page about a run", allow_abbrev=False)
    one.add_argument("folder", help="of CSVLogger, with metrics.csv")
    one.add_argument("out", help="the page to write")
    one.add_argument("--selection", metavar="FILE", help="the file that cache= names, of selective joint fine-tuning")
    return made


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what is wrong ends it with one message."""
    sys.path.insert(0, os.getcwd())  # a project's modules, as for `python -m`
    line = parser()
    options, others = line.parse_known_args(args)
    if others and options.command != "select":
        line.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if options.command == "select":
            by_configuration(options.config, others)
        elif options.command == "doctor":
            print(diagnosis := examine(options.path))
            if diagnosis.findings:
                raise SystemExit(1)
        elif options.command == "report":
            selection = None if options.selection is None else Selection.load(options.selection)
            TransferReport(options.folder, selection=selection).save(options.out)
        else:
            strip_checkpoint(options.checkpoint, options.out, weights_only=not options.trusted)
    except TransferConfigError as error:
        message = str(error).replace("pass weights_only=False", "pass --trusted")  # the option's name on this line
        raise SystemExit(f"lightning-transfer {options.command}: {message}") from error


if __name__ == "__main__":
    main()
