"""The gate's own learning rate under every scheduler, and gates beside optimizers that know nothing of them."""

import copy

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler as schedulers

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, SaveEveryStep, StatefulLoader, assert_same, fit, weights

RATE, GATE_RATE = 0.1, 0.02
PROPORTIONAL = [  # to each group's own rate
    lambda optimizer: schedulers.StepLR(optimizer, 3),
    lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 5]),
    lambda optimizer: schedulers.ConstantLR(optimizer, 0.5, 4),
    lambda optimizer: schedulers.LinearLR(optimizer, 0.1, total_iters=5),
    lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9),
    lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 12),
    lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 4),
    lambda optimizer: schedulers.PolynomialLR(optimizer, 12),
    lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda step: 0.9),
    lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer, 0.1), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
    lambda optimizer: schedulers.OneCycleLR(optimizer, [RATE, GATE_RATE], total_steps=12),
]


def scheduled(make_scheduler, make_optimizer=None):
    class Scheduled(LitToy):
        def configure_optimizers(self):
            default = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)
            optimizer = default if make_optimizer is None else make_optimizer(self)
            return [optimizer], [{"scheduler": make_scheduler(optimizer), "interval": "step"}]

        def on_train_batch_start(self, batch, batch_idx):
            groups = self.trainer.optimizers[0].param_groups
            self.rates = [*getattr(self, "rates", []), [group["lr"] for group in groups]]

    return Scheduled()


def callback(rate=GATE_RATE):
    return lt.AdaFilter(gated="conv", gate_width=4, gate_lr=rate)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # the oldest torch's SequentialLR
@pytest.mark.parametrize("make", PROPORTIONAL, ids=range(len(PROPORTIONAL)))
def test_schedulers_move_the_gates_rate_as_the_others_and_resume(make, tmp_path):
    module = scheduled(make)
    fit(module, [callback(), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    assert len(module.rates) == 12
    assert all(gate == pytest.approx(rest * GATE_RATE / RATE) for rest, gate in module.rates)
    again = scheduled(make)
    fit(again, [callback()], loader=StatefulLoader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert_same(weights(again), weights(module))
    assert again.rates == module.rates[5:]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: schedulers.OneCycleLR(optimizer, 0.3, total_steps=12),
        lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.3),
    ],
)
def test_schedulers_that_set_one_rate_for_all_are_refused(make):
    with pytest.raises(lt.TransferConfigError, match=r"gate_lr=0\.02 is not the gate's learning rate"):
        fit(scheduled(make), [callback()])


def test_a_list_of_lambdas_for_the_users_groups_fails_loudly():
    with pytest.raises(ValueError, match="Expected 2 lr_lambdas"):
        fit(scheduled(lambda optimizer: schedulers.LambdaLR(optimizer, [lambda step: 1.0])), [callback()])


@pytest.mark.parametrize(
    "make",
    [
        lambda module: torch.optim.SGD(module.model.parameters(), lr=RATE),
        lambda module: torch.optim.AdamW(
            [{"params": module.model.conv.parameters()}, {"params": module.model.fc.parameters(), "lr": 0.3}], lr=RATE
        ),
        lambda module: torch.optim.SGD(list(module.named_parameters()), lr=RATE),
        lambda module: torch.optim.SGD(module.model.fc.parameters(), lr=RATE),
    ],
    ids=["generator", "groups", "named", "head-only"],
)
@pytest.mark.filterwarnings("ignore:No gated filter is trained")
@pytest.mark.parametrize("rate", [None, GATE_RATE])
def test_the_gate_is_in_one_group_of_any_optimizer(make, rate):
    found = {}

    class Looking(LitToy):
        def configure_optimizers(self):
            return make(self)

        def on_train_start(self):
            gate = {id(param) for param in self.model.adafilter.parameters()}
            for group in self.optimizers().optimizer.param_groups:
                inside = [param for param in group["params"] if id(param) in gate]
                if inside:
                    found[group["lr"]] = found.get(group["lr"], 0) + len(inside)

    fit(Looking(), [callback(rate)])
    assert found == {rate or RATE: 7}


