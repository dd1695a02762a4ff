"""Looking at a network leaves it as it was."""

import torch
from torch import nn

from lightning_transfer.tracing import evaluating


class Merging(nn.Linear):
    """A layer that merges its second weights in eval mode, as layers of low rank do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += 0 if mode else 1
        return super().train(mode)


def test_what_eval_does_beside_its_flags_is_not_done_by_looking():
    network = nn.Sequential(Merging(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval())
    before = network[0].weight.detach().clone()
    with evaluating(network):
        assert not any(layer.training for layer in network.modules())
        assert not network(torch.ones(4, 2)).requires_grad
    assert torch.equal(network[0].weight, before)
    assert [layer.training for layer in network.modules()] == [True, True, True, False]
