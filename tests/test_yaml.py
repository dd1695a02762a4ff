"""The files of examples/yaml and examples/hydra train, and however such a run is written down it is the same run."""

import io
import logging
import pathlib
import re
import runpy
import sys
import types
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import lightning.pytorch as L
import pytest
import timm
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

import lightning_transfer as lt
from tests import processes
from tests.toys import assert_same, weights

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
FILES = sorted((EXAMPLES / "yaml").glob("*.yaml"))
SHORT = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # jsonargparse's own, and that the source head knows nothing
    pytest.mark.usefixtures("thin_resnets"),
]


@contextmanager
def inside(folder, namespace="lightning.pytorch"):
    """Yield examples/yaml/project.py as it is imported in a folder, in either namespace of Lightning."""
    project = types.ModuleType("project")
    code = (EXAMPLES / "yaml/project.py").read_text().replace("lightning.pytorch", namespace)
    exec(compile(code, "project.py", "exec"), vars(project))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "project", project)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["project.py"])
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")  # set by Lightning, and here put back
        yield project


def start(folder, *arguments, **options):
    with inside(folder, **options) as project:
        return project.main(["fit", *map(str, arguments)])


@pytest.fixture(scope="module")
def plain(thin_resnets, tmp_path_factory):
    return weights(start(tmp_path_factory.mktemp("plain"), *SHORT).model)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def run(request, thin_resnets, tmp_path_factory):
    """A file, the folder in which it ran, and what it trained."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    cli = start(folder, "--config", request.param, *SHORT)
    return types.SimpleNamespace(file=request.param, folder=folder, cli=cli, end=weights(cli.model))


def test_every_callback_has_a_file_of_each_kind():
    shown = {
        callback["class_path"]
        for path in FILES
        for callback in yaml.safe_load(path.read_text())["trainer"]["callbacks"]
    }
    groups = {path.stem: yaml.safe_load(path.read_text()) for path in (EXAMPLES / "hydra/configs/callbacks").glob("*")}
    assert shown == {f"lightning_transfer.{name}" for name in lt.callbacks.__all__}
    assert shown == {callback["_target_"] for group in groups.values() for callback in group.values()}
    assert set(groups) == {path.stem for path in FILES}


def test_a_file_trains_otherwise_than_no_file(run, plain):
    changed = [name for name, value in plain.items() if name not in run.end or not run.end[name].equal(value)]
    assert changed


def test_what_is_printed_and_saved_of_a_run_is_that_run(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start(tmp_path, "--config", run.file, *SHORT, "--print_config")
    printed = capsys.readouterr().out
    saved = (run.folder / "lightning_logs/version_0/config.yaml").read_text()
    assert yaml.safe_load(printed) == yaml.safe_load(saved)
    (tmp_path / "again.yaml").write_text(printed)
    assert_same(weights(start(tmp_path, "--config", tmp_path / "again.yaml").model), run.end)


def test_in_pytorch_lightning_it_is_that_run(run, tmp_path):
    cli = start(tmp_path, "--config", run.file, *SHORT, namespace="pytorch_lightning")
    assert type(cli.trainer).__module__.startswith("pytorch_lightning.")
    assert_same(weights(cli.model), run.end)


def test_the_guides_files_keep_the_classifier_of_a_pretrained_timm_model(monkeypatch):
    project = types.ModuleType("my_project")
    exec("from tests.methods import SourceData\nclass SourceImages(SourceData): pass", vars(project))
    monkeypatch.setitem(sys.modules, "my_project", project)
    network, asked = timm.create_model("resnet10t", num_classes=7), []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or network)
    page = (EXAMPLES / "guides/configuration.md").read_text()
    lightning_cli, hydra_config = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.callbacks", type=list[L.Callback])
    config = parser.parse_object(lightning_cli)
    built = [parser.instantiate_classes(config).trainer.callbacks[0], instantiate(OmegaConf.create(hydra_config)).soft]
    for callback in built:
        assert type(callback) is lt.SoftFinetuning
        assert (type(callback.source.dataset), callback.source.batch_size) == (project.SourceImages, 24)
        assert_same(weights(callback.source.head), weights(network.fc))
    assert asked == [("resnet50.a1_in1k", {"pretrained": True})] * 2


def by_hydra(folder, *overrides):
    with inside(folder), initialize_config_dir(str(EXAMPLES / "hydra/configs"), version_base="1.3"):
        config = compose("train", [*overrides, "trainer.max_epochs=1"])
        return weights(runpy.run_path(str(EXAMPLES / "hydra/train.py"))["train"](config))


def test_by_hydra_it_is_that_run(run, tmp_path):
    assert_same(by_hydra(tmp_path, f"callbacks={run.file.stem}"), run.end)


def test_hydra_without_a_callback_is_the_plain_run(plain, tmp_path):
    assert_same(by_hydra(tmp_path, "~callbacks"), plain)


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("yaml/project.py", ["fit", f"--config={EXAMPLES}/yaml/soft.yaml", *SHORT], ["the source task joins at head"]),
        ("hydra/train.py", ["callbacks=[gated,probe]", "trainer.max_epochs=1"], ["transfer module", "linear probe"]),
    ],
)
def test_the_scripts_run_by_themselves(script, arguments, says):
    code, printed = processes.run(as_script, EXAMPLES / script, arguments)[0]
    assert code == 0
    assert all(words in printed for words in says)


def as_script(path, arguments):
    """What a script logs and prints, in a process that has no level of logging from the tests."""
    logger, printed = logging.getLogger("lightning.pytorch"), io.StringIO()
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(printed))
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.parent)]
    with redirect_stdout(printed), redirect_stderr(printed):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()
