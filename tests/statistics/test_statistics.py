"""Pretrained statistics of BatchNorm are used and kept in training, and the module's modes are put back."""

import copy
import math
import pickle
import warnings

import lightning.pytorch as L
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, PlToy, SaveEveryStep, assert_same, fit, weights

STEEP = 5.0
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def slowly(module):
    """Return an optimizer with a rate that training without the statistics of the batch can take."""
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


class Toy(LitToy):
    configure_optimizers = slowly


class Steep(Toy):
    """Its gradient is larger than any limit here."""

    def training_step(self, batch, batch_idx):
        return STEEP * super().training_step(batch, batch_idx)


class PlSlowToy(PlToy):
    configure_optimizers = slowly


class WithNewLayer(Toy):
    """A head with a BatchNorm that was never trained; that of the network was."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.new = nn.Sequential(nn.BatchNorm1d(toys.WIDTH), nn.Linear(toys.WIDTH, toys.TARGET_CLASSES))

    def forward(self, pixels):
        return self.new(self.model.features(pixels))


def by_norm(limit):
    """Return a function that clips gradients by their norm, as torch does."""

    def clipped(grads):
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
        return [grad * min(1, limit / (norm + 1e-6)) for grad in grads]

    return clipped


def other_net():
    net = toys.OtherNet()
    net.bn1.running_mean += 0.5
    return net


def source(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), **options)


def modes(module):
    return [child.training for child in module.modules()]


def statistics(module):
    return {name: value for name, value in weights(module).items() if name.endswith(STATISTICS)}


@pytest.mark.parametrize(
    ("options", "of_trainer", "clipped"),
    [
        ({}, {}, by_norm(1.0)),
        ({"gradient_clip_val": 0.3}, {}, by_norm(0.3)),
        ({"gradient_clip_val": None}, {}, by_norm(math.inf)),
        (
            {"gradient_clip_val": 0.1},
            {"gradient_clip_algorithm": "value"},
            lambda grads: [g.clip(-0.1, 0.1) for g in grads],
        ),
        ({}, {"gradient_clip_val": 0.2}, by_norm(0.2)),
        ({}, {"gradient_clip_val": 0}, by_norm(math.inf)),
    ],
)
def test_training_is_that_of_a_loop_that_normalises_by_the_pretrained_statistics(options, of_trainer, clipped):
    module, net = Steep(), Toy().model.double()
    fit(module, [lt.FrozenStatistics(**options)], max_epochs=1, precision="64-true", **of_trainer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    for pixels, labels in toys.target_loader():
        optimizer.zero_grad()
        maps = net.conv(pixels.double())
        mean, variance, scale, shift = (
            value[:, None, None] for value in (net.bn.running_mean, net.bn.running_var, net.bn.weight, net.bn.bias)
        )
        maps = (maps - mean) / (variance + net.bn.eps).sqrt() * scale + shift
        (STEEP * F.cross_entropy(net.fc(maps.relu().mean((2, 3))), labels)).backward()
        grads = [param.grad for param in net.parameters()]
        assert sum(float((grad**2).sum()) for grad in grads) > 1
        assert max(float(grad.abs().max()) for grad in grads) > 0.1
        for param, grad in zip(net.parameters(), clipped(grads), strict=True):
            param.grad = grad
        optimizer.step()
    assert_same(weights(module.model), weights(net), tolerance=1e-9)


def test_a_module_that_clips_keeps_its_own_limit(caplog):
    class Clipping(Steep):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")

    module, expected = Clipping(), Steep()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(module, [lt.FrozenStatistics()])
    fit(expected, [lt.FrozenStatistics()], gradient_clip_val=0.2)
    assert_same(weights(module), weights(expected))
    assert any("Clipping has its own configure_gradient_clipping." in message for message in caplog.messages)


def test_an_error_of_lightning_about_clipping_says_who_has_set_the_limit():
    class Clipping(Toy):
        def on_before_optimizer_step(self, optimizer):
            self.clip_gradients(optimizer, gradient_clip_val=0.2)

    with pytest.raises(Exception, match="Please use only one of them") as error:
        fit(Clipping(), [lt.FrozenStatistics()])
    assert "pass FrozenStatistics(gradient_clip_val=None)" in error.value.__notes__[0]


def test_without_it_training_is_another():
    plain, module = Toy(), Toy()
    fit(plain), fit(module, [lt.FrozenStatistics()])
    assert plain.losses != module.losses
    assert not torch.equal(plain.model.bn.running_mean, module.model.bn.running_mean)


def test_a_new_layer_is_trained_as_usual():
    module, start = WithNewLayer(), WithNewLayer()
    fit(module, [lt.FrozenStatistics()])
    assert_same(statistics(module.model), statistics(start.model))
    assert not torch.equal(module.new[0].running_mean, start.new[0].running_mean)


@pytest.mark.parametrize(
    ("pretrained", "head", "is_kept"), [(500, 1, False), (500, 9, False), (500, 10, True), (9, 1, True)]
)
def test_a_new_layer_that_has_seen_a_few_batches_is_trained_as_usual(pretrained, head, is_kept):
    module = WithNewLayer()
    for layer, number in ((module.model.bn, pretrained), (module.new[0], head)):
        layer.num_batches_tracked.fill_(number)
    module.new[0].running_mean.fill_(0.1)  # as a forward with blank images makes it
    fit(module, [lt.FrozenStatistics()])
    assert bool((module.new[0].running_mean == 0.1).all()) is is_kept


def test_resumed_after_every_step_it_is_the_uninterrupted_run(tmp_path):
    """After a step the new layer's statistics look like pretrained ones."""
    whole = WithNewLayer()
    fit(whole, [lt.FrozenStatistics(), SaveEveryStep(tmp_path)], loader=toys.StatefulLoader())
    for cut in range(1, 12):
        module, path = WithNewLayer(), tmp_path / f"step={cut}.ckpt"
        fit(module, [lt.FrozenStatistics()], loader=toys.StatefulLoader(), ckpt_path=path)
        assert_same(weights(module), weights(whole))


