"""Situations of real projects in which a term could go wrong without a word."""

import copy
import logging
import pickle
import random
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_transfer as lt
from lightning_transfer.source.stream import _Reproducible
from tests import toys
from tests.contracts.test_as_found import anatomy
from tests.methods import SoftByHand, chosen, each, one
from tests.toys import LitToy, Recorder, SaveEveryStep, assert_same, fit, trainer, weights

each_method, each_sourced = each(), each(has_source=True)
SOFT = one(has_source=True)
JOINT = one(is_joint=True)
CONSTANT = lt.Schedule(1.0, 1.0)


def always(method, data=None, **options):
    """The method's callback at constant weight."""
    return method.always(lt.Schedule(0.5, 0.5), data, **options)


@each_method
def test_where_nothing_is_wrong_nothing_is_printed_and_no_random_state_moves(method, capfd, monkeypatch):
    """But log lines; warnings are errors here. The source images draw from every generator."""

    class Drawing(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            torch.rand(()), np.random.rand(), random.random()
            return super().__getitem__(index)

    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    states = []
    for ours in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        callbacks = [always(method, Drawing(*toys.source_data().tensors))] if ours else []
        runner = trainer(callbacks)
        runner.fit(LitToy(), toys.target_loader(), toys.target_loader())
        runner.test(runner.lightning_module, toys.target_loader(), verbose=False)
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    assert states[1] == states[0]
    assert capfd.readouterr() == ("", "")


class SharedStep(LitToy):
    """A validation step that is the training step."""

    def __init__(self):
        super().__init__()
        self.validated = []

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.training_step(batch, batch_idx).item())


@each_method
def test_a_validation_step_that_calls_the_training_step_gets_the_targets_loss(method):
    data, module = Recorder(toys.source_data()), SharedStep()
    runner = trainer([always(method, data)], num_sanity_val_steps=2)
    runner.fit(module, toys.target_loader(), toys.target_loader())
    during = module.validated[-6:]
    trainer().validate(module, toys.target_loader(), verbose=False)
    assert during == pytest.approx(module.validated[-6:], rel=1e-4)
    assert len(data.loaded) <= 12 * 4 + 1  # one to look at while the head is sought


def test_joint_loss_of_a_mixin_outside_of_training_is_the_targets():
    class Shared(SoftByHand):
        def validation_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            assert self.joint_loss(loss) is loss

    module = Shared(SOFT.callback().source, weight=CONSTANT)
    trainer(max_epochs=1).fit(module, toys.target_loader(), toys.target_loader())


