"""What METHODS promises of AdaFilter: at the start, with all gates open or shut, and for permuted images."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_transfer as lt
from lightning_transfer.functional import apply_adafilter, mix_filters, remove_adafilter, straight_through_gate
from lightning_transfer.methods.adafilter.apply import FilterGates, gates_of
from lightning_transfer.nn import GatedConv2d, RecurrentFilterGate
from lightning_transfer.surgery import rebuild
from tests.adafilter.nets import SITES, batch, chain, gated_chain, gradients, move


def layers(net):
    return [net.get_submodule(site) for site in SITES]


@pytest.mark.parametrize("bias", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_start_the_output_is_the_pretrained_networks_for_any_gate(bias, dtype):
    net = chain().to(dtype).eval()
    images = batch()[0].to(dtype)
    before = net(images)
    apply_adafilter(net, gate_width=4, gate_bias=bias)
    nn.init.normal_(net.adafilter.gate.outputs[1].weight, std=10)
    assert torch.equal(net(images), before)


def test_shut_gates_are_the_pretrained_network_whatever_was_tuned():
    net, plain = gated_chain(estimator="straight_through", gate_bias=0.0), chain().eval()
    for name in ("stem.weight", "stem.bias", "fc.weight", "fc.bias"):
        net.get_parameter(name).data.copy_(plain.get_parameter(name))
    for layer in net.adafilter.gate.outputs:
        nn.init.constant_(layer.bias, -1e3)
    assert torch.equal(net.eval()(batch()[0]), plain(batch()[0]))


@pytest.mark.parametrize("training", [True, False])
def test_open_gates_are_the_tuned_network(training):
    net = gated_chain()
    for layer in net.adafilter.gate.outputs:
        nn.init.constant_(layer.bias, 1e3)
    twin = copy.deepcopy(net)
    remove_adafilter(twin, "tuned")
    assert torch.equal(net.train(training)(batch()[0]), twin.train(training)(batch()[0]))


def test_frozen_copies_get_no_gradient_and_closed_filters_none_either():
    net = gated_chain()
    found = gradients(net, F.cross_entropy(net(batch()[0]), batch()[1]))
    assert not any("frozen" in name for name in found)
    assert not any("frozen" in name for name, _ in net.named_parameters())
    for layer in net.adafilter.gate.outputs:
        nn.init.constant_(layer.bias, 1e3)
        with torch.no_grad():
            layer.bias[0] = -1e3  # the first filter of every layer is chosen by nobody
    found = gradients(net, F.cross_entropy(net(batch()[0]), batch()[1]))
    for site in SITES:
        grad = found[f"{site}.tuned.weight"]
        assert (grad[0] == 0).all()
        assert (grad[1:] != 0).any()


def test_a_gates_gradient_is_zero_until_filters_have_moved():
    net = chain()
    apply_adafilter(net, gate_width=4)
    found = gradients(net.eval(), F.cross_entropy(net(batch()[0]), batch()[1]))
    assert all((found[name] == 0).all() for name in found if "adafilter" in name)


def test_a_gate_in_half_precision_pools_large_maps_and_takes_no_images():
    gate = RecurrentFilterGate([3], [8], width=4).half()
    assert torch.equal(gate(0, torch.full((1, 3, 112, 112), 6.0).half()), gate(0, torch.full((1, 3, 1, 1), 6.0).half()))
    assert gate(0, torch.empty(0, 3, 4, 4).half()).shape == (0, 8)


def test_permuted_images_have_permuted_gates():
    net, order = gated_chain().eval(), torch.tensor([3, 1, 5, 0, 2, 4])
    net(batch()[0])
    before = net.adafilter.last_gates()
    net(batch()[0][order])
    for path, gates in net.adafilter.last_gates().items():
        assert torch.equal(gates, before[path][order])
        assert len(gates.unique(dim=0)) > 1, "every image has the same gates: the test would be blind"


def test_there_is_one_cell_in_the_state_and_the_shared_gate_is_not_registered_twice():
    keys = list(gated_chain().state_dict())
    assert sum("cell.weight_ih" in key for key in keys) == 1
    assert not any("_gate" in key or "_folded" in key for key in keys)


@pytest.mark.parametrize("estimator", ["all_tuned", "all_frozen", "random"])
def test_fixed_gates_are_the_baselines(estimator):
    net, plain = chain(), chain()
    apply_adafilter(net, estimator=estimator)
    images, labels = batch()
    found = gradients(net, F.cross_entropy(net(images), labels))
    reference = gradients(plain, F.cross_entropy(plain(images), labels))
    if estimator == "all_tuned":
        assert torch.equal(found["a.conv.tuned.weight"], reference["a.conv.weight"])
        assert torch.equal(found["stem.weight"], reference["stem.weight"])
    elif estimator == "all_frozen":
        assert not any("tuned" in name for name in found)
        assert torch.equal(net.eval()(images), plain.eval()(images)) is False  # the plain one's statistics moved
        assert torch.equal(net(images), chain().eval()(images))
    else:
        move_tuned(net)
        assert not torch.equal(net.eval()(images), net(images))
    remove_adafilter(net)
    assert all(param.requires_grad for param in net.parameters())


def move_tuned(net):
    with torch.no_grad():
        for layer in layers(net):
            layer.tuned.weight.add_(torch.randn_like(layer.tuned.weight))


def test_mix_is_the_formula_and_exact_at_both_ends():
    rng = np.random.default_rng(0)
    tuned, frozen, gates = rng.normal(size=(4, 5, 3, 3)), rng.normal(size=(4, 5, 3, 3)), rng.uniform(size=(4, 5))
    expected = np.empty_like(tuned)
    for image in range(4):
        for channel in range(5):
            share = gates[image, channel]
            expected[image, channel] = share * tuned[image, channel] + (1 - share) * frozen[image, channel]
    found = mix_filters(*map(torch.from_numpy, (tuned, frozen, gates)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    big, small = torch.tensor([[[[3e30]]]]), torch.tensor([[[[1.0]]]])
    assert mix_filters(big, small, torch.zeros(1, 1)) == 1
    assert mix_filters(big, small, torch.ones(1, 1)) == big


@pytest.mark.parametrize("shape", [(4, 5), (5,)])
@pytest.mark.parametrize("hard", [True, False])
def test_mix_has_the_formulas_gradients(shape, hard):
    generator = torch.Generator().manual_seed(0)
    tuned, frozen = (torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    gates = torch.rand(shape, dtype=torch.float64, generator=generator)
    gates = gates.round() if hard else gates
    outer = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=generator)
    found = []
    for mix in (partial(mix_filters, hard=hard), plain_mix):
        inputs = [tensor.clone().requires_grad_() for tensor in (tuned, frozen, gates)]
        (mix(*inputs) * outer).sum().backward()
        found.append([tensor.grad for tensor in inputs])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def plain_mix(tuned, frozen, gates):
    gates = gates.reshape(-1, 5)[:, :, None, None]
    return gates * tuned + (1 - gates) * frozen


def test_gates_that_are_not_numbers_are_not_taken_for_shut():
    mixed = mix_filters(torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), torch.nan), hard=True)
    assert mixed.isnan().all()


def test_hard_gates_are_rounded_forwards_and_backwards():
    tuned, frozen = (torch.randn(1, 3, 2, 2).requires_grad_() for _ in range(2))
    mixed = mix_filters(tuned, frozen, torch.tensor([[0.2, 0.5, 0.7]]), hard=True)
    mixed.sum().backward()
    taken = torch.tensor([0.0, 0.0, 1.0])[None, :, None, None]
    assert torch.equal(mixed, taken * tuned + (1 - taken) * frozen)
    assert torch.equal(tuned.grad, taken.expand_as(tuned))
    assert torch.equal(frozen.grad, 1 - taken.expand_as(frozen))


@pytest.mark.parametrize("gates", [torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.full((4,), 0.3)])
def test_gates_that_are_the_same_for_all_images_give_the_gradients_of_gates_for_each(gates):
    layer = GatedConv2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    images, found = torch.randn(5, 3, 6, 6, dtype=torch.float64), []
    for chosen in (gates.double(), gates.double().expand(5, -1)):
        layer.zero_grad()
        layer(images, chosen).square().sum().backward()
        found.append(layer.tuned.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_estimators():
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expected = (logits > 0).double()
    for estimator in ("straight_through", "semantic_hashing", "gumbel"):
        assert torch.equal(straight_through_gate(logits, estimator=estimator, training=False), expected)
    for estimator, temperature in (("straight_through", 1.0), ("semantic_hashing", 1.0), ("gumbel", 0.5)):
        values = logits.clone().requires_grad_()
        straight_through_gate(values, estimator=estimator, temperature=temperature, training=False).sum().backward()
        share = 1 / (1 + np.exp(-logits.numpy() / temperature))
        slope = share * (1 - share) / temperature
        if estimator == "semantic_hashing":
            slope = np.where((1.2 * share - 0.1 > 0) & (1.2 * share - 0.1 < 1), 1.2 * slope, 0)
        np.testing.assert_allclose(values.grad.numpy(), slope, rtol=1e-9, atol=1e-12)
    torch.manual_seed(0)
    many = torch.full((100_000,), 0.7)
    share = 1 / (1 + np.exp(-0.7))
    assert straight_through_gate(many, estimator="gumbel").mean().item() == pytest.approx(share, abs=0.01)
    normal = 0.5 * (1 + torch.erf(torch.tensor(0.7) / 2**0.5)).item()
    assert straight_through_gate(many, estimator="semantic_hashing").mean().item() == pytest.approx(normal, abs=0.01)
    with pytest.raises(lt.TransferConfigError, match="Did you mean 'gumbel'"):
        straight_through_gate(many, estimator="gumble")
    with pytest.raises(lt.TransferConfigError, match="temperature"):
        straight_through_gate(many, estimator="gumbel", temperature=0)


def test_the_folded_filters_are_the_plain_formulas_in_float32():
    net = gated_chain().float().train()
    images = batch()[0].float()
    folded = net(images)
    for layer in layers(net):
        layer._folded = None
    torch.testing.assert_close(net(images), folded, rtol=1e-5, atol=1e-5)


def test_loading_weights_folds_them_anew():
    net, other = gated_chain(), gated_chain()
    with torch.no_grad():
        for layer in layers(other):
            layer.frozen.weight.mul_(2)
    net.load_state_dict(other.state_dict())
    twin = copy.deepcopy(net)
    for layer in layers(twin):
        layer._folded = None
    torch.testing.assert_close(net.train()(batch()[0]), twin.train()(batch()[0]))


def test_freezing_survives_train_and_thawing():
    net = gated_chain()
    before = {name: value.clone() for name, value in net.named_buffers() if "frozen" in name}
    assert before
    net.requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(batch()[0]), batch()[1]).backward()
        optimizer.step()
    for name, value in net.named_buffers():
        if "frozen" in name:
            assert torch.equal(value, before[name])


def test_move_makes_copies_differ():
    net = gated_chain()
    assert all((layer.tuned.weight != layer.frozen.weight).all() for layer in layers(net))
    move(net, amount=0.0)


def test_a_norm_that_rests_goes_on_resting_and_parameters_stay_frozen():
    net = chain().train()
    net.a.bn.eval()
    net.b.conv.requires_grad_(False)
    apply_adafilter(net, estimator="all_frozen")
    before = net.a.conv.norm.tuned.running_mean.clone()
    remove_adafilter(net)
    assert [net.a.bn.training, net.b.bn.training, net.a.conv.training] == [False, True, True]
    assert [net.a.conv.weight.requires_grad, net.b.conv.weight.requires_grad] == [True, False]
    apply_adafilter(net)
    net(batch()[0])
    assert torch.equal(net.a.conv.norm.tuned.running_mean, before)


def test_weights_assigned_to_a_network_built_without_any_are_folded():
    net = gated_chain()
    with torch.device("meta"):
        empty = type(net)()
    empty.double()
    apply_adafilter_like(empty, net)
    empty.load_state_dict(net.state_dict(), assign=True)
    torch.testing.assert_close(empty.train()(batch()[0]), net.train()(batch()[0]))


def apply_adafilter_like(empty, net):
    FilterGates(empty, net.adafilter.sites, estimator="straight_through", width=4)


def test_new_weights_are_the_same_whatever_the_random_state_and_leave_it_alone():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, net = torch.get_rng_state(), chain()
        apply_adafilter(net, gate_width=4)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(net.adafilter.gate.cell.weight_ih)
    assert torch.equal(*states)


def sequential():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)]
        return nn.Sequential(*parts)


@pytest.mark.parametrize(
    ("build", "backbone", "holder"),
    [
        (sequential, "auto", "1"),
        (lambda: nn.Sequential(sequential(), nn.Identity()), "0", "0.1"),
        (lambda: nn.ModuleDict({"nets": nn.ModuleList([sequential()])}), "nets.0", "nets.0.1"),
        (lambda: Around(nn.Sequential(sequential(), nn.Identity())), "net.0", ""),
        (lambda: Around(nn.ModuleList([sequential()])), "net.0", ""),
    ],
)
def test_containers_that_are_read_by_position_keep_their_children(build, backbone, holder):
    """Slices, counts and loops over them see as many as before; the gates are rebuilt, copied and taken out."""
    root, plain, images = build(), build(), torch.rand(2, 3, 8, 8)
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    apply_adafilter(root, backbone=backbone, gate_width=4)
    for path, container in plain.named_modules():
        if isinstance(container, kinds):
            assert [name for name, _ in root.get_submodule(path).named_children()] == [*container._modules]
    assert [path for path, child in root.named_modules() if isinstance(child, FilterGates)] == [
        f"{holder}.adafilter".lstrip(".")
    ]
    with pytest.raises(lt.TransferConfigError, match="gated already"):
        apply_adafilter(root, backbone=backbone)
    rebuild(plain, root.state_dict())
    plain.load_state_dict(root.state_dict())
    network, path = gates_of(plain).network, "" if backbone == "auto" else backbone
    assert network is plain.get_submodule(path)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(plain)))
    assert gates_of(twin).network is twin.get_submodule(path)
    assert torch.equal(gates_of(twin).network(images), root.get_submodule(path)(images))
    remove_adafilter(plain)
    assert list(plain.state_dict()) == list(build().state_dict())


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
