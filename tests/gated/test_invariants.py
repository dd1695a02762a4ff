"""What METHODS promises of the gated transfer network, and the phase in which its body rests."""

import copy
from contextlib import nullcontext

import lightning.pytorch as L
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_transfer as lt
from lightning_transfer.functional import apply_gated_transfer, gate_features, remove_gated_transfer
from lightning_transfer.methods.gated.apply import find_tap
from lightning_transfer.nn import AuxiliaryClassifier, TransferModule
from tests import toys
from tests.field import nets
from tests.toys import LitToy, assert_same, fit, weights

OPTIONS = {"tap": "model.bn", "ratio": 2}


def test_the_transfer_module_is_the_formula():
    rng = np.random.default_rng(0)
    features, squeeze, expand = rng.normal(size=(3, 8)), rng.normal(size=(2, 8)), rng.normal(size=(8, 2))
    expected = np.empty_like(features)
    for image in range(3):
        hidden = [max(0.0, sum(squeeze[j, i] * features[image, i] for i in range(8))) for j in range(2)]
        for i in range(8):
            weight = 1 / (1 + np.exp(-sum(expand[i, j] * hidden[j] for j in range(2))))
            expected[image, i] = weight * features[image, i]
    weighted, of_features = gate_features(*map(torch.from_numpy, (features, squeeze, expand)))
    np.testing.assert_allclose(weighted.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose((of_features * torch.from_numpy(features)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("ratio", [4, 8, 16, 32])
def test_extra_weights(ratio):
    net = nn.Sequential()
    net.body, net.fc = nn.Linear(4, 64), nn.Linear(64, 3)
    report = apply_gated_transfer(net, ratio=ratio)
    assert report.added_parameters == 2 * 64 * 64 // ratio
    assert report.added_parameters == sum(param.numel() for param in net.fc.transfer.parameters())


def test_without_an_expansion_all_features_are_halved_and_with_weights_of_one_nothing_changes():
    net = toys.toy_net().double().eval()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    features, before = net.features(images), net(images)
    apply_gated_transfer(net, ratio=2)
    nn.init.zeros_(net.fc.transfer.expand.weight)
    expected = 0.5 * features @ net.fc.head.weight.T + net.fc.head.bias
    torch.testing.assert_close(net(images), expected)
    nn.init.constant_(net.fc.transfer.squeeze.weight, 1.0)
    nn.init.constant_(net.fc.transfer.expand.weight, 1e6)
    assert (features.sum(1) > 0).all()
    torch.testing.assert_close(net(images), before)


class Looking(LitToy):
    """Keeps every parameter's gradient of each step."""

    def on_before_optimizer_step(self, optimizer):
        names = {id(param): name for name, param in self.named_parameters()}
        grads = {names[id(param)]: param.grad for param in self.parameters()}
        self.grads = {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def test_the_auxiliary_loss_reaches_nothing_behind_its_tap():
    """Only what is in front of the tap, and the auxiliary classifier, hear of it."""
    with_it, without = Looking(), Looking()
    fit(with_it, [lt.GatedTransfer(**OPTIONS, gate_dropout=0, dropout=0, aux_weight=3.0)], max_steps=1, max_epochs=1)
    fit(without, [lt.GatedTransfer(**OPTIONS, gate_dropout=0, dropout=0, aux_weight=0)], max_steps=1, max_epochs=1)
    for name, grad in without.grads.items():
        is_behind = name.startswith("model.fc")
        assert torch.equal(grad, with_it.grads[name]) == is_behind, name
    assert any("classifier" in name for name in with_it.grads)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_through_the_warm_up_the_body_is_bit_identical_and_has_no_momentum(optimizer, options):
    class Watching(LitToy):
        def configure_optimizers(self):
            momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer(self.parameters(), lr=0.1, weight_decay=0.1, **momentum)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            body = {name: value for name, value in weights(self).items() if "fc" not in name}
            self.bodies = [*getattr(self, "bodies", []), body]
            head = self.model.fc.head.weight.detach().clone()
            self.heads = [*getattr(self, "heads", []), head]
            names = {param: name for name, param in self.named_parameters()}
            self.remembered = {names[param] for param in self.trainer.optimizers[0].state}

        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                assert not any("model.conv" in name or "model.bn" in name for name in self.remembered)
                assert any("classifier" in name for name in self.remembered)

    module, before = Watching(), weights(LitToy())
    fit(module, [lt.GatedTransfer(**OPTIONS, warmup_epochs=1)], max_epochs=2, **options)
    for body in module.bodies[:6]:
        assert_same(body, {name: before[name] for name in body})
    assert (module.heads[5] != before["model.fc.weight"]).all()
    assert (module.bodies[-1]["model.conv.weight"] != before["model.conv.weight"]).all()
    assert (module.bodies[-1]["model.bn.running_mean"] != before["model.bn.running_mean"]).all()


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"aux_weight": 0}, ["transfer/gate_spread"], ["transfer/aux_loss"]),
        ({"ratio": None}, ["transfer/aux_loss"], ["transfer/gate_spread"]),
    ],
    ids=["gate-only", "aux-only"],
)
def test_ablations(options, present, absent):
    runner = fit(LitToy(), [lt.GatedTransfer(**{**OPTIONS, **options})])
    assert all(name in runner.callback_metrics for name in present)
    assert not any(name in runner.callback_metrics for name in absent)