@pytest.mark.filterwarnings("ignore:The kept source head starts")  # annealed away in the first run, it has drifted
def test_a_mixins_second_trainer_begins_again(tmp_path):
    """Also after a dry run, and from the weights of another run under other options."""
    data = Recorder(toys.source_data())
    module, drawn = SOFT.mixin(data), []
    for _ in range(2):
        data.loaded.clear()
        fit(module)
        drawn.append(list(data.loaded))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5 * 4
    automatic = WithHyperparameters(SOFT.callback().source, weight=lt.Schedule(until=1.0), ignore=["source"])
    fit(automatic, fast_dev_run=True)
    fit(automatic, [SaveEveryStep(tmp_path)], max_epochs=2)
    fit(automatic, max_epochs=3)
    other = WithHyperparameters(lt.SourceTask(toys.source_data(), num_classes=7, seed=9), ignore=["source"])
    other.load_state_dict(torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"])
    fit(other)


def test_a_mixin_is_checked_where_the_user_forgets_super():
    class Forgetful(SoftByHand):
        def on_train_start(self):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            pass

    with pytest.raises(lt.TransferConfigError, match="manual optimization"):
        fit(Forgetful(SOFT.callback().source, weight=lt.Schedule()))


def test_hyperparameters_saved_after_the_source_task_are_seen_too():
    class Late(SoftByHand):
        def __init__(self, source):
            super().__init__(source, weight=lt.Schedule(until_steps=5))
            self.save_hyperparameters()

    with pytest.raises(lt.TransferConfigError, match="ignore="):
        fit(Late(SOFT.callback().source))


def test_a_mixins_joint_pass_ends_with_its_batch():
    data = Recorder(toys.source_data())

    class Ends(WithHyperparameters):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx < 5 else None

        def on_train_epoch_end(self):
            self.model(toys.target_data().tensors[0][:4])

    fit(Ends(JOINT.callback(data).source, ignore=["source"]), max_epochs=1)
    assert len(data.loaded) == 5 * 4


def test_a_network_built_twice_is_joined_once():
    class Twice(toys.Late):
        def setup(self, stage):
            self.configure_model()

        def on_train_start(self):
            self.num_hooks = len(self.model.fc._forward_pre_hooks)
            self.num_params = len(self.optimizers().param_groups[0]["params"])

    module = Twice()
    fit(module, [SOFT.callback()])
    assert (module.num_hooks, module.num_params) == (1, 8)
    assert not module.model.fc._forward_pre_hooks


def test_looking_at_listed_labels_changes_none_of_them():
    class Shifted(torch.utils.data.Dataset):
        targets = torch.arange(1, 8)

        def __len__(self):
            return 7

        def __getitem__(self, index):
            torch.rand(())
            return torch.zeros(3, 6, 6), int(self.targets[index]) - 1

    before = torch.get_rng_state()
    SOFT.callback(Shifted()).make_part(LitToy())
    assert Shifted.targets.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert (torch.get_rng_state() == before).all()


def test_a_body_that_is_frozen_for_now_beside_something_that_trains_is_no_fault():
    class WithAuxiliary(LitToy):
        def __init__(self):
            super().__init__()
            self.model.requires_grad_(False)
            self.model.fc.requires_grad_(True)
            self.auxiliary = nn.Parameter(torch.zeros(3))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.auxiliary.sum()

    fit(WithAuxiliary(), [SOFT.callback()])


def test_an_optimizer_that_runs_its_closure_twice_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Careful(LitToy):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.1)

    with pytest.raises(lt.TransferConfigError, match="second source batch in one step"):
        fit(Careful(), [SOFT.callback()])


@pytest.mark.parametrize("kept", [True, False])
def test_a_head_learns_at_the_rate_of_its_like(kept):
    """A pretrained one with the body, a new one with the user's new head."""

    class Grouped(LitToy):
        def configure_optimizers(self):
            body = [p for name, p in self.named_parameters() if "fc" not in name and "transfer" not in name]
            return torch.optim.SGD([{"params": self.model.fc.parameters(), "lr": 1.0}, {"params": body}], lr=1e-4)

        def on_train_start(self):
            self.sizes = [len(group["params"]) for group in self.optimizers().param_groups]

    module = Grouped()
    task = SOFT.callback().source if kept else lt.SourceTask(toys.source_data(), num_classes=7)
    fit(module, [lt.SoftFinetuning(task, weight=CONSTANT)])
    assert module.sizes == ([2, 6] if kept else [4, 4])


