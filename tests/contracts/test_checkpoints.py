"""What a run with a method writes, the user's plain class and a run without the method can read."""

import pytest
import torch
from lightning.pytorch import callbacks

import lightning_transfer as lt
from tests.methods import METHODS
from tests.toys import LitToy, SaveEveryStep, assert_same, fit, weights

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def named(method):
    return type(method.callback()).__name__


class PlainRun(LitToy):
    """AdamW in two groups, so that there is state for every parameter and places to confuse."""

    def configure_optimizers(self):
        rest = [param for name, param in self.named_parameters() if not name.startswith("model.fc")]
        return torch.optim.AdamW([{"params": rest, "lr": 1e-2}, {"params": self.model.fc.parameters()}], lr=1e-3)


@pytest.fixture
def written(tmp_path):
    def write(method):
        module = PlainRun()
        runner = fit(module, [method.callback(), SaveEveryStep(tmp_path)])
        runner.save_checkpoint(tmp_path / "after.ckpt")
        return module, tmp_path

    return write


@each_method
def test_the_users_class_loads_it_strictly(method, written):
    module, folder = written(method)
    loaded = PlainRun.load_from_checkpoint(folder / "step=12.ckpt")
    assert_same(weights(loaded), weights(module))
    assert_same(weights(lt.load_from_checkpoint(PlainRun, folder / "step=12.ckpt")), weights(module))
    assert list(module.state_dict()) == list(PlainRun().state_dict())


@each_method
@pytest.mark.parametrize("name", ["step=3", "after"])
def test_a_run_without_the_callback_resumes_it(method, written, name):
    _, folder = written(method)
    with pytest.warns(UserWarning, match=f"Please add the following callbacks: .'{named(method)}'"):
        runner = fit(PlainRun(), ckpt_path=folder / f"{name}.ckpt", max_epochs=3)
    assert runner.global_step == 18


@each_method
def test_with_the_callback_every_optimizer_state_finds_its_parameter(method, written):
    """Written, hidden, put back: the states in the live optimizer are those of the run that was saved."""
    _, folder = written(method)

    class Looking(PlainRun):
        def on_train_start(self):
            optimizer = self.optimizers().optimizer
            names = {param: name for name, param in self.named_parameters()}
            self.found = {names[param]: value["exp_avg"].clone() for param, value in optimizer.state.items()}

    class Remembering(PlainRun):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 3:
                Looking.on_train_start(self)

    remembered, looked = Remembering(), Looking()
    fit(remembered, [method.callback()])
    fit(looked, [method.callback()], ckpt_path=folder / "step=3.ckpt")
    assert_same(looked.found, remembered.found)
    assert any(named(method) in name for name in looked.found)


@each_method
def test_weights_only_checkpoint_holds_the_users_network_and_nothing_else(method, tmp_path):
    class Saving(LitToy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    fit(Saving(), [method.callback()], max_epochs=1)
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(LitToy().state_dict())
    assert "lightning_transfer" not in str(checkpoint.keys())


@each_method
def test_strip_checkpoint_leaves_a_plain_run(method, written, tmp_path):
    _, folder = written(method)
    lt.strip_checkpoint(folder / "step=3.ckpt", tmp_path / "plain.ckpt")
    stripped = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert "lightning_transfer" not in stripped
    assert named(method) not in stripped["callbacks"]
    assert not list(tmp_path.glob("*.part"))
    fit(PlainRun(), ckpt_path=tmp_path / "plain.ckpt")
    with pytest.warns(lt.NoEffectWarning, match="holds nothing"):
        lt.strip_checkpoint(tmp_path / "plain.ckpt", tmp_path / "again.ckpt")


def test_strip_checkpoint_refuses_another_file(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(lt.TransferConfigError, match="no Lightning checkpoint"):
        lt.strip_checkpoint(tmp_path / "list.pt", tmp_path / "out.ckpt")


def averaging_callbacks():
    yield lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    if hasattr(callbacks, "WeightAveraging"):  # newer than the oldest Lightning
        yield callbacks.WeightAveraging


@each_method
@pytest.mark.parametrize("averaging", list(averaging_callbacks()))
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_weight_averaging_behind_us_works_and_in_front_is_refused(method, averaging):
    plain, module, callback = LitToy(), LitToy(), averaging()
    fit(plain, [method.callback()])
    fit(module, [method.callback(), callback])
    assert module.losses[:7] == plain.losses[:7]
    average = callback._average_model
    assert list(getattr(average, "module", average).state_dict()) == list(plain.state_dict())
    with pytest.raises(lt.TransferConfigError, match=f"Put {named(method)} first in callbacks"):
        fit(LitToy(), [averaging(), method.callback()])
