"""With a method on, training goes down, does what plain training does not, and says so in the log."""

import pytest
import torch
from lightning.pytorch.loggers import Logger

from tests import toys
from tests.methods import UNTIL, each
from tests.toys import LitToy, fit, weights


@each()
def test_trains_and_differs_from_plain_training(method):
    plain, module = LitToy(), LitToy()
    fit(plain)
    fit(module, [method.callback()])
    assert module.losses[-1] < module.losses[0]
    method.plain(module)
    assert any((weights(module)[name] != value).any() for name, value in weights(plain).items())


class Noting(Logger):
    """A logger that keeps what it gets."""

    name, version = "noting", 0

    def __init__(self):
        super().__init__()
        self.noted = []

    def log_metrics(self, metrics, step):
        self.noted += [(step, name, value) for name, value in metrics.items() if "transfer" in name]

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
@each(has_source=True)
def test_logs_at_the_trainers_own_interval(method, accumulate):
    logger, module = Noting(), LitToy()
    options = {"log_every_n_steps": 3, "accumulate_grad_batches": accumulate, "max_epochs": 2 * accumulate}
    runner = fit(module, [method.callback()], logger=logger, **options)
    found = {(step, name): value for step, name, value in logger.noted}
    assert len(found) == len(logger.noted), "something was logged twice for a step"
    assert sorted({step for step, _ in found}) == [2, 5, 8, 11]
    for step in (2, 5, 8, 11):
        assert found[step, "transfer/target_loss"] == pytest.approx(module.losses[accumulate * (step + 1) - 1])
        assert found[step, "transfer/source_weight"] == pytest.approx(max(0, 1 - step / UNTIL))
        assert ((step, "transfer/source_loss") in found) == (step < UNTIL)
    assert {"transfer/source_loss", "transfer/source_weight", "transfer/target_loss"} <= set(runner.callback_metrics)


@each(has_source=True)
def test_a_new_source_head_reaches_an_optimizer_of_chosen_parameters(method):
    class Chosen(LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": self.model.parameters()}], lr=0.1)

    callback = method.callback()
    fit(Chosen(), [callback])
    assert (callback.part.head.weight != toys.source_head().weight).any()
