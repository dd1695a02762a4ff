"""Define the arguments of each command, and its help of one screen."""

import argparse
from functools import partial

from lightning_transfer.version import __version__

SELECT = """\
a configuration:

  target: {class_path: my_project.SeenImages}    # training images without augmentation
  source: {class_path: my_project.SourceImages}  # source images without augmentation
  cache: chosen.safetensors                      # the file that is written
  neighbors: {k: 300}                            # as in the training run
  protect: [{class_path: my_project.TestImages}] # their near duplicates are left out of the source
  num_workers: 8                                 # that read images, for each process that selects
  fabric: {accelerator: gpu, devices: 8}         # options of Lightning's Fabric

Every entry can be given as an option too: --neighbors.k=100
"""

PROJECT = """\
a configuration, as for LightningCLI:

  model: {class_path: my_project.LitModel, init_args: {...}}
  data: {class_path: my_project.Images}       # the DataModule
  trainer: {max_epochs: 20, callbacks: [...]}

If your script names the classes, LightningCLI(LitModel, Images), and the file has no class_path:
--model my_project.LitModel --datamodule my_project.Images
"""

DOCTOR = f"""\
{PROJECT}
One training step of a copy is run on a few images. Exit code: 1 if something is found, else 0. In Python:
lightning_transfer.doctor(module, datamodule, trainer)
"""

ADVISE = f"""\
{PROJECT}
Each training is as long as the configuration says, on one device and without its callbacks. If one of them has
source=, the methods that learn from a source are compared too. In Python, with more options:
lightning_transfer.advise(module, datamodule, source=source)
"""

RANK = """\
Each network sees all images once, and none is trained. The images must not be normalised or augmented.

  lightning-transfer rank resnet50.a1_in1k vit_small_patch16_224 --data images/train

In Python, with modules of your own: lightning_transfer.rank_networks({"mine": network}, dataset)
"""

EXPORT = f"""\
{PROJECT}
The folder holds the weights of the network, and a card that names the callbacks of the run. Load a
timm network by timm.create_model("local-dir:FOLDER", pretrained=True). In Python:
lightning_transfer.export(module, folder, trainer=trainer)
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser("lightning-transfer", description="Transfer learning for Lightning projects.")
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    one = add("doctor", help="find mistakes in a project, or broken weights in a checkpoint", epilog=DOCTOR)
    one.add_argument("path", metavar="CONFIG_OR_CKPT", help="a YAML file of LightningCLI, or a checkpoint")
    _add_classes(one)
    one = add("rank", help="rank pretrained networks of timm for your images", epilog=RANK)
    one.add_argument("networks", nargs="+", metavar="NAME", help="of a timm model, or local-dir:FOLDER")
    one.add_argument(
        "--data", required=True, metavar="PATH", help="a folder with one folder for each class, or a LightningCLI file"
    )
    _add_classes(one)
    one.add_argument("--device", default="cpu", help="where networks run, such as cuda (default: cpu)")
    one.add_argument("--batch-size", type=int, default=64, metavar="N", help="images that run together (default: 64)")
    one.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    one.add_argument("--cache", metavar="FOLDER", help="keeps features, so that an interrupted ranking resumes")
    one.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width for all networks")
    one = add("advise", help="compare methods with fine-tuning, by trials on your training images", epilog=ADVISE)
    _add_config(one)
    one.add_argument("--minutes", type=float, default=30.0, help="that all trainings may take (default: 30)")
    one.add_argument("--steps", type=int, help="of each training, in place of the configuration's length")
    one.add_argument("--head", default="auto", metavar="PATH", help="of the classifier, such as model.fc")
    one = add(
        "select", help="select source images before training; torchrun runs it in several processes", epilog=SELECT
    )
    one.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see below")
    one = add("report", help="write one HTML page about a run")
    one.add_argument("folder", help="of CSVLogger, with metrics.csv")
    one.add_argument("out", help="the page to write")
    one.add_argument("--selection", metavar="FILE", help="the file that cache= names, of selective joint fine-tuning")
    one = add("export", help="write a trained network to a folder that other programs load", epilog=EXPORT)
    _add_config(one)
    one.add_argument("checkpoint", metavar="CKPT", help="of a run with this configuration")
    one.add_argument("folder", metavar="FOLDER", help="a folder that does not exist or is empty")
    one.add_argument("--classes", nargs="+", metavar="NAME", help="of the classes, in the order of the outputs")
    one.add_argument("--image-size", type=pixels, metavar="PIXELS", help="of the validation images: 64, or 64x48")
    one.add_argument("--onnx", action="store_true", help="write model.onnx too; needs onnx and onnxscript")
    _add_trusted(one)
    one = add("strip", help="remove from a checkpoint what this package added")
    one.add_argument("checkpoint", help="the file to read")
    one.add_argument("out", help="the file to write")
    _add_trusted(one)
    return made


def pixels(text: str) -> int | tuple[int, ...]:
    """Return the size of images: one number, or height and width.

    >>> pixels("64"), pixels("64x48")
    (64, (64, 48))
    """
    height, *others = map(int, text.split("x"))
    return (height, *others) if others else height


def _add_config(one: argparse.ArgumentParser) -> None:
    one.add_argument("config", metavar="CONFIG", help="a YAML file of LightningCLI")
    _add_classes(one)


def _add_classes(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", metavar="CLASS", help="class of the LightningModule, if the file has no class_path")
    one.add_argument("--datamodule", metavar="CLASS", help="class of the DataModule, if the file has no class_path")


def _add_trusted(one: argparse.ArgumentParser) -> None:
    one.add_argument("--trusted", action="store_true", help="read any object, and so run any code in the file")
