"""A checkpoint of changed layers, loaded as LightningCLI and the user's own class want it."""

import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import cli

import lightning_transfer as lt
from lightning_transfer.glue.quiet import silent
from tests import toys
from tests.toys import LitToy, assert_same, weights


class Base(LitToy):
    """Takes any options, so that Lightning builds the subclass that a checkpoint names."""

    def __init__(self, **options):
        super().__init__()


class OfCLI(Base):
    """With an option, and a hook that does not call the one of its base."""

    def __init__(self, rate: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.seen: list[str] = []

    def on_load_checkpoint(self, checkpoint):
        self.seen.append(type(self.model.fc).__name__)


@pytest.mark.parametrize(("is_subclass_mode", "asked"), [(True, OfCLI), (True, Base), (False, OfCLI)])
def test_what_lightning_cli_has_built_is_loaded_with_its_changed_layers(is_subclass_mode, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    callbacks = [{"class_path": "lightning_transfer.GatedTransfer", "init_args": {"ratio": 2, "aux_weight": 0.0}}]
    model = {"class_path": f"{__name__}.OfCLI", "init_args": {"rate": 0.2}} if is_subclass_mode else {"rate": 0.2}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    build = partial(cli.LightningCLI, run=False, save_config_callback=None, seed_everything_default=False)
    given = {"model": model, "trainer": {"max_epochs": 1, "devices": 1, "callbacks": callbacks, **quiet}}
    with silent():  # it calls what jsonargparse has deprecated
        line = build(Base if is_subclass_mode else OfCLI, subclass_mode_model=is_subclass_mode, args=given)
    line.trainer.fit(line.model, toys.target_loader())
    line.trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert ("_class_path" in torch.load(tmp_path / "run.ckpt")["hyper_parameters"]) == is_subclass_mode
    hooks = [vars(cls).get("on_load_checkpoint") for cls in (OfCLI, Base)]
    loaded = lt.load_from_checkpoint(asked, tmp_path / "run.ckpt")
    assert type(loaded) is OfCLI
    assert (loaded.rate, loaded.seen) == (0.2, ["GatedHead"])  # changed before the user's hook, which ran once
    assert_same(weights(loaded), weights(line.model))
    assert hooks == [vars(cls).get("on_load_checkpoint") for cls in (OfCLI, Base)]


def test_a_class_is_as_it_was_after_a_load_that_fails(tmp_path):
    path = tmp_path / "run.ckpt"
    toys.fit(LitToy(), [lt.GatedTransfer(ratio=2, aux_weight=0)], max_epochs=1).save_checkpoint(path)

    class Other(LitToy):
        def __init__(self):
            super().__init__()
            self.model.fc = torch.nn.Linear(toys.WIDTH, 3)

    with pytest.raises(RuntimeError, match="size mismatch"):
        lt.load_from_checkpoint(Other, path)
    assert "on_load_checkpoint" not in vars(Other)
