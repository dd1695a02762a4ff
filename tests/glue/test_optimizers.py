"""Whatever optimizer the user made, new parameters end up in it and old ones stay where they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.optimizers import join, trains_any


def net_and_part():
    return nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}), nn.Linear(3, 3)


def test_named_parameters_keep_their_names():
    net, part = net_and_part()
    optimizer = torch.optim.SGD(net["body"].named_parameters(), lr=0.1)
    for _ in range(2):
        join(net, optimizer, "part", part, beside=None)
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
    join(net, shape(optimizer), "part", part, beside=beside)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        2 + 2 * (number == group) for number in (0, 1)
    ]


def test_a_head_that_nobody_trains_has_no_group():
    net, part = net_and_part()
    optimizer = torch.optim.SGD(net["body"].parameters(), lr=0.1)
    join(net, optimizer, "part", part, beside="head")
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_nothing_returned_is_refused():
    net, part = net_and_part()
    with pytest.raises(TransferConfigError, match="returns no optimizer"):
        join(net, None, "part", part, beside=None)


def test_frozen_parameters_are_not_trained():
    net = nn.Linear(2, 2)
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(net.parameters(), lr=0.1)])
    assert trains_any(trainer, net.parameters())
    assert not trains_any(trainer, net.requires_grad_(False).parameters())
    assert not trains_any(trainer, nn.Linear(2, 2).parameters())
