"""The command line, run as people run it."""

import dataclasses
import sys

import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.__main__ import main
from tests import toys
from tests.methods import one
from tests.toys import LitToy, fit

CONFIG = """
target: {class_path: tests.methods.TargetData}
source: {class_path: tests.methods.SourceData}
cache: chosen.safetensors
neighbors: {k: 3, bank: {class_path: tests.methods.toy_bank}, rounds: 0}
fabric: {accelerator: cpu}
"""


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in ("advise", "doctor", "export", "rank", "report", "select", "strip"))]
)
def test_help_is_one_screen(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert 5 < len(capsys.readouterr().out.splitlines()) <= 40


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == lt.__version__


def test_a_report_is_the_page_of_the_run(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,val_acc\n3,0.5\n")
    none = torch.empty(0, 2, dtype=torch.int64)
    chosen = lt.Selection(torch.tensor([[1, 0]]), torch.rand(1, 2), {}, none[:, 0], none[:, 0], none, none, none[:, 0])
    chosen = dataclasses.replace(chosen, target_labels=torch.tensor([0]), source_labels=torch.tensor([4, 4]))
    chosen.save(tmp_path / "chosen.safetensors")
    main(["report", str(tmp_path), str(tmp_path / "run.html"), "--selection", str(tmp_path / "chosen.safetensors")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert "the most, 100% of all entries, are of class 4" in (tmp_path / "run.html").read_text()
    with pytest.raises(SystemExit, match="There is no file of metrics at .*, such as logs/lightning_logs/version_0"):
        main(["report", str(tmp_path / "none"), "out.html"])


def test_modules_of_the_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    (tmp_path / "mine_alone.py").write_text("from tests.methods import SourceData, TargetData\n")
    text = CONFIG.replace("tests.methods.TargetData", "mine_alone.TargetData")
    (tmp_path / "select.yaml").write_text(text)
    main(["select", "--config", "select.yaml"])
    assert (tmp_path / "chosen.safetensors").exists()


def test_a_selection_for_rounds_says_what_the_longer_lists_are_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text(CONFIG)
    main(["select", "--config", "select.yaml", "--neighbors.rounds=1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "15 neighbors each" in last
    assert last.endswith("the first 3 are borrowed at first, the others in later rounds")


@pytest.mark.parametrize(("options", "k"), [([], 3), (["--neighbors.k=2"], 2)])
def test_a_selection_by_configuration_is_that_of_the_function(options, k, tmp_path, monkeypatch):
    from tests.methods import toy_bank

    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text(CONFIG)
    main(["select", "--config", "select.yaml", *options])
    found = lt.Selection.load("chosen.safetensors")
    expected = lt.select_neighbors(toys.target_data(), toys.source_data(), k=k, bank=toy_bank())
    assert torch.equal(found.indices, expected.indices)


def test_a_checkpoint_is_stripped(tmp_path, capsys):
    trainer = fit(LitToy(), [one(has_source=True).callback()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    main(["strip", str(tmp_path / "ours.ckpt"), str(tmp_path / "plain.ckpt")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "plain.ckpt")
    plain = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert "lightning_transfer" not in plain
    assert not [key for key in plain["state_dict"] if "transfer" in key]


def test_what_is_wrong_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"lightning-transfer strip: .*missing\.ckpt"):
        main(["strip", str(tmp_path / "missing.ckpt"), "out.ckpt"])
    with pytest.raises(SystemExit) as end:
        main(["strip", "a", "b", "--neighbors.k=3"])
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_option_that_is_named_for_more_than_plain_data_is_the_commands(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"network": torch.nn.Linear(1, 1)}}, tmp_path / "holds.ckpt")
    for option in ([], ["--t"]):
        with pytest.raises(SystemExit) as end:
            main(["strip", str(tmp_path / "holds.ckpt"), str(tmp_path / "out.ckpt"), *option])
        assert not option or end.value.code == 2
        assert option or "pass --trusted; this runs" in end.value.code
    with pytest.warns(lt.NoEffectWarning):
        main(["strip", str(tmp_path / "holds.ckpt"), str(tmp_path / "out.ckpt"), "--trusted"])


PROJECT = """
model: {class_path: tests.doctor.projects.Clean}
trainer:
  callbacks:
  - class_path: lightning_transfer.SelectiveJointFinetuning
    init_args:
      source: {from_timm: resnet18, dataset: {class_path: tests.methods.SourceData}, batch_size: 3}
      neighbors: {k: 3}
      weight: {start: 1.0}
"""


@pytest.mark.parametrize(
    ("command", "old", "new", "said"),
    [
        (
            "select",
            "neighbors:",
            "neighbours:",
            r"has no option 'neighbours'. Did you mean 'neighbors'\? Known: 'target'",
        ),
        ("select", "rounds", "round", r"neighbors of .* has no option 'round'. Did you mean 'rounds'\? Known: 'k', "),
        ("doctor", "JointF", "F", "lightning_transfer has no class 'SelectiveF.* mean 'SelectiveJoint.* Known: 'Ad"),
        ("doctor", "init_args", "init_arg", "SelectiveJointFinetuning has no key 'init_arg'. Did you mean 'init_args'"),
        (
            "doctor",
            "weight",
            "wieght",
            "JointFinetuning has no option 'wieght'. Did you mean 'weight'.* Known: 'source'",
        ),
        ("doctor", "start", "strat", "weight of SelectiveJointFinetuning has no option 'strat'. Did you mean 'start'"),
        ("doctor", "{k", "{kk", "neighbors of SelectiveJointFinetuning has no option 'kk'. Did you mean 'k'"),
        ("doctor", "from_timm", "from_tim", "source of Selective.* has no option 'from_tim'. Did you mean 'from_timm'"),
        ("doctor", "batch_size", "batchsize", "source of Selective.* no option 'batchsize'. Did you mean 'batch_size'"),
    ],
)
def test_a_misspelt_name_is_one_message_with_the_nearest_one(command, old, new, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((CONFIG if command == "select" else PROJECT).replace(old, new))
    with pytest.raises(SystemExit, match=f"lightning-transfer {command}: .*{said}"):
        main([command, *["--config"][: command == "select"], "mine.yaml"])
    assert capsys.readouterr().err == ""


def test_no_option_of_select_is_shortened(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--conf", "select.yaml"])
    assert "required: --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fabric", "detail"),
    [("devices: x", "devices"), ("accelerator: abacus", "abacus"), ("acelerator: cpu", "acelerator")],
)
def test_what_fabric_refuses_is_one_message(fabric, detail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text(CONFIG.replace("fabric: {accelerator: cpu}", f"fabric: {{{fabric}}}"))
    with pytest.raises(SystemExit, match=f"lightning-transfer select: Fabric does not take fabric=.*: .*{detail}"):
        main(["select", "--config", "select.yaml"])


def test_an_option_that_is_refused_names_the_command(tmp_path, capsys):
    (tmp_path / "select.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit):
        main(["select", "--config", str(tmp_path / "select.yaml"), "--neighbors.k=abc"])
    assert "lightning-transfer select --help" in capsys.readouterr().err
