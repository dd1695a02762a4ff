"""Gates in optimizers that know nothing of them, and in a parameter group of the user's own."""

import copy

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, SaveEveryStep, StatefulLoader, assert_same, fit, weights

RATE, GATE_RATE = 0.1, 0.02


def callback():
    return lt.AdaFilter(gated="model.conv", gate_width=4)


class OwnGroup(lt.AdaFilterMixin, LitToy):
    """A group for the gates, under a scheduler that takes a list."""

    def __init__(self):
        super().__init__()
        self.add_adafilter(gated="model.conv", gate_width=4, gate_bias=0.0)

    def configure_optimizers(self):
        rest = [param for name, param in self.named_parameters() if "adafilter." not in name]
        groups = [{"params": rest}, {"params": self.filter_gates.parameters(), "lr": GATE_RATE}]
        optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, GATE_RATE], total_steps=12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        groups = self.optimizers().optimizer.param_groups
        self.rates = [*getattr(self, "rates", []), [(len(group["params"]), group["lr"]) for group in groups]]


def test_gates_in_a_group_of_the_users_own_learn_at_its_rate_and_resume(tmp_path):
    module, again = OwnGroup(), OwnGroup()
    fit(module, [SaveEveryStep(tmp_path)], loader=StatefulLoader())
    assert len(module.rates) == 12
    assert all(gate == (7, pytest.approx(rest[1] * GATE_RATE / RATE)) for rest, gate in module.rates)
    fit(again, loader=StatefulLoader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert_same(weights(again), weights(module))
    assert again.rates == module.rates[5:]


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
def test_the_gate_is_in_a_group_with_others_of_any_optimizer(make):
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

    fit(Looking(), [callback()])
    assert found == {RATE: 7}


def test_several_optimizers_in_manual_optimization_by_the_mixin():
    class Manual(lt.AdaFilterMixin, toys.ToySteps, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.add_adafilter(gated="model.conv", gate_width=4)

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
            self.add_adafilter(gated="model.conv", gate_width=4)

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
        fit(HeadOnly(), [lt.AdaFilter(gated="model.conv", gate_width=4)])


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
    fit(module, [callback(), L.callbacks.BackboneFinetuning(1, verbose=False)], max_epochs=3)
    start = toys.toy_net()
    assert torch.equal(module.model.conv.frozen.weight, start.conv.weight)
    assert (module.model.conv.tuned.weight != start.conv.weight).any()


def test_options_are_refused_at_construction():
    for options, message in (
        ({"estimator": "gumbell"}, "Did you mean 'gumbel'"),
        ({"gate_width": 2.5}, "gate_width=2.5"),
        ({"temperature": "hot"}, "temperature='hot'"),
    ):
        with pytest.raises(lt.TransferConfigError, match=message):
            lt.AdaFilter(**options)
    assert "gated='model.conv'" in repr(copy.deepcopy(callback()))


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
    fit(gated, [lt.AdaFilter(gated="model.conv", estimator="all_tuned")])
    fit(both, [callback(), lt.GatedTransfer(tap="model.bn", ratio=2)])
    assert gated.losses == plain.losses
    assert gated.names == plain.names
    assert set(both.names[0]) >= set(plain.names[0])
    assert set(both.names[1]) >= {name.removeprefix("model.") for name in plain.names[0]}
    assert "conv.tuned.weight" in dict(both.model.named_parameters()), "only while optimizers are made"


def test_after_a_fit_nothing_of_the_last_pass_is_held():
    module = LitToy()
    fit(module, [callback()])
    assert module.model.adafilter.last_gates() == {}