def test_a_compiled_network_resumes_a_run_that_was_not_compiled(tmp_path):
    whole, module = Toy(), Toy()
    fit(whole, [lt.FrozenStatistics(), SaveEveryStep(tmp_path)], loader=toys.StatefulLoader())
    state = torch.load(tmp_path / "step=6.ckpt")
    module.load_state_dict(state["state_dict"])
    module.model = torch.compile(module.model, backend="eager")
    start = statistics(module)
    callback = lt.FrozenStatistics()
    callback.load_state_dict(next(iter(state["callbacks"].values())))
    runner = toys.trainer([callback])
    callback.on_train_start(runner, module)
    callback.on_train_batch_start(runner, module, None, 0)
    module(toys.target_data().tensors[0])
    assert_same(statistics(module), start)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_modes_are_as_found_after_a_fit_a_crash_and_an_interrupt(error):
    class Failing(WithNewLayer):
        def on_train_batch_end(self, *_):
            assert modes(self.model) == [True, True, False, True]  # the network, conv, bn, fc
            assert self.trainer.gradient_clip_val == 1
            if error is not None:
                raise error("in the middle")

    module, runner = Failing(), toys.trainer([lt.FrozenStatistics()])
    module.new.eval()  # by the user, who keeps it so
    found = modes(module)
    try:
        runner.fit(module, toys.target_loader())
    except (RuntimeError, SystemExit, KeyboardInterrupt):
        assert error is not None
    assert modes(module) == found
    assert runner.gradient_clip_val is None


def test_a_layer_in_training_mode_in_a_part_in_eval_mode_is_so_again():
    module = Toy()
    module.model.eval().bn.train()
    found, start = modes(module), statistics(module)
    fit(module, [lt.FrozenStatistics()])
    assert modes(module) == found
    assert_same(statistics(module), start)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_end"])
@pytest.mark.parametrize(("name", "layer"), [("model", "model.bn"), ("second", "second.bn1")])
@pytest.mark.parametrize("other", [other_net, nn.Sequential])
def test_a_network_that_is_replaced_is_refused(hook, name, layer, other):
    module = Toy()
    module.second = other_net()
    setattr(module, hook, lambda: setattr(module, name, other()))
    with pytest.raises(lt.TransferConfigError, match=f"{layer!r} is not the layer that it was"):
        fit(module, [lt.FrozenStatistics()])


def test_a_hook_that_calls_train_does_not_turn_it_off():
    class Training(Toy):
        def on_train_epoch_start(self):
            self.train()

        def on_validation_model_train(self):
            self.train()

    module, start = Training(), statistics(Toy())
    runner = toys.trainer([lt.FrozenStatistics()])
    runner.fit(module, toys.target_loader(), toys.target_loader())
    assert_same(statistics(module), start)
    assert all(modes(module))


