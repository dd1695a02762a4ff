"""The command line, run as people run it."""

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


@pytest.mark.parametrize("command", [(), ("select",), ("strip",), ("doctor",)])
def test_help_is_one_screen(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert 5 < len(capsys.readouterr().out.splitlines()) <= 40


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == lt.__version__


@pytest.mark.parametrize(("options", "k"), [([], 3), (["--neighbors.k=2"], 2)])
def test_a_selection_by_configuration_is_that_of_the_function(options, k, tmp_path, monkeypatch):
    from tests.methods import toy_bank

    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text(CONFIG)
    main(["select", "--config", "select.yaml", *options])
    found = lt.Selection.load("chosen.safetensors")
    expected = lt.select_neighbors(toys.target_data(), toys.source_data(), k=k, bank=toy_bank())
    assert torch.equal(found.indices, expected.indices)


def test_a_checkpoint_is_stripped(tmp_path):
    trainer = fit(LitToy(), [one(has_source=True).callback()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    main(["strip", str(tmp_path / "ours.ckpt"), str(tmp_path / "plain.ckpt")])
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
