"""A gated network made plain: which filters are kept, what a mean of them is, and what it costs."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from lightning_transfer.functional import apply_adafilter, remove_adafilter
from tests.adafilter.nets import SITES, batch, chain, gated_chain

LOADER = [batch(seed) for seed in (3, 4, 5)]


def test_what_the_user_froze_after_gating_stays_frozen():
    net = gated_chain().requires_grad_(False)
    remove_adafilter(net)
    assert not any(param.requires_grad for param in net.parameters())


class Masked(torch.nn.Conv2d):
    """A convolution with a buffer of its own, before its weight."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.register_buffer("mask", torch.ones(()))


def test_a_convolution_with_a_buffer_of_its_own_is_made_plain():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Masked(4, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    kept = copy.deepcopy(net[1].state_dict())
    apply_adafilter(net)
    remove_adafilter(net, "frozen")
    for name, value in net[1].state_dict().items():
        torch.testing.assert_close(value, kept[name])


def test_frozen_gives_the_pretrained_filters_and_statistics_back():
    net, plain = gated_chain().train(), chain()
    net(batch()[0])  # moves the tuned norms' statistics
    remove_adafilter(net, "frozen")
    for name, value in plain.state_dict().items():
        if name.startswith(SITES) and "num_batches" not in name:
            assert torch.equal(net.state_dict()[name], value), name


@pytest.mark.parametrize("keep", ["tuned", "frozen", "mean"])
def test_the_plain_network_is_loaded_by_its_own_class_and_costs_what_is_said(keep):
    net = gated_chain().eval()
    before = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in LOADER) / 18
    removal = remove_adafilter(net, keep, loader=LOADER)
    plain = chain()
    plain.load_state_dict(net.state_dict(), strict=True)
    after = sum(int((plain.eval()(images).argmax(1) == labels).sum()) for images, labels in LOADER) / 18
    assert (removal.accuracy_before, removal.accuracy_after) == (before, after)


def test_mean_filters_give_the_mean_of_both_responses():
    """By the formula, with the share of open gates in place of the gates."""
    net = gated_chain().eval()
    twin, shares = copy.deepcopy(net), {}
    for images, _ in LOADER:
        net(images)
        for path, gates in net.adafilter.last_gates().items():
            shares[path] = shares.get(path, 0) + gates.double().sum(0) / 18
    remove_adafilter(twin, "mean", loader=LOADER)
    assert any(((share > 0) & (share < 1)).any() for share in shares.values())
    features = F.relu(net.stem(batch()[0]))
    for site in SITES:
        share = shares[site][:, None, None]
        layer = net.get_submodule(site)
        tuned, frozen = layer.tuned(features), layer.frozen(features)
        if layer.norm is not None:
            tuned, frozen = layer.norm.tuned(tuned), layer.norm.frozen(frozen)
        features = F.relu(share * tuned + (1 - share) * frozen)
    torch.testing.assert_close(twin(batch()[0]), net.fc(features.mean((2, 3))))


def test_removal_is_refused_by_name():
    net = gated_chain()
    with pytest.raises(lt.TransferConfigError, match="pass loader="):
        remove_adafilter(net, "mean")
    with pytest.raises(lt.TransferConfigError, match="Known: 'tuned', 'frozen', 'mean'"):
        remove_adafilter(net, "best")
    with pytest.raises(lt.TransferConfigError, match="gave no images"):
        remove_adafilter(net, "mean", loader=[])
    fixed = chain()
    apply_adafilter(fixed, estimator="random")
    with pytest.raises(lt.TransferConfigError, match="needs learned gates, not 'random'"):
        remove_adafilter(fixed, "mean", loader=LOADER)


def test_a_copy_that_moved_to_another_precision_is_made_plain_there():
    import timm

    net = timm.create_model("efficientnet_b0", num_classes=3)  # norms with activations behind them
    apply_adafilter(net)
    net.double()
    net(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    moved = net.blocks[1][0].conv_pw.norm.tuned.running_mean.clone()
    assert (moved != 0).any()
    remove_adafilter(net)
    assert torch.equal(net.blocks[1][0].bn1.running_mean, moved)
    assert {value.dtype for value in net.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert net.double()(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 3)
