"""Whatever optimizer the user made, new parameters end up in it and old ones stay where they are."""

from types import SimpleNamespace

import torch
from torch import nn

from lightning_transfer.glue.optimizers import join, trains_any


def test_named_parameters_keep_their_names():
    net, part = nn.Linear(2, 2), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    added = join(SimpleNamespace(optimizers=[optimizer]), "part", part)
    assert added == ["part.weight", "part.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias", "part.weight", "part.bias"]
    assert join(SimpleNamespace(optimizers=[optimizer]), "part", part) == []


def test_frozen_parameters_are_not_trained():
    net = nn.Linear(2, 2)
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(net.parameters(), lr=0.1)])
    assert trains_any(trainer, net.parameters())
    assert not trains_any(trainer, net.requires_grad_(False).parameters())
    assert not trains_any(trainer, nn.Linear(2, 2).parameters())
