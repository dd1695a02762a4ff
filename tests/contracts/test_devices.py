"""What decides on which device something is made and computed, as far as a machine without a GPU shows it."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import lightning_transfer as lt
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.pictures import Picture
from lightning_transfer.source.term import SourceTerm
from lightning_transfer.surgery import own_randomness
from tests import toys
from tests.methods import each, toy_bank
from tests.toys import LitToy, assert_same, fit, weights


class Late(LitToy):
    """A network built in `configure_model`, which Lightning calls with the run's device as the default."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            with torch.device("cpu"):
                self.model = toys.toy_net()


@each()
def test_another_default_device_changes_nothing_in_a_late_network(method, monkeypatch):
    plain, module = LitToy(), Late()
    fit(plain, [method.callback()], max_epochs=1)
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda self: torch.device("meta"))
    fit(module, [method.callback()], max_epochs=1)
    assert_same(weights(module), weights(plain))


def test_new_weights_do_not_depend_on_the_default_device():
    def made():
        with own_randomness():
            return nn.Linear(2, 3)

    expected = made()
    with torch.device("meta"):
        assert_same(weights(made()), weights(expected))
        assert torch.zeros(1).is_meta


def test_an_example_runs_where_the_network_is():
    class Parts(nn.Module):
        """Without a forward, and without a name that says which Linear is the head."""

        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(2, 4, device="meta"), nn.Linear(4, 3, device="meta")

    data = torch.utils.data.TensorDataset(torch.rand(6, 2), torch.arange(6) % 3)
    source = lt.SourceTask(data, num_classes=3, forward=lambda module, images: module.out(module.body(images)))
    term = SourceTerm(source, Parts(), weight=lt.Schedule(1.0, 1.0), mix="add")
    assert term.head_path == "out"


@pytest.mark.parametrize("is_on", [True, False])
def test_filters_run_with_cudnn_unless_the_user_turned_it_off(is_on):
    bank, found = toy_bank(), []
    bank.register_forward_pre_hook(lambda *_: found.append(torch.backends.cudnn.enabled))
    with torch.backends.cudnn.flags(enabled=is_on):
        Describer(bank, torch.device("cpu")).response_counts([([0], [Picture(torch.rand(3, 6, 6), 0)])])
    assert found == [is_on]