def test_a_dead_gate_is_said_to_be_dead():
    class Dying(LitToy):
        def on_train_start(self):
            nn.init.constant_(self.model.fc.transfer.squeeze.weight, -1.0)  # no feature is negative

    with pytest.warns(lt.NoEffectWarning, match="are nearly equal"):
        fit(Dying(), [lt.GatedTransfer(**OPTIONS, gate_dropout=0)])


@pytest.mark.parametrize("options", [{"gate_dropout": 0}, {"dropout": 0}, {"gate_dropout": 0, "dropout": 0}])
def test_dropout_in_a_network_that_is_trained_in_eval_mode_is_warned_of(options):
    module = LitToy()
    module.model.eval()
    is_warned = len(options) < 2
    with pytest.warns(lt.NoEffectWarning, match="'model.fc' is in eval mode") if is_warned else nullcontext():
        fit(module, [lt.GatedTransfer(**OPTIONS, **options)], max_steps=1)
    assert not any(layer.training for layer in module.model.modules())


def test_a_collapse_of_the_filters_gates_is_said():
    said = "100.0% of the gates chose the tuned filter.*fine-tuning at a higher cost"
    with pytest.warns(lt.NoEffectWarning, match=said):
        fit(LitToy(), [lt.AdaFilter(gated="model.conv", gate_width=4, gate_bias=50.0)])


class ByName(LitToy):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


class Twice(LitToy):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) + F.cross_entropy(self(batch[0] + 1), batch[1])


class WithTeacher(LitToy):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0])  # a pass that does not train does not count
        return super().training_step(batch, batch_idx)


def named_loader():
    batches = [{"image": images, "label": labels} for images, labels in toys.target_loader()]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def test_labels_are_found_in_a_mapping_or_by_an_adapter_and_a_step_of_two_passes_is_refused():
    by_name, by_adapter, by_place = ByName(), ByName(), LitToy()
    options = {**OPTIONS, "gate_dropout": 0, "dropout": 0}
    fit(by_name, [lt.GatedTransfer(**options)], loader=named_loader())
    fit(by_adapter, [lt.GatedTransfer(**options, labels=lambda batch: batch["label"])], loader=named_loader())
    fit(by_place, [lt.GatedTransfer(**options)])
    assert by_name.losses == by_adapter.losses == by_place.losses
    with pytest.raises(lt.TransferConfigError, match="2 times with gradients.*aux_weight=0"):
        fit(Twice(), [lt.GatedTransfer(**OPTIONS)])
    with_teacher = WithTeacher()
    fit(with_teacher, [lt.GatedTransfer(**options)])
    one_hot = torch.utils.data.TensorDataset(torch.randn(8, 3, 6, 6), torch.eye(8)[:, :5])
    with pytest.raises(lt.TransferConfigError, match=r"Labels have shape \(4, 5\).*labels=lambda.*argmax"):
        fit(LitToy(), [lt.GatedTransfer(**OPTIONS)], loader=torch.utils.data.DataLoader(one_hot, batch_size=4))


