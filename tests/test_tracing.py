"""Looking at a network leaves it as it was."""

import pytest
import torch
from torch import nn

from lightning_transfer.tracing import evaluating, run_on_a_picture, share_right


class Merging(nn.Linear):
    """A layer that merges its second weights in eval mode, as layers of low rank do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += 0 if mode else 1
        return super().train(mode)


def test_accuracy_on_several_labels_does_not_depend_on_the_batches():
    logits, labels = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    network = nn.Linear(2, 2, bias=False)
    network.weight.data = torch.eye(2)
    each = list(zip(logits.split(1), labels.split(1), strict=True))
    assert share_right(network, [(logits, labels)]) == share_right(network, each) == 0.5  # of the signs, 2 of 4
    one_label = [(logits[1:], labels[1:])]
    assert share_right(network, one_label) == 0  # by the largest logit


def test_a_network_on_the_cpu_starts_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("a GPU was asked"))
    run_on_a_picture(nn.Conv2d(3, 2, 3))


def test_what_eval_does_beside_its_flags_is_not_done_by_looking():
    network = nn.Sequential(Merging(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval())
    before = network[0].weight.detach().clone()
    with evaluating(network):
        assert not any(layer.training for layer in network.modules())
        assert not network(torch.ones(4, 2)).requires_grad
    assert torch.equal(network[0].weight, before)
    assert [layer.training for layer in network.modules()] == [True, True, True, False]