def test_a_copy_made_in_mid_fit_can_be_used_again():
    copies = []

    class Copying(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            copies.append(copy.copy(trainer.callbacks[0]))

    fit(LitToy(), [SOFT.callback(), Copying()], max_epochs=1)
    fit(LitToy(), [copies[0]])


def test_what_is_wrong_is_said_also_beside_a_callback_that_copies():
    class Setup(LitToy):
        def setup(self, stage):
            pass

    callback = lt.SoftFinetuning(SOFT.callback().source, head="model.nope")
    averaging = L.callbacks.StochasticWeightAveraging(0.05)
    with pytest.raises(lt.TransferConfigError, match="(?s)head='model.nope'.*build the network in __init__"):
        fit(Setup(), [callback, averaging])


@each_sourced
def test_a_source_pass_without_gradients_is_refused_or_left_to_the_steps_own_call(method):
    class Cut(LitToy):
        @torch.no_grad()
        def forward(self, pixels):
            return self.model(pixels)

        def training_step(self, batch, batch_idx):
            self(batch[0])  # pseudo-labels, say
            return F.cross_entropy(self.model(batch[0]), batch[1])

    callback, module, plain = lt.SoftFinetuning(method.callback().source, weight=CONSTANT), Cut(), Cut()
    if callback.source.forward == "separate":
        with pytest.raises(lt.TransferConfigError, match="source features have no gradient"):
            fit(module, [callback])
        return
    fit(plain)
    fit(module, [callback])
    assert (module.model.conv.weight != plain.model.conv.weight).any()


def test_a_frozen_body_is_no_fault_of_the_pass():
    class Frozen(LitToy):
        def __init__(self):
            super().__init__()
            self.model.conv.requires_grad_(False)
            self.model.bn.requires_grad_(False)

    with pytest.warns(lt.NoEffectWarning):
        fit(Frozen(), [SOFT.callback()])


class BuiltLate(LitToy):
    error = None

    def __init__(self):
        super().__init__()
        self.model = None

    def setup(self, stage):
        if self.error:
            raise self.error
        self.model = toys.toy_net()


@each_method
def test_a_fit_that_fails_before_the_network_is_built_leaves_nothing_for_the_next(method):
    module, plain = BuiltLate(), BuiltLate()
    fit(plain)
    module.error = RuntimeError("in setup")
    with pytest.raises(RuntimeError, match="in setup"):
        fit(module, [method.callback()])
    assert set(vars(module)) == {*vars(BuiltLate()), "_hparams"} | {"error"}
    module.error = None
    fit(module)
    assert module.losses == plain.losses


@each_method
def test_a_hook_on_the_instance_is_put_back(method):
    module = BuiltLate()
    own = module.configure_model
    module.configure_model = own
    fit(module, [method.callback()])
    assert vars(module)["configure_model"] is own


def test_looking_for_the_head_leaves_the_random_state_alone():
    class Noisy(LitToy):
        def __init__(self):
            super().__init__()
            self.model = None
            self.net = nn.ModuleDict({"out": nn.Linear(toys.WIDTH, 5), "conv": nn.Conv2d(3, toys.WIDTH, 6)})

        def forward(self, pixels):
            return self.net["out"](self.net["conv"](pixels + torch.rand_like(pixels)).flatten(1))

    module, callback = Noisy(), SOFT.callback()
    before = torch.get_rng_state()
    assert callback.make_part(module).head_path == "net.out"
    assert (torch.get_rng_state() == before).all()


@each_sourced
def test_a_head_that_is_replaced_in_the_users_setup_is_the_one_that_counts(method):
    class Replacing(LitToy):
        def setup(self, stage):
            self.model.fc = nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)

    callback, module = method.callback(), Replacing()
    fit(module, [callback])
    assert callback.part.get_extra_state()["position"] == 20
    assert not module.model.fc._forward_pre_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand_does_not_move_protected_statistics(reentrant):
    class Checkpointed(LitToy):
        def forward(self, pixels):
            run = partial(checkpoint, self.model.features, use_reentrant=reentrant)
            return self.model.fc(run(pixels.requires_grad_() if torch.is_grad_enabled() else pixels))

    with pytest.raises(lt.TransferConfigError, match="runs again in the backward pass.*forward='joint'"):
        fit(Checkpointed(), [SOFT.callback()])
    fit(Checkpointed(), [SOFT.callback(batchnorm="update")])


class Whole(LitToy):
    def forward(self, pixels):
        return checkpoint(self.model, pixels, use_reentrant=False)


@each_sourced
def test_checkpointing_of_the_whole_network_is_no_fault_where_no_source_image_passes(method):
    plain, off = Whole(), Whole()
    fit(plain)
    fit(off, [method.off()])
    assert_same(weights(off), weights(plain))


