"""The commands that read a project or a folder of images: advise, rank and export."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import timm
import torch
from lightning_utilities.core.imports import RequirementCache
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

import lightning_transfer as lt
from lightning_transfer import __main__ as command
from lightning_transfer.__main__ import main
from lightning_transfer.commands.project import _check_same_callbacks, read_project
from tests.doctor import projects
from tests.field import shapes

CONFIG = """
seed_everything: 0
model: {class_path: tests.test_projects.Lit}
data: {class_path: tests.doctor.projects.Images}
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  max_epochs: 2
  gradient_clip_val: 0.5
"""
CALLBACKS = """
  callbacks:
  - class_path: lightning_transfer.SoftFinetuning
    init_args: {weight: 0.5, source: {dataset: {class_path: tests.test_projects.Source}, num_classes: 5}}
  - class_path: lightning_transfer.ProbeStart
"""
GATED = "\n  callbacks: [{class_path: lightning_transfer.GatedTransfer, init_args: {aux_weight: 0, ratio: 4}}]\n"


class Lit(shapes.TimmClassifier):
    """A network whose name is in timm's registry."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=shapes.CLASSES)


class Source(shapes.Pictures):
    def __init__(self):
        super().__init__(shapes.TimmClassifier, 20, shapes.CLASSES, seed=5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name="Lit", callbacks="", **changes):
    text = CONFIG + callbacks
    for old, new in changes.items():
        text = text.replace(old, new)
    home = "tests.test_projects" if name in globals() else "tests.doctor.projects"
    Path("config.yaml").write_text(text.replace("tests.test_projects.Lit", f"{home}.{name}"))
    return "config.yaml"


class Saving(L.Callback):
    """Saves when ModelCheckpoint does, before the epoch is counted."""

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint("last.ckpt")


def trained(callbacks=""):
    """A configuration and a checkpoint of its run."""
    project = read_project(config(callbacks=callbacks))
    project.trainer.callbacks.append(Saving())
    project.trainer.fit(project.module, project.data)
    return project


def error_of(*arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert str(end.value.code).startswith(f"lightning-transfer {arguments[0]}: ")
    return end.value.code


def test_advice_is_printed_and_a_training_is_as_long_as_the_file_says(capsys):
    main(["advise", config("Clean"), "--minutes", "5"])
    text = capsys.readouterr().out
    assert "40 labelled images, 5 classes" in text
    assert " of 8 steps (2 passes;" in text  # 32 images in batches of 8, two epochs
    table = text.partition("verdict\n")[2].partition("\n\n")[0].splitlines()
    found = {line.partition("  ")[0] for line in table}
    assert found == {"GatedTransfer", "AdaFilter", "ProbeStart", "FrozenStatistics", "linear probe"}


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, {"max_epochs": 2, "max_steps": -1}),
        ({"max_epochs: 2": "max_epochs: null"}, {"max_steps": -1}),  # not Lightning's own 1000 epochs
        ({"max_epochs: 2": "max_steps: 7"}, {"max_steps": 7}),
    ],
)
def test_advice_is_asked_for_with_what_the_file_says(changes, lengths, monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "advise", lambda module, data, **options: asked.update(options, data=data))
    main(["advise", config("Clean", CALLBACKS, **changes), "--steps", "3", "--minutes", "9", "--head", "model.fc"])
    assert type(asked["data"]) is projects.Images
    assert type(asked["source"].dataset) is Source
    assert {name: asked[name] for name in ("steps", "minutes", "head")} == {
        "steps": 3,
        "minutes": 9,
        "head": "model.fc",
    }
    like = {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 0.5, **lengths}
    assert like.items() <= asked["trainer"].items()
    assert len({"max_epochs", "max_steps"} & asked["trainer"].keys()) == len(lengths)


def test_advice_is_asked_for_with_the_kept_classifier_of_the_file(monkeypatch):
    kept = "{class_path: lightning_transfer.SourceKnowledge, init_args: {network: {class_path: timm.models.resnet10t}}}"
    callbacks = f"\n  callbacks: [{{class_path: lightning_transfer.SoftFinetuning, init_args: {{source: {kept}}}}}]\n"
    asked = {}
    monkeypatch.setattr(command, "advise", lambda module, data, **options: asked.update(options))
    main(["advise", config("Clean", callbacks)])
    assert isinstance(asked["source"], lt.SourceKnowledge)


def test_advice_on_a_module_that_loads_its_images(capsys):
    data = "data: {class_path: tests.doctor.projects.Images}"
    main(["advise", config("Own", **{data: ""}), "--steps", "1"])
    assert "40 labelled images" in capsys.readouterr().out


def test_what_trials_cannot_run_with_is_refused():
    text = error_of("advise", config("Clean", **{"max_epochs: 2": "fast_dev_run: true"}))
    assert "fast_dev_run" in text


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two small networks of timm's, in folders, by the names that timm loads them by."""
    place = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        each = {
            name: lt.export(timm.create_model(name, num_classes=3), place / name)
            for name in ("test_resnet", "test_vit")
        }
    return [f"local-dir:{path}" for path in each.values()]