def module_of(net):
    module = LitToy()
    module.model = net
    return module


def test_the_tap_is_found_in_pictures_that_are_not_square():
    module = module_of(timm.create_model("resnet18"))
    for size in ((64, 96), (50, 81)):
        module.example_input_array = torch.zeros(2, 3, *size)
        assert find_tap(module, "auto", "model.fc") == ("model.layer3", 256)


@pytest.mark.parametrize(
    ("name", "tap", "channels"),
    [("resnet18", "model.layer3", 256), ("efficientnet_b0", "model.blocks.4", 112), ("convnext_atto", None, 160)],
)
def test_the_tap_is_timms_last_stage_but_one(name, tap, channels):
    found = find_tap(module_of(timm.create_model(name)), "auto", "model.fc")
    assert found[1] == channels
    assert tap is None or found[0] == tap


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: toys.toy_net(),
            {"ratio": 2, "aux_weight": 0.2},
            "No stage was found.*one of 'model.conv'.*aux_weight=0",
        ),
        (
            lambda: toys.toy_net(),
            {"tap": "model.bm", "ratio": 2},
            "tap='model.bm' gives neither .*Did you mean 'model.bn'",
        ),
        (lambda: toys.toy_net(), {"tap": "model.bn", "ratio": 16}, "ratio=16 does not divide the 8 features.*ratio=8"),
        (lambda: toys.toy_net(), {"tap": "model.bn", "ratio": 2, "head": "model.bn"}, "without a Linear layer"),
        (lambda: timm.create_model("resnet18", num_classes=0), {}, "No classifier found"),
        (lambda: nets.vit(num_classes=0), {}, "ambiguous: model.blocks.0.attn.qkv.*Pass one"),
    ],
)
def test_what_is_not_right_is_refused_by_name(make, options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        fit(module_of(make()), [lt.GatedTransfer(**options)])


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0}, {"gate_dropout": 1.5}, {"dropout": -1}, {"aux_weight": "0.2"}, {"warmup_epochs": -1}],
    ids=str,
)
def test_options_are_refused_at_construction(options):
    with pytest.raises(lt.TransferConfigError, match=next(iter(options))):
        lt.GatedTransfer(**options)


def test_a_head_is_not_gated_twice_and_comes_back():
    net = toys.toy_net()
    head = net.fc
    apply_gated_transfer(net, ratio=2)
    with pytest.raises(lt.TransferConfigError, match="transfer module already. Call remove_gated_transfer"):
        apply_gated_transfer(net, ratio=2)
    twin = copy.deepcopy(net)
    twin(torch.randn(4, 3, 6, 6))
    assert copy.deepcopy(twin).fc.transfer.last.weights is None
    remove_gated_transfer(net)
    assert net.fc is head
    with pytest.raises(lt.TransferConfigError, match="no transfer module: there is nothing to remove"):
        remove_gated_transfer(net)


class Images(L.LightningModule):
    """Trains a network on a few images of 32 pixels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(4) % 3), batch_size=4)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_100"])
def test_a_linear_of_timms_is_gated_trained_and_comes_back(name):
    net = timm.create_model(name, num_classes=3).eval()
    head, images = net.classifier, torch.randn(2, 3, 32, 32)
    assert type(head) is timm.layers.Linear
    before = net(images)
    assert apply_gated_transfer(net).replaced == ("classifier",)
    nn.init.zeros_(net.classifier.transfer.expand.weight)  # so all weights are one half
    torch.testing.assert_close(net(images), (before + head.bias) / 2)
    remove_gated_transfer(net)
    assert net.classifier is head
    module = Images(net.train())
    toys.trainer([lt.GatedTransfer()], max_steps=1).fit(module)
    after = net.eval()(images)
    assert net.classifier.head is head
    assert not torch.allclose(net(images), before)
    remove_gated_transfer(module)
    assert net.classifier is head
    assert not torch.equal(net(images), after)


class Low(nn.Linear):
    """LoRA that begins as the Linear itself."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, features):
        return super().forward(features) + features @ self.down.T @ self.up.T


