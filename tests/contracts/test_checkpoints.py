"""What a run with a method writes, the user's plain class and a run without the method can read."""

import pytest
import torch
from lightning.pytorch import callbacks

import lightning_transfer as lt
from lightning_transfer.glue.loading import load_from_checkpoint
from lightning_transfer.surgery import Structure
from tests import toys
from tests.methods import chosen, each, one
from tests.toys import LitToy, SaveEveryStep, assert_same, fit, trainer, weights

each_layered = each(changes_layers=True)
each_plain = each(changes_layers=False)


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


@each_plain
def test_the_users_class_loads_it_strictly(method, written):
    module, folder = written(method)
    loaded = PlainRun.load_from_checkpoint(folder / "step=12.ckpt")
    assert_same(weights(loaded), weights(module))
    assert_same(weights(lt.load_from_checkpoint(PlainRun, folder / "step=12.ckpt")), weights(module))
    assert list(module.state_dict()) == list(PlainRun().state_dict())


@each_plain
@pytest.mark.parametrize("name", ["step=3", "after"])
def test_a_run_without_the_callback_resumes_it(method, written, name):
    _, folder = written(method)
    with pytest.warns(UserWarning, match=f"Please add the following callbacks: .'{named(method)}'"):
        runner = fit(PlainRun(), ckpt_path=folder / f"{name}.ckpt", max_epochs=3)
    assert runner.global_step == 18


@each(has_source=True)
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