def test_checkpointing_of_the_whole_network_is_refused_by_name_in_a_joint_pass():
    with pytest.raises(lt.TransferConfigError, match="ToyNet runs again in the backward pass.*forward='separate'"):
        fit(Whole(), [JOINT.callback()])


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_a_source_head_has_the_type_of_the_users_head(is_kept, forward):
    class Double(LitToy):
        def __init__(self):
            super().__init__()
            self.double()

        def forward(self, pixels):
            return super().forward(pixels.double())

    head = {"head": toys.source_head()} if is_kept else {"num_classes": toys.SOURCE_CLASSES}
    source = lt.SourceTask(toys.source_data(), forward=forward, **head)
    callback = lt.SoftFinetuning(source, weight=CONSTANT)
    fit(Double(), [callback])
    assert {param.dtype for param in callback.part.head.parameters()} == {torch.float64}


def test_a_head_may_be_called_by_keyword():
    class Keyword(toys.ToyNet):
        def forward(self, pixels):
            return self.fc(input=self.features(pixels))

    results = []
    for net in (toys.toy_net(), Keyword()):
        for method in chosen(has_source=True):
            module = LitToy()
            net.load_state_dict(toys.toy_net().state_dict())
            module.model = net
            fit(module, [method.callback()])
            results.append(weights(module))
    half = len(results) // 2
    for by_keyword, by_place in zip(results[half:], results[:half], strict=True):
        assert_same(by_keyword, by_place)


class Skipping(LitToy):
    """Skips every second batch, in front of the network or behind it, and validates in between."""

    in_front = True

    def training_step(self, batch, batch_idx):
        if self.in_front and batch_idx % 2:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


@pytest.mark.parametrize("in_front", [True, False])
def test_a_joint_pass_ends_with_its_step(in_front):
    data, module = Recorder(toys.source_data()), Skipping()
    module.in_front = in_front
    callback = always(JOINT, data)
    runner = trainer([callback], val_check_interval=1)
    runner.fit(module, toys.target_loader(), toys.target_loader(8))
    assert len(data.loaded) == (6 if in_front else 12) * 4


@each_sourced
def test_a_longer_training_never_raises_the_weight_again(method, tmp_path):
    source = method.callback().source
    fit(LitToy(), [lt.SoftFinetuning(source), SaveEveryStep(tmp_path)])
    resumed = lt.SoftFinetuning(source)
    fit(LitToy(), [resumed], ckpt_path=tmp_path / "step=12.ckpt", max_epochs=8)
    assert resumed.part.get_extra_state()["position"] == 6 * 4
    with pytest.raises(lt.TransferConfigError, match=r"now has 48 steps; it had 12 when this run began.*until_steps="):
        fit(LitToy(), [lt.SoftFinetuning(source)], ckpt_path=tmp_path / "step=4.ckpt", max_epochs=8)