class Angles(nn.Linear):
    def forward(self, features):
        return 30 * F.linear(F.normalize(features), F.normalize(self.weight))


class Margins(Angles):
    def forward(self, features, labels):
        return super().forward(features) - F.one_hot(labels, self.out_features)


class Bits(nn.Parameter):
    """Weights that are kept in another form."""


class Packed(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = Bits(self.weight.detach())


class Product(nn.Linear):
    def forward(self, features):
        return features @ self.weight.T + self.bias


def spectral(*sizes):
    return nn.utils.parametrizations.spectral_norm(nn.Linear(*sizes))


@pytest.mark.parametrize("make", [Product, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_a_subclass_that_multiplies_is_gated(make):
    net = toys.toy_net()
    net.fc = make(toys.WIDTH, 3)
    net.fc.register_forward_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    random, mode = torch.get_rng_state(), net.fc.training
    apply_gated_transfer(net, ratio=2)
    assert isinstance(net.fc.head, make)
    assert net.fc.head.training == mode
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("make", "name"),
    [(Low, "Low"), (Angles, "an Angles"), (Margins, "Margins"), (Packed, "Packed"), (spectral, "ParametrizedLinear")],
)
def test_a_subclass_that_does_something_else_is_refused_by_name(make, name):
    net = toys.toy_net()
    net.fc = make(toys.WIDTH, 3)
    with pytest.raises(lt.TransferConfigError, match=f"The head 'fc' is (a )?{name}; the transfer module"):
        apply_gated_transfer(net, ratio=2)
    assert type(net.fc).__name__ in name


@pytest.mark.parametrize("ratio", [2, None])
def test_what_taking_it_out_costs_is_measured_and_is_nothing_without_a_module(ratio):
    net = toys.toy_net()
    apply_gated_transfer(net, ratio=ratio)
    images, labels = torch.randn(64, 3, 6, 6), torch.arange(64) % 5
    before = net.eval()(images)
    removal = remove_gated_transfer(net.train(), loader=[(images[:40], labels[:40]), (images[40:], labels[40:])])
    assert all(child.training for child in net.modules())
    after = net.eval()(images)
    right = [(logits.argmax(1) == labels).double().mean().item() for logits in (before, after)]
    assert [removal.accuracy_before, removal.accuracy_after] == right
    assert torch.equal(before, after) == (ratio is None)
    if ratio:
        assert (after - net.fc.bias).norm() > 1.2 * (before - net.fc.bias).norm()  # as the docstring says


def test_weights_of_one_half_that_are_taken_out_double_the_logits():
    net = toys.toy_net().eval()
    apply_gated_transfer(net, ratio=2)
    torch.nn.init.zeros_(net.fc.transfer.expand.weight)
    before = net(images := torch.randn(4, 3, 6, 6))
    remove_gated_transfer(net)
    torch.testing.assert_close(net(images) - net.fc.bias, 2 * (before - net.fc.bias))


def test_modules_alone():
    assert TransferModule(8, ratio=4)(torch.rand(2, 8)).shape == (2, 8)
    aux, features = AuxiliaryClassifier(4, 3).double(), torch.rand(2, 4, 5, 5, dtype=torch.float64)
    expected = features.mean((2, 3)) @ aux.linear.weight.T + aux.linear.bias
    torch.testing.assert_close(aux(features), expected)
    torch.testing.assert_close(aux(features.flatten(2).mT), expected)  # the same as tokens


def test_beside_a_source_task_the_source_head_takes_the_features_as_they_are():
    """In either order of the callbacks, and no image of the source reaches the auxiliary classifier."""
    options = {**OPTIONS, "gate_dropout": 0, "dropout": 0}
    for forward in ("separate", "joint"):
        runs = []
        for order in (1, -1):
            source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, forward=forward)
            callbacks = [lt.SoftFinetuning(source, weight=lt.Schedule()), lt.GatedTransfer(**options)][::order]
            module = LitToy()
            fit(module, callbacks)
            runs.append(weights(module))
        assert_same(runs[1], runs[0], tolerance=1e-5)


class Mixed(LitToy):
    """Runs more images than the batch has labels."""

    def training_step(self, batch, batch_idx):
        logits = self(torch.cat([batch[0], batch[0].flip(3)]))
        return F.cross_entropy(logits, batch[1].repeat(2))


def test_images_without_labels_of_their_own_are_refused():
    with pytest.raises(lt.TransferConfigError, match="ran 8 images, but the batch has 4 labels.*labels=lambda"):
        fit(Mixed(), [lt.GatedTransfer(**OPTIONS)])
    fit(Mixed(), [lt.GatedTransfer(**OPTIONS, labels=lambda batch: batch[1].repeat(2))])


def test_a_joint_pass_gives_the_auxiliary_classifier_the_targets_rows():
    """The first step's auxiliary loss, by hand, from the target's rows of what runs through the network."""
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, forward="joint")
    callback, module = lt.GatedTransfer(**OPTIONS), LitToy()
    taps = []

    class Looking(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.bn.register_forward_hook(lambda layer, args, output: taps.append(output.detach()))
            state = callback.part.classifier.linear
            self.weight, self.bias = state.weight.detach().clone(), state.bias.detach().clone()

    look = Looking()
    runner = fit(module, [lt.SoftFinetuning(source, weight=lt.Schedule()), callback, look], max_steps=1, max_epochs=1)
    assert len(taps[0]) == 8
    labels = next(iter(toys.target_loader()))[1]
    expected = F.cross_entropy(taps[0][:4].mean((2, 3)) @ look.weight.T + look.bias, labels)
    assert runner.callback_metrics["transfer/aux_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_body_rests_under_activation_checkpointing_too(reentrant):
    class Checkpointed(LitToy):
        def forward(self, pixels):
            images = pixels.requires_grad_() if torch.is_grad_enabled() else pixels
            return self.model.fc(checkpoint(self.model.features, images, use_reentrant=reentrant))

    module, before = Checkpointed(), weights(LitToy())
    fit(module, [lt.GatedTransfer(ratio=2, aux_weight=0, warmup_epochs=2)], max_epochs=3, limit_train_batches=1)
    moved = {name for name, value in weights(module).items() if name in before and (value != before[name]).any()}
    assert "model.conv.weight" in moved
    assert (
        weights(module)["model.bn.num_batches_tracked"] == before["model.bn.num_batches_tracked"] + 2
    )  # one step, twice


def test_a_norm_of_the_users_that_rests_is_not_woken_by_the_warm_up():
    class Resting(LitToy):
        def on_train_start(self):
            self.model.bn.eval()

    module, before = Resting(), weights(LitToy())
    fit(module, [lt.GatedTransfer(**OPTIONS, warmup_epochs=1)], max_epochs=2)
    assert torch.equal(module.model.bn.running_mean, before["model.bn.running_mean"])


def test_another_methods_head_learns_in_the_warm_up():
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    soft = lt.SoftFinetuning(source, weight=lt.Schedule(1.0, 1.0))
    fit(LitToy(), [soft, lt.GatedTransfer(**OPTIONS, warmup_epochs=1)], max_epochs=2, max_steps=3)
    assert (soft.part.head.weight != toys.source_head().weight).any()

    class ByHand(lt.SourceTaskMixin, lt.GatedTransferMixin, LitToy):
        def __init__(self):
            super().__init__()
            self.add_gated_transfer(**OPTIONS, warmup_epochs=1)
            self.add_source_task(source, weight=lt.Schedule(1.0, 1.0))

        def training_step(self, batch, batch_idx):
            return self.joint_loss(self.gated_loss(super().training_step(batch, batch_idx)))

    for module in (first := ByHand(), copy.deepcopy(first)):
        fit(module, max_epochs=2, max_steps=3)
        assert (module.source_task.head.weight != toys.source_head().weight).any()
        assert torch.equal(module.model.conv.weight, LitToy().model.conv.weight)


@pytest.mark.parametrize("options", [{"dropout": 2}, {"dropout": 1.0}, {"gate_dropout": -1}, {"ratio": 0}])
def test_callback_and_function_refuse_the_same_options(options):
    (name,) = options
    for make in (lt.GatedTransfer, lambda **given: lt.functional.apply_gated_transfer(LitToy(), **given)):
        with pytest.raises(lt.TransferConfigError, match=f"^{name}="):
            make(**options)


@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_a_source_loss_that_comes_before_the_gated_one_is_refused_with_the_order(forward):
    class Wrong(lt.SourceTaskMixin, lt.GatedTransferMixin, LitToy):
        def __init__(self, weight, **options):
            super().__init__()
            self.add_gated_transfer(**{**OPTIONS, **options})
            source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, forward=forward)
            self.add_source_task(source, weight=weight)

        def training_step(self, batch, batch_idx):
            return self.gated_loss(self.joint_loss(super().training_step(batch, batch_idx)))

    order = r"joint_loss was called before gated_loss.* self\.joint_loss\(self\.gated_loss\(loss\)\)"
    with pytest.raises(lt.TransferConfigError, match=order):
        fit(Wrong(weight=1.0))
    fit(Wrong(weight=0.0), max_steps=2)  # without source images, or an auxiliary classifier, the order does not matter
    fit(Wrong(weight=1.0, aux_weight=0), max_steps=2)


def test_what_is_new_learns_as_fast_as_the_head():
    class Grouped(LitToy):
        def configure_optimizers(self):
            conv, fc = (
                self.model.conv.parameters(),
                [p for n, p in self.named_parameters() if n.startswith("model.fc.w")],
            )
            return torch.optim.SGD([{"params": conv}, {"params": fc, "lr": 0.3}], lr=0.1)

        def on_train_start(self):
            groups = self.optimizers().optimizer.param_groups
            self.rates = {id(param): group["lr"] for group in groups for param in group["params"]}

    module, callback = Grouped(), lt.GatedTransfer(**OPTIONS)
    fit(module, [callback])
    new = [*module.model.fc.transfer.parameters(), *callback.part.classifier.parameters()]
    assert [module.rates[id(param)] for param in new] == [0.3] * 4


def test_options_that_never_train_the_body_or_the_classifier_are_refused():
    with pytest.raises(lt.TransferConfigError, match="warmup_epochs=2, but training has 2 epochs"):
        fit(LitToy(), [lt.GatedTransfer(**OPTIONS, warmup_epochs=2)], max_epochs=2)

    class Forgetful(lt.GatedTransferMixin, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.add_gated_transfer(**OPTIONS)

    with pytest.raises(lt.TransferConfigError, match=r"never called self\.gated_loss"):
        fit(Forgetful())

    class Doubled(Forgetful):
        def training_step(self, batch, batch_idx):
            return self.gated_loss(self.gated_loss(super().training_step(batch, batch_idx)))

    with pytest.raises(lt.TransferConfigError, match="twice in a step"):
        fit(Doubled())
    with pytest.raises(lt.TransferConfigError, match="has GatedTransferMixin already. Leave one out"):
        fit(Forgetful(), [lt.GatedTransfer(**OPTIONS)])


def test_a_failed_start_leaves_the_module_as_it_was():
    module = LitToy()
    kinds = [type(layer) for layer in module.modules()]
    with pytest.raises(lt.TransferConfigError, match="gives neither"):
        fit(module, [lt.GatedTransfer(ratio=2, tap="layer3")])
    assert [type(layer) for layer in module.modules()] == kinds
    assert "on_load_checkpoint" not in vars(module)


def test_a_test_of_a_plain_module_leaves_it_plain():
    module = LitToy()
    images = torch.randn(4, 3, 6, 6)
    before = module.eval()(images)
    runner = toys.trainer([lt.AdaFilter(gated="model.conv"), lt.GatedTransfer(**OPTIONS)])
    runner.test(module, toys.target_loader(), verbose=False)
    assert torch.equal(module.eval()(images), before)
    assert list(module.state_dict()) == list(LitToy().state_dict())


def test_a_head_answers_for_the_linear_inside_of_it():
    net = toys.toy_net()
    weight = net.fc.weight
    apply_gated_transfer(net, ratio=2)
    assert net.fc.weight is weight
    assert net.fc.out_features == toys.TARGET_CLASSES
    with pytest.raises(AttributeError):
        net.fc.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "tap", "channels"),
    [
        ("resnet18", "layer3", 256),
        ("densenet121", "features.denseblock3", 1024),
        ("mobilenet_v3_small", "features.8", 48),
        ("regnet_y_400mf", "trunk_output.block3", 208),
    ],
)
def test_without_timms_list_the_last_part_with_larger_pictures_is_tapped(name, tap, channels):
    network = torchvision.models.get_model(name)
    assert find_tap(module_of(network), "auto", "model.fc") == (f"model.{tap}", channels)
    if name == "resnet18":
        children = nn.Sequential(*list(network.children())[:-1])
        assert find_tap(module_of(children), "auto", "fc") == ("model.6", channels)
        assert find_tap(nn.ModuleDict({"a": timm.create_model("resnet10t")})["a"], "auto", "fc") == ("layer3", 256)


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=2), ["model.blocks.0", "model.blocks.1"]),
        (
            lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3),
            [f"model.encoder.layers.encoder_layer_{place}" for place in (0, 1)],
        ),
    ],
)
def test_of_a_transformer_the_blocks_are_proposed_and_taken(make, blocks):
    module = module_of(make())
    if not hasattr(module.model, "patch_embed"):
        module.example_input_array = torch.zeros(2, 3, 32, 32)
    head = "model.head" if hasattr(module.model, "patch_embed") else "model.heads.head"
    for tap, words in (("auto", "Name .* one of {}. Or"), ("model.blocks.9", "gives neither .* Known: {}.$")):
        with pytest.raises(lt.TransferConfigError, match=words.format(", ".join(map(repr, blocks)))):
            find_tap(module, tap, head)
    assert find_tap(module, blocks[0], head) == (blocks[0], {"head": 192, "heads.head": 16}[head[6:]])


