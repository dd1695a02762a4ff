"""What is special to the methods of examples/your_own_method; the promises of all methods run over their rows."""

import copy

import lightning.pytorch as L
import pytest
import torch

import lightning_transfer as lt
from examples.your_own_method import delta
from examples.your_own_method.delta import DELTA
from examples.your_own_method.l2_sp import L2SP
from tests import toys
from tests.methods import one
from tests.toys import LitToy, SaveEveryStep, StatefulLoader, assert_same, fit, weights


def test_weights_that_are_held_fast_stay_near_their_start():
    moved = {}
    for weight in (0, 1.0):
        fit(module := LitToy(), [L2SP(weight=weight)])
        moved[weight] = (module.model.conv.weight - toys.toy_net().conv.weight).norm()
    assert moved[1.0] < 0.8 * moved[0]


@pytest.mark.parametrize("is_first", [True, False])
def test_beside_dropout_and_an_auxiliary_classifier_a_resumed_run_is_the_run_that_was_not_stopped(is_first, tmp_path):
    """As every resume with dropout it needs the random state of the step, which Lightning does not keep."""

    class Seeded(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.manual_seed(trainer.global_step)

    def run(module, *others, **options):
        two = [L2SP(), lt.GatedTransfer(tap="model.bn", ratio=2, warmup_epochs=1)]
        fit(module, [Seeded(), *two[:: 1 if is_first else -1], *others], loader=StatefulLoader(), **options)
        return module

    whole = run(LitToy(), SaveEveryStep(tmp_path))
    for cut in (1, 6, 8):
        other = LitToy()
        torch.nn.init.ones_(other.model.conv.weight)  # a resumed run may begin with other weights
        rest = run(other, ckpt_path=tmp_path / f"step={cut}.ckpt")
        assert_same(weights(rest), weights(whole))
        assert rest.losses == whole.losses[cut:]


def test_the_images_that_a_joint_pass_appends_are_not_compared(monkeypatch):
    seen, distance = [], delta.feature_distance
    monkeypatch.setattr(
        delta, "feature_distance", lambda *maps: seen.append([len(it) for (it,) in maps]) or distance(*maps)
    )
    fit(LitToy(), [one(is_joint=True).callback(), DELTA(["model.bn"], weight=0.01)])
    assert seen == [[4, 4]] * 12


def test_the_pretrained_network_is_run_in_eval_mode_and_stays_as_it_was():
    class Training(LitToy):
        def on_train_batch_start(self, batch, batch_idx):
            self.train()

    start, callback = toys.toy_net().state_dict(), DELTA(["model.bn"], weight=0.01)
    fit(Training(), [callback])
    assert_same(weights(callback.part.pretrained), start)
    assert not callback.part.pretrained.bn.training


class Replaced(LitToy):
    def configure_optimizers(self):
        self.model = toys.toy_net()
        return super().configure_optimizers()


class Twice(LitToy):
    def training_step(self, batch, batch_idx):
        self(batch[0])
        return super().training_step(batch, batch_idx)


class Apart(LitToy):
    def __init__(self):
        super().__init__()
        self.other = copy.deepcopy(self.model)


@pytest.mark.parametrize(
    ("make", "module", "says"),
    [
        (L2SP, Replaced, "network was replaced after L2SP"),
        (lambda: L2SP(weight=-1), LitToy, "weight=-1; it takes"),
        (lambda: DELTA(["model.bn"]), Twice, "did not run each of .*'model.bn'.* once with gradients"),
        (lambda: DELTA(["bn"]), LitToy, "'bn'.* not in the module. Did you mean 'model.bn'"),
        (lambda: DELTA(["model.bn", "other.bn"]), Apart, "several networks. Pass those of 'model'"),
        (lambda: DELTA("model.bn"), LitToy, "it takes a list of names"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(make, module, says):
    with pytest.raises(lt.TransferConfigError, match=says):
        fit(module(), [make()])


def test_weights_that_no_optimizer_trains_have_no_effect_by_name():
    class OnlyHead(LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.fc.parameters(), lr=0.1)

    with pytest.warns(lt.NoEffectWarning, match="No weight that L2SP holds is trained"):
        fit(OnlyHead(), [L2SP()])
