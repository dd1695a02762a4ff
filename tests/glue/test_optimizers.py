"""Whatever optimizer the user made, new parameters end up in it and old ones stay where they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.optimizers import join, why_untrained


def net_and_part():
    return nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}), nn.Linear(3, 3)


def test_named_parameters_keep_their_names():
    net, part = net_and_part()
    optimizer = torch.optim.SGD(net["body"].named_parameters(), lr=0.1)
    for _ in range(2):
        join(optimizer, "part", part, neighbors=())
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == [
            "weight",
            "bias",
            "part.weight",
            "part.bias",
        ]
        assert len(optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize(("beside", "group"), [(None, 0), ("head", 1)])
@pytest.mark.parametrize(
    "shape",
    [
        lambda optimizer: optimizer,
        lambda optimizer: [optimizer],
        lambda optimizer: ([optimizer], [object()]),
        lambda optimizer: {"optimizer": optimizer, "lr_scheduler": object()},
        lambda optimizer: ({"optimizer": optimizer},),
    ],
)
def test_in_every_form_that_configure_optimizers_may_return(shape, beside, group):
    net, part = net_and_part()
    groups = [{"params": net["body"].parameters(), "lr": 1e-6}, {"params": net["head"].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    join(shape(optimizer), "part", part, neighbors=net[beside].parameters() if beside else ())
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        2 + 2 * (number == group) for number in (0, 1)
    ]


def test_a_head_that_nobody_trains_has_no_group():
    net, part = net_and_part()
    optimizer = torch.optim.SGD(net["body"].parameters(), lr=0.1)
    join(optimizer, "part", part, neighbors=net["head"].parameters())
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_nothing_returned_is_refused():
    with pytest.raises(TransferConfigError, match="returns no optimizer"):
        join(None, "part", nn.Linear(3, 3), neighbors=())


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop])
def test_optimizers_that_make_their_state_at_once_take_new_parameters(kind):
    net, part = net_and_part()
    optimizer = kind(net.parameters(), lr=0.1)
    join(optimizer, "part", part, neighbors=())
    before = part.weight.detach().clone()
    for param in (*net.parameters(), *part.parameters()):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert (part.weight != before).all()


def test_frozen_parameters_are_not_trained():
    net = nn.Linear(2, 2)
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(net.parameters(), lr=0.1)], callbacks=[])
    assert why_untrained(trainer, net.parameters()) == ""
    assert "They are frozen" in why_untrained(trainer, net.requires_grad_(False).parameters())
    assert "pass self.parameters()" in why_untrained(trainer, nn.Linear(2, 2).parameters())
