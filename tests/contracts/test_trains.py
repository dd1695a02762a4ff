"""With a method on, training goes down, does what plain training does not, and says so in the log."""

import pytest

from tests import toys
from tests.methods import METHODS
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
    class Logged(LitToy):
        seen: dict = {}  # noqa: RUF012

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx % 2 == 1:
                self.seen[self.trainer.global_step] = set(self.trainer.logged_metrics)

    module = Logged()
    runner = fit(module, [method.callback()], log_every_n_steps=2, max_epochs=1)
    assert {"transfer/source_loss", "transfer/source_weight", "transfer/target_loss"} <= set(runner.callback_metrics)
    assert runner.callback_metrics["transfer/target_loss"].item() == pytest.approx(module.losses[-1])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_new_source_head_reaches_an_optimizer_of_chosen_parameters(method):
    class Chosen(LitToy):
        def configure_optimizers(self):
            import torch

            return torch.optim.SGD([{"params": self.model.parameters()}], lr=0.1)

    callback = method.callback()
    fit(Chosen(), [callback])
    assert (callback.part.head.weight != toys.source_head().weight).any()