@each_sourced
def test_a_test_of_an_earlier_checkpoint_does_not_set_the_run_back(method, tmp_path):
    callback, module = method.callback(), LitToy()
    runner = fit(module, [callback, SaveEveryStep(tmp_path)])
    position = callback.part.get_extra_state()["position"]
    runner.test(module, toys.target_loader(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert callback.part.get_extra_state()["position"] == position == 20


@each_sourced
def test_a_checkpoint_of_a_plain_run_is_refused_with_the_line_to_write(method, tmp_path):
    fit(LitToy(), [SaveEveryStep(tmp_path)], max_epochs=1)
    with pytest.raises(
        lt.TransferConfigError, match=r"written without \w+Finetuning.*load_from_checkpoint\(YourModule, path\)"
    ):
        fit(LitToy(), [method.callback()], ckpt_path=tmp_path / "step=6.ckpt")
    fit(LitToy.load_from_checkpoint(tmp_path / "step=6.ckpt"), [method.callback()])


def test_recomputed_activations_are_refused_where_statistics_would_move():
    module = LitToy()
    module.model.grad_checkpointing = True
    with pytest.raises(lt.TransferConfigError, match="grad_checkpointing.*forward='joint'"):
        fit(module, [SOFT.callback()])
    fit(module, [SOFT.callback(batchnorm="update")])


class OwnNorm(nn.Module):
    """Statistics that torch's BatchNorm does not keep: of a library's own layer."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(toys.WIDTH))

    def forward(self, pixels):
        if self.training:
            self.running_mean = self.running_mean.lerp(pixels.detach().mean((0, 2, 3)), self.momentum)
        return pixels - self.running_mean[:, None, None]


class GhostNorm(nn.BatchNorm2d):
    """Normalises parts of a batch, with a forward of its own."""

    def forward(self, pixels):
        own = self.running_mean, self.running_var, self.weight, self.bias
        return torch.cat([F.batch_norm(part, *own, self.training, 0.1) for part in pixels.split(2)])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(nn.BatchNorm2d(toys.WIDTH)),
        lambda: OwnNorm(0.1),
        lambda: GhostNorm(toys.WIDTH),
    ],
)
def test_statistics_of_another_kind_are_refused_and_left(make):
    plain, module = LitToy(), LitToy()
    plain.model.bn, module.model.bn = make(), make()
    fit(plain, max_steps=1)
    with pytest.raises(lt.TransferConfigError, match=r"'model.bn.running_mean'.*Pass SourceTask\(batchnorm='update'\)"):
        fit(module, [SOFT.callback()])
    assert torch.equal(module.model.bn.running_mean, plain.model.bn.running_mean)


class Unfreezing(L.Callback):
    """Lets a layer train from the second step on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.model.bn.train(trainer.global_step > 0)


def test_statistics_that_begin_to_move_later_are_refused():
    module = LitToy()
    module.model.bn = OwnNorm(0.1)
    soft = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=CONSTANT)
    with pytest.raises(lt.TransferConfigError, match=r"'model.bn.running_mean'.*Pass SourceTask\(batchnorm='update'\)"):
        fit(module, [soft, Unfreezing()])
    assert module.trainer.global_step == 1


def test_statistics_that_are_frozen_or_not_numbers_are_no_fault():
    module = LitToy()
    module.model.bn, module.unused = OwnNorm(0.0), nn.BatchNorm2d(2)
    module.unused.running_mean.fill_(torch.nan)
    fit(module, [lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=CONSTANT)])


def test_statistics_of_instance_norm_cannot_be_protected():
    module = LitToy()
    module.model.bn = nn.InstanceNorm2d(toys.WIDTH, track_running_stats=True)
    with pytest.raises(lt.TransferConfigError, match="'model.bn', an InstanceNorm that tracks"):
        fit(module, [SOFT.callback()])


@pytest.mark.parametrize(
    "keep", [lambda net: net.classifier, lambda net: net.classifier[-1]], ids=["container", "layer"]
)
def test_a_kept_head_takes_the_place_of_what_it_was(keep):
    """A container's own hidden layer is part of the kept head, not of the shared network."""

    class Mlp(toys.ToyNet):
        def __init__(self, classes):
            super().__init__()
            self.fc = None
            self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

        def forward(self, pixels):
            return self.classifier(self.features(pixels))

    module = LitToy()
    module.model = Mlp(5)
    head = keep(Mlp(7))
    callback = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), head=head, batch_size=4), weight=CONSTANT)
    features = module.model.features(toys.source_data().tensors[0])
    fits = isinstance(head, nn.Linear)
    assert callback.make_part(module).head_path == ("model.classifier.2" if fits else "model.classifier")
    assert callback.make_part(module).head(module.model.classifier[:2](features) if fits else features).shape == (20, 7)


def test_workers_are_sent_the_dataset_only():
    task = lt.SourceTask(toys.source_data(), num_classes=7, adapt=lambda batch: batch)
    assert pickle.loads(pickle.dumps(_Reproducible(task))).seed == 0


def test_listed_labels_that_the_dataset_maps_are_not_refused():
    class Mapped(list):
        targets = (100, 101)

    data = Mapped([(torch.rand(3, 6, 6), 0), (torch.rand(3, 6, 6), 1)])
    lt.SoftFinetuning(lt.SourceTask(data, num_classes=2)).make_part(LitToy())