def test_several_optimizers_in_manual_optimization_by_the_mixin():
    class Manual(lt.AdaFilterMixin, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.add_adafilter(gated="conv", gate_width=4)

        def training_step(self, batch, batch_idx):
            body, head = self.optimizers()
            body.zero_grad()
            head.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            body.step()
            head.step()

        def configure_optimizers(self):
            rest = [param for name, param in self.named_parameters() if "fc" not in name]
            return torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(self.model.fc.parameters(), lr=0.1)

    module = Manual()
    before = weights(module)
    runner = fit(module)
    assert (
        weights(module)["model.adafilter.gate.outputs.0.bias"] != before["model.adafilter.gate.outputs.0.bias"]
    ).any()
    assert "transfer/tuned" in runner.callback_metrics


def test_a_mixins_gate_that_no_optimizer_holds_is_named():
    class Forgetful(lt.AdaFilterMixin, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.add_adafilter(gated="conv", gate_width=4)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.conv.parameters(), lr=0.1)

    with pytest.raises(
        lt.TransferConfigError, match=r"No optimizer holds model\.adafilter\..*\*self\.model\.adafilter"
    ):
        fit(Forgetful())


def test_only_the_head_trained_is_said_to_have_no_effect():
    class HeadOnly(LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.fc.parameters(), lr=0.1)

    with pytest.warns(lt.NoEffectWarning, match="No gated filter is trained"):
        fit(HeadOnly(), [lt.AdaFilter(gated="conv", gate_width=4)])


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # of the BatchNorm, as without us
def test_beside_lightnings_backbone_finetuning():
    """It freezes and thaws what it calls the backbone; the frozen copies are none of its parameters."""

    class Backboned(LitToy):
        @property
        def backbone(self):
            return torch.nn.ModuleList([self.model.conv, self.model.bn])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Backboned()
    fit(module, [callback(None), L.callbacks.BackboneFinetuning(1, verbose=False)], max_epochs=3)
    start = toys.toy_net()
    assert torch.equal(module.model.conv.frozen.weight, start.conv.weight)
    assert (module.model.conv.tuned.weight != start.conv.weight).any()


def test_options_are_refused_at_construction():
    for options, message in (
        ({"estimator": "gumbell"}, "Did you mean 'gumbel'"),
        ({"gate_width": 2.5}, "gate_width=2.5"),
        ({"gate_lr": -1.0}, "gate_lr=-1.0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"estimator": "all_tuned", "gate_lr": 0.1}, "has no gate that learns"),
    ):
        with pytest.raises(lt.TransferConfigError, match=message):
            lt.AdaFilter(**options)
    assert "gated='conv'" in repr(copy.deepcopy(callback()))


class ByName(LitToy):
    """Sorts parameters by their names, as many projects do."""

    def configure_optimizers(self):
        bare = [
            param for name, param in self.named_parameters() if name.startswith("model.bn") or name.endswith("bias")
        ]
        inner = [name for name, _ in self.model.named_parameters()]
        self.names = [name for name, _ in self.named_parameters()], inner
        head = [param for name, param in self.named_parameters() if name == "model.fc.weight"]
        chosen = {id(param) for param in [*bare, *head]}
        rest = [param for param in self.parameters() if id(param) not in chosen]
        groups = [{"params": rest}, {"params": bare, "weight_decay": 0.0}, {"params": head, "lr": 0.3}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


def test_who_sorts_parameters_by_name_finds_the_names_there_were():
    plain, gated, both = ByName(), ByName(), ByName()
    fit(plain)
    fit(gated, [lt.AdaFilter(gated="conv", estimator="all_tuned")])
    fit(both, [callback(None), lt.GatedTransfer(tap="model.bn", ratio=2)])
    assert gated.losses == plain.losses
    assert gated.names == plain.names
    assert set(both.names[0]) >= set(plain.names[0])
    assert set(both.names[1]) >= {name.removeprefix("model.") for name in plain.names[0]}
    assert "conv.tuned.weight" in dict(both.model.named_parameters()), "only while optimizers are made"


def test_an_optimizer_that_was_made_elsewhere_is_refused_with_a_rate_of_the_gates_own():
    class Early(LitToy):
        def __init__(self):
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.made

    with pytest.raises(lt.TransferConfigError, match="an optimizer that was made elsewhere"):
        fit(Early(), [callback()])


def test_a_rate_that_is_overwritten_before_training_is_refused():
    class Overwriting(LitToy):
        """As a learning-rate finder does."""

        def on_fit_start(self):
            for group in self.optimizers().optimizer.param_groups:
                group["lr"] = 0.003

    with pytest.raises(lt.TransferConfigError, match=r"a learning-rate finder has set 0\.003"):
        fit(Overwriting(), [callback()])


def test_after_a_fit_nothing_of_the_last_pass_is_held():
    module = LitToy()
    fit(module, [callback(None)])
    assert module.model.adafilter.last_gates() == {}


def test_a_rate_that_was_lowered_in_training_resumes(tmp_path):
    class Lowering(LitToy):
        """As ReduceLROnPlateau does, which keeps no first rate."""

        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                for group in self.optimizers().optimizer.param_groups:
                    group["lr"] /= 10

    whole, rest = Lowering(), Lowering()
    fit(whole, [callback(), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    fit(rest, [callback()], loader=StatefulLoader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(weights(rest), weights(whole))
