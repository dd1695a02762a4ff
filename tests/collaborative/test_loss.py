"""The loss of networks that learn together, against loops over numbers in double precision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.functional import collaborative_loss


def by_loops(logits, targets, weight):
    """The formula of METHODS as it is printed, one number at a time."""
    num_networks, num_images, num_classes = logits.shape
    total = 0.0
    for each in logits:
        entropies = [
            math.log(sum(math.exp(each[b][c]) for c in range(num_classes))) - each[b][targets[b]]
            for b in range(num_images)
        ]
        total += sum(entropies) / num_images
    distances = []
    for b in range(num_images):
        mean = [sum(logits[n][b][c] for n in range(num_networks)) / num_networks for c in range(num_classes)]
        norms = [
            math.sqrt(sum((logits[n][b][c] - mean[c]) ** 2 for c in range(num_classes))) for n in range(num_networks)
        ]
        distances.append(sum(norms) / num_networks)
    return total + weight * sum(distances) / num_images


@pytest.mark.parametrize("num_networks", [1, 2, 3, 5])
@pytest.mark.parametrize("weight", [0.0, 0.2, 3.0])
def test_equals_the_formula(num_networks, weight):
    random = np.random.default_rng(num_networks)
    logits, targets = random.normal(size=(num_networks, 6, 4)), random.integers(0, 4, 6)
    found = collaborative_loss(torch.from_numpy(logits), torch.from_numpy(targets), weight=weight)
    assert found.item() == pytest.approx(by_loops(logits, targets, weight), rel=1e-12)


def test_equal_logits_disagree_by_nothing_and_have_a_finite_gradient():
    each = torch.randn(3, 4)
    logits = each.expand(3, 3, 4).clone().requires_grad_()
    targets = torch.tensor([0, 1, 2])
    loss = collaborative_loss(logits, targets, weight=5.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    alone = each.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(alone, targets), alone)
    assert loss.item() == pytest.approx(3 * F.cross_entropy(each, targets).item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected.expand(3, 3, 4))


def test_the_order_of_networks_makes_no_difference():
    logits, targets = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = [collaborative_loss(logits[order], targets).item() for order in ([0, 1, 2, 3], [3, 1, 0, 2])]
    assert found[0] == pytest.approx(found[1], rel=1e-14)


def test_one_network_has_its_plain_loss():
    logits, targets = torch.randn(1, 5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(collaborative_loss(logits, targets), F.cross_entropy(logits[0], targets))


def test_two_networks_disagree_by_half_of_their_distance():
    logits, targets = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    term = collaborative_loss(logits, targets, weight=1.0) - collaborative_loss(logits, targets, weight=0.0)
    assert term.item() == pytest.approx(0.5 * np.linalg.norm(logits[0] - logits[1], axis=1).mean(), rel=1e-12)


def test_the_gradient_is_that_of_differences():
    logits, targets = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2, 1])
    assert torch.autograd.gradcheck(lambda values: collaborative_loss(values, targets, weight=0.7), logits)


def test_another_criterion():
    logits, targets = torch.randn(2, 4, 3), torch.rand(4, 3)
    found = collaborative_loss(logits, targets, weight=0, loss=F.mse_loss)
    assert found.item() == pytest.approx(sum(((each - targets) ** 2).mean().item() for each in logits), rel=1e-6)
    with pytest.raises(TransferConfigError, match="expected one, the mean over images"):
        collaborative_loss(logits, targets, loss=lambda z, y: (z - y).sum(1))