def test_a_loss_with_weights_moves_with_the_module():
    loss = nn.CrossEntropyLoss(weight=torch.ones(7))
    part = SOFT.callback(loss=loss).make_part(LitToy())
    assert part.double().loss.weight.dtype == torch.float64
    assert loss.weight.dtype == torch.float32


def test_a_sum_is_no_mean():
    with pytest.raises(lt.TransferConfigError, match="expected the mean"):
        SOFT.callback(loss=nn.CrossEntropyLoss(reduction="sum"))


class WithHyperparameters(lt.SourceTaskMixin, L.LightningModule):
    def __init__(self, source=None, folder=None, weight=CONSTANT, ignore=()):
        super().__init__()
        self.save_hyperparameters(ignore=[*ignore, "weight"])
        self.model = toys.toy_net()
        if source is not None:
            self.add_source_task(source, weight=weight)

    def training_step(self, batch, batch_idx):
        return self.joint_loss(F.cross_entropy(self.model(batch[0]), batch[1]))

    def forward(self, pixels):
        return self.model(pixels)

    configure_optimizers = LitToy.configure_optimizers


def test_a_mixins_checkpoint_loads_without_a_source(tmp_path):
    source = SOFT.callback().source
    with pytest.raises(lt.TransferConfigError, match=r"save_hyperparameters\(ignore=\['source'\]\)"):
        WithHyperparameters(source)
    module = WithHyperparameters(source, ignore=["source"])
    fit(module, [SaveEveryStep(tmp_path)], max_epochs=1)
    bare = WithHyperparameters.load_from_checkpoint(tmp_path / "step=6.ckpt")
    assert_same(weights(bare.model), weights(module.model))
    lt.strip_checkpoint(tmp_path / "step=6.ckpt", tmp_path / "plain.ckpt")
    plain = LitToy.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert_same(weights(plain.model), weights(module.model))


def test_of_a_mixin_beside_weight_averaging_strip_leaves_nothing_in_either_weights(tmp_path):
    if not hasattr(L.callbacks, "WeightAveraging"):  # newer than the oldest Lightning
        return
    module = WithHyperparameters(SOFT.callback().source, ignore=["source"])
    fit(module, [L.callbacks.WeightAveraging()], max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    lt.strip_checkpoint(tmp_path / "run.ckpt", tmp_path / "plain.ckpt")
    plain = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    names = list(LitToy().state_dict())
    assert [list(plain[key]) for key in ("state_dict", "current_model_state")] == [names, names]


def test_joint_loss_without_a_source_task_says_what_to_write():
    with pytest.raises(lt.TransferConfigError, match=r"self.add_source_task\(source\)"):
        fit(WithHyperparameters())


def test_a_checkpoint_that_holds_more_than_plain_data_is_read_only_when_asked(tmp_path):
    module = WithHyperparameters(folder=Path("a"), ignore=["source"])
    runner = trainer(max_epochs=1)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "path.ckpt")
    for read in (
        lambda: lt.load_from_checkpoint(WithHyperparameters, tmp_path / "path.ckpt"),
        lambda: lt.strip_checkpoint(tmp_path / "path.ckpt", tmp_path / "out.ckpt"),
    ):
        with pytest.raises(lt.TransferConfigError, match="pass weights_only=False"):
            read()
    assert lt.load_from_checkpoint(
        WithHyperparameters, tmp_path / "path.ckpt", weights_only=False
    ).hparams.folder == Path("a")


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (
            lambda batch: (batch["image"], batch["label"]),
            r"SourceTask\(adapt=\) with a source batch \[Tensor\(4, 3, 6, 6\)",
        )
    ],
)
def test_a_wrong_adapt_shows_what_it_was_given(adapt, message):
    with pytest.raises(TypeError, match="(?s)" + message):
        fit(LitToy(), [SOFT.callback(adapt=adapt)])


@each(has_source=True)
def test_the_anatomy_of_a_module_is_read_fully(method):
    """Guards the guard: `anatomy` sees a hook, a part and an attribute that stays behind."""
    module = LitToy()
    before = anatomy(module)
    module.model.fc.register_forward_pre_hook(lambda *_: None)
    assert anatomy(module) != before