@each_plain
def test_weights_only_checkpoint_holds_the_users_network_and_nothing_else(method, tmp_path):
    class Saving(LitToy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    fit(Saving(), [method.callback()], max_epochs=1)
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(LitToy().state_dict())
    assert "lightning_transfer" not in str(checkpoint.keys())


@each_plain
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
    with pytest.raises(lt.TransferConfigError, match="not a Lightning checkpoint"):
        lt.strip_checkpoint(tmp_path / "list.pt", tmp_path / "out.ckpt")


@each()
@pytest.mark.parametrize("place", ["configure_callbacks", "append"])
def test_a_second_callback_of_a_kind_is_refused_by_name_before_training(method, place):
    """`Trainer(callbacks=[...])` refuses them itself."""
    module, runner = LitToy(), trainer()
    if place == "append":
        runner.callbacks += [method.callback(), method.callback()]
    else:
        module.configure_callbacks = lambda: [method.callback(), method.callback()]
    with pytest.raises(
        lt.TransferConfigError, match=f"There are 2 {named(method)} in callbacks and configure_callbacks"
    ):
        runner.fit(module, toys.target_loader())
    assert runner.global_step == 0


def test_swapped_arguments_are_refused_by_name(tmp_path):
    (tmp_path / "run.ckpt").touch()
    for first in ("run.ckpt", LitToy()):
        with pytest.raises(
            lt.TransferConfigError, match=r"expected your LightningModule class.*\(LitModel, 'run.ckpt'"
        ):
            lt.load_from_checkpoint(first, LitToy)
    with pytest.raises(lt.TransferConfigError, match=r"strip_checkpoint\('.*run.ckpt', '.*plain.ckpt'\)\.$"):
        lt.strip_checkpoint(tmp_path / "plain.ckpt", tmp_path / "run.ckpt")
    with pytest.raises(lt.TransferConfigError, match="takes two files, not a LitToy"):
        lt.strip_checkpoint(LitToy(), "run.ckpt")


def averaging_callbacks():
    yield lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    if hasattr(callbacks, "WeightAveraging"):  # newer than the oldest Lightning
        yield callbacks.WeightAveraging


@each()
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


@each_layered
def test_a_changed_network_is_loaded_and_made_plain(method, written):
    module, folder = written(method)
    loaded = method.load(PlainRun, folder / "step=12.ckpt")
    assert type(loaded) is PlainRun
    assert_same(weights(loaded), weights(module))
    images = torch.randn(4, 3, 6, 6)
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    method.plain(loaded)
    PlainRun().load_state_dict(loaded.state_dict(), strict=True)


@each_layered
def test_a_change_of_a_kind_that_is_not_known_here_names_the_loader_that_knows_all(method, written, monkeypatch):
    _, folder = written(method)
    monkeypatch.setattr(Structure, "kinds", {})
    with pytest.raises(
        lt.TransferConfigError, match=r"known now: none\. Load .*lightning_transfer\.load_from_checkpoint"
    ):
        load_from_checkpoint(PlainRun, folder / "after.ckpt")


@each_layered
def test_the_mixins_class_loads_it_by_itself(method, tmp_path):
    module = method.mixin()
    fit(module, [SaveEveryStep(tmp_path)], max_epochs=1)
    loaded = method.mixin()
    loaded.load_state_dict(torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"], strict=True)
    assert_same(weights(loaded), weights(module))
    callbacks_own = LitToy()
    fit(callbacks_own, [method.callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    loaded.load_state_dict(torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"], strict=True)


@each_layered
def test_test_and_predict_read_a_changed_network(method, written):
    module, folder = written(method)
    runner = trainer([method.callback()])
    fresh = PlainRun()
    runner.test(fresh, toys.target_loader(), ckpt_path=folder / "step=12.ckpt", verbose=False)
    assert_same(weights(fresh), weights(module))


@each_layered
def test_a_checkpoint_of_another_structure_is_refused_by_name(method, written, tmp_path):
    _, folder = written(method)
    name = named(method)
    fit(PlainRun(), [SaveEveryStep(tmp_path / "plain")], max_epochs=1)
    with pytest.raises(lt.TransferConfigError, match=f"written without {name}"):
        fit(PlainRun(), [method.callback()], ckpt_path=tmp_path / "plain/step=6.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fit(PlainRun(), ckpt_path=folder / "step=3.ckpt")  # not ours to say; the keys tell
    with pytest.raises(
        lt.TransferConfigError,
        match=rf"holds a changed network.*by functional\.{method.callback().structure.remove}, and",
    ):
        lt.strip_checkpoint(folder / "step=3.ckpt", tmp_path / "out.ckpt")
    other = next(row for row in chosen(changes_layers=True) if row is not method)
    with pytest.raises(lt.TransferConfigError, match=f"holds {method.callback().structure.__name__}|written without"):
        fit(PlainRun(), [other.callback()], ckpt_path=folder / "step=3.ckpt")


@pytest.mark.parametrize(
    ("name", "other", "difference"),
    [
        ("gated", lambda: lt.GatedTransfer(tap="model.bn", ratio=4), "ratio: 2 in the checkpoint, 4 now"),
        ("gated", lambda: lt.GatedTransfer(tap="model.bn", ratio=2), "dropout: 0.0 in the checkpoint, 0.5 now"),
        ("gated", lambda: lt.GatedTransfer(ratio=2, gate_dropout=0, dropout=0), "tap: model.bn in the checkpoint"),
        (
            "collaborative",
            lambda: lt.CollaborativeFinetuning([toys.OtherNet()], frozen_layers={"source1": 1}, weight=0.5),
            "weight: 0.2 in the checkpoint, 0.5 now",
        ),
        ("collaborative", lambda: lt.CollaborativeFinetuning([toys.OtherNet()]), "frozen.*in the checkpoint"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_with_the_difference(written, name, other, difference):
    _, folder = written(one(name=name))
    with pytest.raises(lt.TransferConfigError, match=difference):
        fit(PlainRun(), [other()], ckpt_path=folder / "step=3.ckpt")


def test_other_options_of_a_changed_network_are_refused_with_the_differences(tmp_path):
    fit(LitToy(), [lt.AdaFilter(gated="model.conv", gate_width=4), SaveEveryStep(tmp_path)], max_epochs=1)
    with pytest.raises(lt.TransferConfigError, match="width: 4 in the checkpoint, 8 now"):
        fit(LitToy(), [lt.AdaFilter(gated="model.conv", gate_width=8)], ckpt_path=tmp_path / "step=3.ckpt")
    gated = LitToy()
    lt.functional.apply_adafilter(gated, gated="model.conv", gate_width=4)
    with pytest.raises(lt.TransferConfigError, match="gated already, with gate_width=4"):
        fit(gated, [lt.AdaFilter(gated="model.conv", gate_width=8)])


@each_layered
def test_spawned_processes_cannot_hand_changed_layers_back(method):
    callback = method.callback()
    runner = trainer([callback], strategy="ddp_spawn", devices=2)
    with pytest.raises(lt.TransferConfigError, match="cannot return to your script. Use strategy='ddp'"):
        callback.setup(runner, LitToy(), "fit")


@each_layered
def test_a_network_that_is_replaced_behind_us_is_named(method):
    class Replaced(LitToy):
        def setup(self, stage):
            self.model = toys.toy_net()

    with pytest.raises(lt.TransferConfigError, match="replaced after"):
        fit(Replaced(), [method.callback()])


@each_layered
def test_of_a_second_callback_or_another_place_nothing_is_silent(method):
    module = method.mixin()
    with pytest.raises(lt.TransferConfigError, match="Leave one out"):
        method.callback().change_layers(trainer(), module)
    changed = LitToy()
    method.callback().change_layers(trainer(), changed)
    with pytest.raises(lt.TransferConfigError, match="already, with"):
        method.other().change_layers(trainer(), changed)


def test_a_checkpoint_of_two_methods_is_refused_where_one_is_missing(tmp_path):
    gates, gated = one(name="adafilter"), one(name="gated")
    fit(LitToy(), [gates.callback(), gated.callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    for method, missing in zip((gates, gated), ("GatedTransfer", "AdaFilter"), strict=True):
        with pytest.raises(lt.TransferConfigError, match=f"changed by {missing}, which is not in callbacks"):
            fit(LitToy(), [method.callback()], ckpt_path=tmp_path / "step=3.ckpt")


class Filtering(PlainRun):
    """Saves weights alone, and loads what there is."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        named = {name for name, _ in [*self.named_parameters(), *self.named_buffers()]}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in named}


@each_layered
def test_a_checkpoint_without_the_record_of_its_layers_is_refused_by_every_reader(method, tmp_path):
    module, path = Filtering(), tmp_path / "run.ckpt"
    runner = fit(module, [method.callback()], max_epochs=1)
    runner.save_checkpoint(path)
    lost = rf"was changed by {named(method)}, and .* keep all that end in '_extra_state', and save"
    with pytest.raises(lt.TransferConfigError, match=lost):
        lt.load_from_checkpoint(Filtering, path)
    for callback in (method.callback(), one(name="soft-separate-add").callback()):
        with pytest.raises(lt.TransferConfigError, match=lost):
            trainer([callback]).validate(Filtering(), toys.target_loader(), ckpt_path=path, verbose=False)
    with pytest.raises(lt.TransferConfigError, match=lost):
        fit(Filtering(), [method.callback()], ckpt_path=path)
    with pytest.raises(lt.TransferConfigError, match=lost):
        lt.strip_checkpoint(path, tmp_path / "plain.ckpt")
    runner.validate(module, toys.target_loader(), ckpt_path=path, verbose=False)  # it has the layers


@each_layered
def test_a_network_that_was_made_plain_before_it_was_saved_needs_no_record(method, tmp_path):
    module, path = Filtering(), tmp_path / "run.ckpt"
    runner = fit(module, [method.callback()], max_epochs=1)
    method.plain(module)
    runner.save_checkpoint(path)
    assert_same(weights(lt.load_from_checkpoint(Filtering, path)), weights(module))
    fresh = Filtering()
    trainer([method.callback()]).validate(fresh, toys.target_loader(), ckpt_path=path, verbose=False)
    assert_same(weights(fresh), weights(module))
    lt.strip_checkpoint(path, tmp_path / "plain.ckpt")