def pictures(folder):
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = (torch.rand(20, 24, 3, generator=generator) * 128 + 100 * (index % 2)).byte()
        (folder / "images" / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"class{index % 2}" / f"{index}.png")
    return folder / "images"


def test_a_ranking_is_that_of_the_function(networks, folder, capsys):
    images = pictures(folder)
    size = ("--image-size", "64")
    main(["rank", *networks[:1], "--data", str(images), *size])
    assert "64 x 64" in capsys.readouterr().out
    main(["rank", *networks, "--data", str(images), "--cache", "features", "--batch-size", "5"])
    shown = capsys.readouterr().out
    expected = lt.rank_networks(networks, ImageFolder(images))
    assert "12 images, 2 classes" in shown
    for row in expected.rows:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{row.name}  ")]
        assert row.cells(is_best=row.name == expected.best)[1] in line
    assert len([*Path("features").iterdir()]) == 2


def test_images_may_be_those_of_a_configuration(networks, capsys):
    from tests.doctor.projects import Images

    main(["rank", networks[0], "--data", config("Clean", **{"doctor.projects.Images": "test_projects.Between0And1"})])
    assert f"{len(Images().train)} images, 5 classes" in capsys.readouterr().out


class Between0And1(projects.Images):
    """Pictures that are not normalised."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader([(image.sigmoid(), label) for image, label in self.train], batch_size=8)


@pytest.mark.parametrize("tail", [("--image-size", "32"), ("--image-size", "32x32", "--classes", *"abcde")])
def test_a_checkpoint_is_exported_with_a_card_of_its_callbacks(tail, capsys):
    project = trained(CALLBACKS)
    capsys.readouterr()
    main(["export", "config.yaml", "last.ckpt", "mine", *tail])
    assert capsys.readouterr().out == "mine\n"
    weights, expected = load_file("mine/model.safetensors"), project.module.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    card = Path("mine/README.md").read_text()
    for part in ("- SoftFinetuning(", "weight/start=0.5", "- ProbeStart(", "10 steps, 2 epochs."):
        assert part in card
    assert ("a, b, c, d, e" in card) == ("--classes" in tail)
    assert "| input_size | [3, 32, 32] |" in card
    assert timm.create_model("local-dir:mine", pretrained=True).num_classes == shapes.CLASSES


def test_callbacks_of_another_run_are_not_put_on_a_card():
    trained()
    said = error_of("export", config(callbacks=CALLBACKS), "last.ckpt", "mine")
    assert "callbacks are SoftFinetuning, and last.ckpt is of a run with none. " in said
    assert said.endswith("its checkpoint before it was stripped, or no callbacks.")
    trained(CALLBACKS)
    said = error_of("export", config(), "last.ckpt", "mine")
    assert "callbacks are none of this package, and last.ckpt is of a run with SoftFinetuning" in said
    assert said.endswith("Name that run's configuration.")
    lt.strip_checkpoint("last.ckpt", "plain.ckpt")
    main(["export", "config.yaml", "plain.ckpt", "mine", "--image-size", "32"])


def test_a_run_with_frozen_statistics_is_its_configurations():
    callback = lt.FrozenStatistics()
    states = {callback.state_key: callback.state_dict()}
    _check_same_callbacks("last.ckpt", [callback], states)
    with pytest.raises(lt.TransferConfigError, match="last.ckpt is of a run with FrozenStatistics"):
        _check_same_callbacks("last.ckpt", [], states)


class OnlyToTrain(projects.Images):
    """Images of which none is for the validation, and which need not be downloaded here."""

    def prepare_data(self):
        if Path("last.ckpt").exists():
            raise OSError("they are downloaded again")

    val_dataloader = L.LightningDataModule.val_dataloader


@pytest.mark.parametrize("changes", [{}, {"doctor.projects.Images": "test_projects.OnlyToTrain"}], ids=["val", "train"])
def test_another_size_of_the_projects_images_is_warned_of(changes):
    trained()
    said = "16 x 16 pixels, and config.json says 160 x 160: .*image_size=16; otherwise set the .* of the network.$"
    with pytest.warns(UserWarning, match=said) as caught, pytest.warns(UserWarning, match="^Pixels of the Trainer's"):
        main(["export", config(**changes), "last.ckpt", "mine"])
    assert len(caught) == 1


def test_weights_alone_are_exported_without_a_word_of_a_run():
    config(callbacks=CALLBACKS)
    torch.save({"state_dict": Lit().state_dict()}, "weights.ckpt")
    main(["export", "config.yaml", "weights.ckpt", "mine"])
    assert "## Training" not in Path("mine/README.md").read_text()


def test_an_export_needs_neither_the_data_nor_the_devices_of_the_run():
    trained()
    text = Path("config.yaml").read_text()
    elsewhere = text.replace("accelerator: cpu", "accelerator: tpu").replace("projects.Images", "projects.Nowhere")
    Path("config.yaml").write_text(elsewhere)
    main(["export", "config.yaml", "last.ckpt", "mine"])
    assert Path("mine/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_cannot_be_exported_is_one_message():
    trained(GATED)
    assert "by lt.functional.remove_gated_transfer(module" in error_of("export", "config.yaml", "last.ckpt", "mine")
    whole = torch.load("last.ckpt", weights_only=True)
    whole["state_dict"] = {key: value for key, value in whole["state_dict"].items() if "_extra_state" not in key}
    torch.save(whole, "filtered.ckpt")
    assert "was changed by GatedTransfer, and its" in error_of("export", "config.yaml", "filtered.ckpt", "mine")
    assert "does not fit the OneTooMany" in error_of("export", config("OneTooMany"), "last.ckpt", "mine")
    torch.save({"state_dict": {}, "hyper_parameters": {"path": Path("x")}}, "holds.ckpt")
    assert "pass --trusted; this runs" in error_of("export", "config.yaml", "holds.ckpt", "mine")
    assert "does not fit" in error_of("export", "config.yaml", "holds.ckpt", "mine", "--trusted")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_epochs": "max_epoch"}, "config.yaml: Group 'trainer' does not accept option 'max_epoch'"),
        ({"projects.Images": "projects.Imagez"}, "has no attribute 'Imagez'"),
        ({"model:": "model: ["}, "Expected a file of LightningCLI"),
        ({"accelerator: cpu": "accelerator: abacus"}, "abacus"),
    ],
)
@pytest.mark.parametrize("name", ["advise", "doctor", "rank"])
def test_a_file_that_does_not_make_a_project_is_one_message(name, changes, said):
    path = config("Clean", **changes)
    assert said in error_of(*(["rank", "net", "--data", path] if name == "rank" else [name, path]))


def test_a_file_whose_classes_a_script_names_is_read_with_their_names():
    fixed = {"{class_path: tests.test_projects.Lit}": "", "{class_path: tests.doctor.projects.Images}": ""}
    named = "--model", "tests.test_projects.Lit", "--datamodule", "tests.doctor.projects.Images"
    path = config(**fixed)
    assert "add --model my_project.LitModel" in error_of("doctor", path)
    assert "such as my_project.Lit." in error_of("doctor", path, "--model", "Lit", *named[2:])
    main(["doctor", path, *named])
    assert "Leave --model out" in error_of("doctor", config(), *named)
    wrong = GATED.replace("ratio", "raito")
    assert "GatedTransfer has no option 'raito'" in error_of("doctor", config(callbacks=wrong, **fixed))


@pytest.mark.parametrize("data", ["tests.doctor.projects.Images", "data.yaml"])
def test_data_may_be_an_import_path_or_a_file(data):
    Path("data.yaml").write_text("class_path: tests.doctor.projects.Images")
    project = read_project(config("Clean", **{"{class_path: tests.doctor.projects.Images}": data}))
    assert type(project.data) is projects.Images


@pytest.mark.parametrize("command", [("doctor", "last.ckpt"), ("rank", "net", "--data", ".")], ids=["doctor", "rank"])
def test_classes_beside_what_is_not_a_file_of_a_project_are_refused(command):
    assert "is not a LightningCLI file. Leave --model" in error_of(*command, "--model", "tests.test_projects.Lit")


def test_a_training_that_is_over_needs_no_datamodule():
    path = config(
        **{"{class_path: tests.test_projects.Lit}": "", "{class_path: tests.doctor.projects.Images}": "{a: 1}"}
    )
    assert type(read_project(path, model="tests.test_projects.Lit", is_trained=True).module) is Lit


def test_folders_and_names_that_are_not_known_are_one_message(networks, folder):
    pictures(folder)
    assert "Expected a folder of images for each class" in error_of(
        "rank", networks[0], "--data", folder / "images/class0"
    )
    assert "timm has no model 'resnet5'" in error_of("rank", "resnet5", "--data", folder / "images")
    assert "--data" not in error_of("rank", "local-dir:nowhere", "--data", folder / "images")
    for missing in (("rank", networks[0], "--data", "nowhere"), ("doctor", "nowhere.yaml")):
        assert error_of(*missing).endswith(f"There is no file or folder {missing[-1]}.")


def test_what_reads_configurations_is_named_if_it_is_missing(monkeypatch):
    missing = RequirementCache("jsonargparse[signatures]>=999")
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", missing)
    assert "pip install 'lightning_transfer[cli]'" in error_of("doctor", config())


def test_an_error_of_the_project_is_one_message_that_says_where():
    message = error_of("advise", config("WrongShape"), "--steps", "1")
    assert "Traceback" not in message
    first = message.splitlines()[0]
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in first
    assert "tests/doctor/projects.py, line " in first
    assert "This happened in plain fine-tuning" in message


def test_an_interrupt_is_not_a_traceback(monkeypatch, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_project", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["advise", str(tmp_path)])  # it has to be there
    assert end.value.code == 130