@pytest.mark.parametrize(
    "other",
    [
        lambda: lt.SoftFinetuning(source(), weight=1.0),
        lambda: lt.SoftFinetuning(source(forward="joint"), weight=1.0),
        lambda: lt.AdaFilter(gated="model.conv", gate_bias=0.0),
        lambda: lt.GatedTransfer(ratio=4),
        lambda: lt.CollaborativeFinetuning([other_net()]),
        lambda: lt.ProbeStart(),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.filterwarnings("ignore:After ProbeStart the")
def test_beside_other_methods(other, order):
    module = Toy()
    fit(module, [lt.FrozenStatistics(), other()][::order])
    kept = [value for name, value in statistics(module).items() if name.endswith("running_mean")]
    expected = toys.toy_net().bn.running_mean, other_net().bn1.running_mean
    assert kept
    assert all(any(torch.equal(value, one) for one in expected) for value in kept)


def test_a_second_fit_goes_on_and_another_module_is_looked_at_anew():
    module, callback = WithNewLayer(), lt.FrozenStatistics()
    for _ in range(2):
        before = module.new[0].running_mean.clone()
        fit(module, [callback], max_epochs=1)
        assert not torch.equal(module.new[0].running_mean, before)
    trained = copy.deepcopy(module)  # all of its statistics are those of a trained network
    before = statistics(trained)
    fit(trained, [callback], max_epochs=1)
    assert_same(statistics(trained), before)


def test_a_layer_that_is_new_in_a_second_fit_is_refused():
    module, callback = Toy(), lt.FrozenStatistics()
    fit(module, [callback], max_steps=1)
    module.model = toys.ToyNet()
    with pytest.raises(lt.TransferConfigError, match="'model.bn' had pretrained statistics .* and is now a new BatchN"):
        fit(module, [callback], max_steps=1)


class Functional(nn.Module):
    """Normalises by its own mode, whatever that of the layer is."""

    def __init__(self):
        super().__init__()
        net = toys.toy_net()
        self.conv, self.bn, self.fc = net.conv, net.bn, net.fc

    def forward(self, pixels):
        bn = self.bn
        given = bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training
        return self.fc(F.relu(F.batch_norm(self.conv(pixels), *given)).mean((2, 3)))


class RunsInAHook(Toy):
    def on_train_epoch_start(self):
        self.train()
        self(toys.target_data().tensors[0])


class AfterValidation(Toy):
    def on_validation_model_train(self):
        self.train()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self(batch[0])
        return batch


@pytest.mark.parametrize("kind", ["functional", "hook", "after validation"])
def test_statistics_that_change_in_spite_of_it_are_an_error(kind):
    module = {"hook": RunsInAHook, "after validation": AfterValidation}.get(kind, Toy)()
    if kind == "functional":
        module.model = Functional()
    runner = toys.trainer([lt.FrozenStatistics()], max_epochs=1, max_steps=-1, val_check_interval=2)
    with pytest.raises(lt.TransferConfigError, match=r"The statistics of 'model\.bn' changed"):
        runner.fit(module, toys.target_loader(), toys.target_loader())


def test_a_network_that_is_compiled_when_training_starts_keeps_its_statistics():
    class Compiling(Toy):
        def on_train_start(self):
            self.model = torch.compile(self.model, backend="eager")

    module = Compiling()
    before = module.model.bn.running_mean.clone()
    fit(module, [lt.FrozenStatistics()], max_steps=2)
    assert torch.equal(module.model._orig_mod.bn.running_mean, before)


def test_the_same_in_pytorch_lightning_and_for_a_copy():
    results = []
    for kind, namespace, clone in (
        (Toy, L, lambda callback: callback),
        (PlSlowToy, pl, copy.deepcopy),
        (Toy, L, lambda callback: pickle.loads(pickle.dumps(callback))),
    ):
        module = kind()
        fit(module, [clone(lt.FrozenStatistics())], namespace=namespace)
        results.append(weights(module))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("tracked", [True, False])
def test_a_network_without_pretrained_statistics_is_refused(tracked):
    class Without(Toy):
        def __init__(self):
            super().__init__()
            self.model.bn = nn.BatchNorm2d(toys.WIDTH, track_running_stats=tracked)

    kind = "pretrained" if tracked else "running"
    with pytest.raises(lt.TransferConfigError, match=f"Without has no BatchNorm layer with {kind} statistics"):
        fit(Without(), [lt.FrozenStatistics()], max_epochs=1)


class ByHand(Toy):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("order", [1, -1])
def test_in_manual_optimization_and_beside_weight_averaging_it_is_the_same(caplog, order):
    plain, by_hand, averaged = Toy(), ByHand(), Toy()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(plain, [lt.FrozenStatistics(gradient_clip_val=None)])
        assert "clip" not in caplog.text
        fit(by_hand, [lt.FrozenStatistics()])  # in manual optimization, clipping is the module's own
    assert "because ByHand optimizes manually. In training_step call self.clip_gradients" in caplog.text
    assert_same(weights(by_hand), weights(plain))
    if not hasattr(L.callbacks, "WeightAveraging"):
        return  # newer than the oldest Lightning
    averaging = L.callbacks.WeightAveraging(avg_fn=lambda average, now, number: now)
    fit(averaged, [lt.FrozenStatistics(gradient_clip_val=None), averaging][::order])
    assert_same(weights(averaged), weights(plain))
    if hasattr(L.callbacks, "EMAWeightAveraging"):  # whose mean of equal statistics is rounded
        fit(Toy(), [lt.FrozenStatistics(), L.callbacks.EMAWeightAveraging(decay=0.9)][::order])


def test_what_it_did_is_logged(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(WithNewLayer(), [lt.FrozenStatistics()], logger=logger, max_epochs=1)
        fit(WithNewLayer(), [lt.FrozenStatistics()], logger=False, max_epochs=1, gradient_clip_val=2)
    assert logger.experiment.hparams["transfer/FrozenStatistics/gradient_clip_val"] == 1.0
    assert caplog.messages.count("FrozenStatistics: 1 of 2 layers keep their statistics.") == 2
    assert (
        sum("the Trainer's gradient_clip_val is 1 in this fit, because it has none" in m for m in caplog.messages) == 1
    )


@pytest.mark.parametrize(
    ("is_kept", "is_in_eval", "is_new", "is_said"),
    [
        (False, False, False, True),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
    ],
)
def test_probe_start_says_what_batchnorm_does_to_its_features(caplog, is_kept, is_in_eval, is_new, is_said):
    module = Toy()
    module.model.bn.train(not is_in_eval)
    if is_new:
        module.model.bn.reset_running_stats()
    callbacks = [lt.ProbeStart(), *([lt.FrozenStatistics()] if is_kept else [])]
    with caplog.at_level("INFO", logger="lightning.pytorch"), warnings.catch_warnings(action="ignore"):
        fit(module, callbacks, max_epochs=1)  # of random features the loss may rise
    assert any("Add FrozenStatistics() to keep" in message for message in caplog.messages) == is_said


def after_a_dry_run():
    """Its new BatchNorm has seen three batches, and the pretrained one many."""
    module = WithNewLayer()
    module.model.bn.num_batches_tracked.fill_(500)
    for _ in range(3):
        module.new(torch.rand(8, toys.WIDTH))
    return module


@pytest.mark.filterwarnings("ignore:After ProbeStart the")
@pytest.mark.parametrize("module", [WithNewLayer, after_a_dry_run])
@pytest.mark.parametrize("order", [1, -1])
def test_probe_start_names_a_new_layer_whose_features_are_not_those_of_the_probe(caplog, module, order):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(module(), [lt.ProbeStart(head="new.1"), lt.FrozenStatistics()][::order], max_epochs=1)
        fit(Toy(), [lt.ProbeStart(), lt.FrozenStatistics()][::order], max_epochs=1)
    assert [message[:22] for message in caplog.messages if "a new BatchNorm" in message] == ["ProbeStart: 'new.0' is"]


def test_statistics_that_another_callback_computes_anew_are_refused():
    with pytest.raises(lt.TransferConfigError, match="StochasticWeightAveraging computes .* use WeightAveraging"):
        fit(Toy(), [lt.FrozenStatistics(), StochasticWeightAveraging(swa_lrs=0.1)])


@pytest.mark.parametrize("inner", ["validate", "fit", "fit of the same module"])
def test_another_trainer_in_the_middle_of_a_fit_does_not_end_it(inner):
    class Nested(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            runner = toys.trainer([callback])
            if inner == "validate":
                runner.validate(Toy(), toys.target_loader(), verbose=False)
            else:
                with pytest.raises(lt.TransferConfigError, match="in the middle of another Trainer's fit. Give each"):
                    runner.fit(Toy() if inner == "fit" else module, toys.target_loader())
                module.trainer = trainer
            frozen.append(not module.model.bn.training)

    callback, frozen, module = lt.FrozenStatistics(), [], Toy()
    fit(module, [callback, Nested()])
    assert frozen == [True, True]
    assert_same(statistics(module), statistics(Toy()))
    assert all(modes(module))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "training_step"])
def test_a_step_that_calls_train_is_refused(hook):
    class Training(Toy):
        pass

    def trains(self, *given):
        self.train()
        return getattr(super(Training, self), hook)(*given)

    setattr(Training, hook, trains)
    with pytest.raises(
        lt.TransferConfigError, match="'model.bn' is in training mode at the end of a step.*Training or"
    ):
        fit(Training(), [lt.FrozenStatistics()])


def test_layers_that_a_resumed_run_does_not_have_are_refused(tmp_path):
    class Renamed(Toy):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.other, self.model = self.model, None

        def forward(self, pixels):
            return self.other(pixels)

    fit(Toy(), [lt.FrozenStatistics(), SaveEveryStep(tmp_path)], max_epochs=1)
    with pytest.raises(lt.TransferConfigError, match="knows the layer 'model.bn' from the checkpoint.*Renamed does"):
        fit(Renamed(), [lt.FrozenStatistics()], ckpt_path=tmp_path / "step=3.ckpt")


def test_a_refused_fit_is_not_remembered():
    module, callback = Toy(), lt.FrozenStatistics()
    module.model.bn = nn.BatchNorm2d(toys.WIDTH)
    with pytest.raises(lt.TransferConfigError, match="nothing to keep"):
        fit(module, [callback])
    module.model = toys.toy_net()
    fit(module, [callback])
    assert_same(statistics(module), statistics(Toy()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_network_keeps_its_statistics():
    module = Toy()
    module.model = torch.jit.script(module.model)
    fit(module, [lt.FrozenStatistics()])
    assert_same(statistics(module), statistics(Toy()))
    assert all(modes(module))


def test_a_hook_that_runs_the_network_sees_it_frozen_and_a_resume_is_exact(tmp_path):
    class Looking(Toy):
        def on_train_epoch_start(self):
            with torch.no_grad():
                self.bank = self(toys.target_data().tensors[0])

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self(batch[0]).mean() - self.bank.mean()) ** 2

    whole, module = Looking(), Looking()
    fit(whole, [lt.FrozenStatistics(), EpochEnd(tmp_path)])
    fit(module, [lt.FrozenStatistics()], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(weights(module), weights(whole))
    assert_same(statistics(module), statistics(Toy()))


class EpochEnd(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def test_a_network_that_the_user_has_put_in_eval_mode_stays_so():
    class Evaluated(Toy):
        def on_train_end(self):
            self.freeze()

    class Crashing(Toy):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("in validation")

    module, crashed = Evaluated(), Crashing()
    fit(module, [lt.FrozenStatistics()])
    assert not any(modes(module))
    with pytest.raises(RuntimeError, match="in validation"):
        toys.trainer([lt.FrozenStatistics()]).fit(crashed, toys.target_loader(), toys.target_loader())
    assert not any(modes(crashed))


def test_the_exported_card_names_it_and_doctor_knows_that_it_keeps_statistics(tmp_path):
    module, runner = Toy(), toys.trainer([lt.FrozenStatistics()])
    module.model.bn.requires_grad_(False)
    assert "drifts" in str(lt.doctor(module, toys.target_loader()))
    said = str(lt.doctor(module, toys.target_loader(), runner))
    assert "drifts" not in said
    assert "eval mode" not in said
    runner.fit(module, toys.target_loader())
    other = Toy()
    unclipped = fit(other, [lt.FrozenStatistics(gradient_clip_val=None)], max_epochs=1)
    for trained, of, options in ((module, runner, "1.0"), (other, unclipped, "None")):
        card = (lt.export(trained, tmp_path / options, trainer=of) / "README.md").read_text()
        assert f"- FrozenStatistics(gradient_clip_val={options}), https://arxiv.org/abs/2202.10054" in card


def test_strip_takes_it_out_of_a_checkpoint_and_a_damaged_one_is_refused(tmp_path):
    trainer = fit(Toy(), [lt.FrozenStatistics()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    lt.strip_checkpoint(tmp_path / "run.ckpt", tmp_path / "plain.ckpt")
    states = [torch.load(tmp_path / name)["callbacks"] for name in ("run.ckpt", "plain.ckpt")]
    assert ["FrozenStatistics" in state for state in states] == [True, False]
    states[0]["FrozenStatistics"]["lightning_transfer"]["model.bn.layer"] = True
    with pytest.raises(lt.TransferConfigError, match="damaged"):
        lt.FrozenStatistics().load_state_dict(states[0]["FrozenStatistics"])