def test_attention_in_windows_gives_no_tokens_of_images():
    network = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, num_heads=(1,) * 4, depths=(2, 1, 1, 1))
    with pytest.raises(lt.TransferConfigError, match="gives neither"):
        find_tap(module_of(network), "model.layers.0.blocks.0.attn", "model.head.fc")


def test_stages_with_channels_last_are_not_tapped_by_mistake():
    with pytest.raises(lt.TransferConfigError, match="No stage was found"):
        find_tap(module_of(timm.create_model("swin_tiny_patch4_window7_224")), "auto", "model.head.fc")


def test_two_networks_in_a_module():
    module = LitToy()
    module.teacher, module.model = timm.create_model("resnet10t"), timm.create_model("resnet10t")
    assert find_tap(module, "auto", "model.fc") == ("model.layer3", 256)
    assert find_tap(module, "teacher.layer2", "model.fc") == ("teacher.layer2", 128)


def test_the_mixin_says_what_is_missing():
    class Forgetful(lt.GatedTransferMixin, toys.ToySteps, L.LightningModule):
        pass

    with pytest.raises(lt.TransferConfigError, match=r"call self\.add_gated_transfer\(\)"):
        fit(Forgetful())


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, 0.0),
        ({"aux_weight": 0.3}, 0.3),
        ({"tap": "model.bn"}, 0.2),
        ({"labels": lambda batch: batch[1]}, 0.2),
        ({"ratio": None}, 0.2),
        ({"ratio": None, "aux_weight": 0}, 0),
        ({"tap": "model.bn", "aux_weight": 0}, 0),
    ],
)
def test_the_auxiliary_classifier_is_asked_for(options, weight):
    options = {"ratio": 2, **options}
    callback, module = lt.GatedTransfer(**options), LitToy()
    assert callback.aux_weight == weight
    network = timm.create_model("resnet10t", num_classes=3)  # has stages of its own
    if options.get("tap", "auto") == "auto":
        module.model = network
        callback.change_layers(None, module)
        assert (callback.make_part(module).classifier is None) == (not weight)


def test_the_mixin_asks_as_the_callback_does():
    class ByHand(lt.GatedTransferMixin, LitToy):
        def __init__(self, **options):
            super().__init__()
            self.add_gated_transfer(ratio=2, **options)

    assert ByHand()._term.classifier is None
    assert ByHand(tap="model.bn")._term.classifier is not None
