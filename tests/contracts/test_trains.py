"""With a method on, training goes down, does what plain training does not, and says so in the log."""

import pytest
import torch

from tests import toys
from tests.methods import METHODS, UNTIL
from tests.toys import LitToy, fit, weights


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trains_and_differs_from_plain_training(method):
    plain, module = LitToy(), LitToy()
    fit(plain)
    fit(module, [method.callback()])
    assert module.losses[-1] < module.losses[0]
    assert any((weights(module)[name] != value).any() for name, value in weights(plain).items())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_logs_at_the_trainers_own_interval(method):
    class Noting(LitToy):
        def __init__(self):
            super().__init__()
            self.logged = []

        def log(self, name, value, **options):
            self.logged.append((self.trainer.global_step, name, float(value)))
            super().log(name, value, **options)

    module = Noting()
    fit(module, [method.callback()], log_every_n_steps=3)
    found = {(step, name): value for step, name, value in module.logged}
    assert sorted({step for step, _ in found}) == [2, 5, 8, 11]
    for step in (2, 5, 8, 11):
        assert found[step, "transfer/target_loss"] == module.losses[step]
        assert found[step, "transfer/source_weight"] == pytest.approx(max(0, 1 - step / UNTIL))
        assert ((step, "transfer/source_loss") in found) == (step < UNTIL)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_new_source_head_reaches_an_optimizer_of_chosen_parameters(method):
    class Chosen(LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": self.model.parameters()}], lr=0.1)

    callback = method.callback()
    fit(Chosen(), [callback])
    assert (callback.part.head.weight != toys.source_head().weight).any()
