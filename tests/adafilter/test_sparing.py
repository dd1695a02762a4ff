"""Convolutions whose backward leaves filters out: the gradients are the plain convolution's, for less arithmetic."""

import copy

import pytest
import timm.layers
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_transfer.functional import mix_filters
from lightning_transfer.methods.adafilter.sparing import respond
from lightning_transfer.nn import GatedConv2d

FILTERS = 12


def images(channels=4):
    return torch.randn(3, channels, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def convolution(cls=nn.Conv2d, size=3, **options):
    torch.manual_seed(1)
    return cls(4, FILTERS, size, **options).double()


def outer_gradient(response, num_filters):
    """Zero but for so many filters, each of one image's."""
    is_there = torch.zeros(3, FILTERS)
    is_there[torch.arange(num_filters) % 3, torch.arange(num_filters) * 5 % FILTERS] = 1
    generator = torch.Generator().manual_seed(2)
    outer = torch.randn(response.shape, dtype=response.dtype, generator=generator)
    return outer * is_there[:, :, None, None]


def gradients(conv, run, num_filters, dtype=torch.float64):
    features = images().to(dtype).requires_grad_()
    response = run(conv, features)
    response.backward(outer_gradient(response, num_filters))
    return [response.detach(), features.grad, *(param.grad for param in conv.parameters())]


def itself(conv, features):
    return conv(features)


@pytest.mark.parametrize("num_filters", [0, 1, 7, FILTERS])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"groups": 2},
        {"size": 1},
        {"cls": timm.layers.Conv2dSame, "stride": 2},
    ],
)
def test_gradients_are_the_convolutions_own(num_filters, options):
    conv = convolution(**options)
    expected = gradients(copy.deepcopy(conv), itself, num_filters)
    for mine, theirs in zip(gradients(conv, respond, num_filters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_an_image_alone_is_read_as_torch_reads_it():
    conv, found = convolution(), []
    for run in (respond, itself):
        features = images()[0].requires_grad_()
        found.append(torch.autograd.grad(run(conv, features).square().sum(), [features, conv.weight]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [{"stride": 1}, {"padding": 1}, {"dilation": 2}])
def test_what_was_set_to_a_number_later_is_read_as_torch_reads_it(change):
    conv = convolution()
    for name, value in change.items():
        setattr(conv, name, value)
    expected = gradients(copy.deepcopy(conv), itself, 5)
    for mine, theirs in zip(gradients(conv, respond, 5), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_under_autocast_the_convolution_runs_as_it_is():
    conv = convolution().float()

    def run(run_one):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(copy.deepcopy(conv), run_one, 5, torch.float32)

    for mine, theirs in zip(run(respond), run(itself), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_frozen_gets_no_gradient():
    conv = convolution().requires_grad_(requires_grad=False)
    for num_filters in (0, 5, FILTERS):
        _, of_features, *of_params = gradients(conv, respond, num_filters)
        assert of_features is not None
        assert of_params == [None, None]


def test_several_gradients_at_once():
    conv, features = convolution(), images().requires_grad_()
    response = respond(conv, features)
    outer = torch.stack([outer_gradient(response, number) for number in (1, 5)])
    found = torch.autograd.grad(response, [features, conv.weight], outer, is_grads_batched=True, retain_graph=True)
    for number, one in enumerate(outer):
        expected = torch.autograd.grad(conv(features), [features, conv.weight], one)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[number], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_filters", [0, 3, 6])
def test_filters_without_a_gradient_cost_no_backward(num_filters):
    def flops(run):
        response = run(convolution(), images().requires_grad_())
        with FlopCounterMode(display=False) as counter:
            response.backward(outer_gradient(response, num_filters))
        return counter.get_total_flops()

    assert flops(itself) > 0
    assert flops(respond) == flops(itself) * num_filters / FILTERS


def test_a_layer_leaves_out_what_its_gates_leave_without_a_gradient():
    layer, features = GatedConv2d(convolution(bias=False), nn.BatchNorm2d(FILTERS).double()).train(), images()
    gates = torch.zeros(3, FILTERS, dtype=torch.float64)
    gates[:, :3] = 1  # tuned for all images, the next three for one of them, the others for none
    gates[0, 3:6] = 1
    with FlopCounterMode(display=False) as counter:
        response = layer(features.requires_grad_(), gates)
        forwards = counter.get_total_flops()
        response.square().sum().backward()
    a_pass = forwards / 2  # of one convolution
    of_tuned, of_frozen = 2 * a_pass * 6 / FILTERS, a_pass * 9 / FILTERS
    assert counter.get_total_flops() == forwards + of_tuned + of_frozen


def test_a_loss_on_what_stands_between_convolution_and_gates_reaches_every_filter():
    layer, seen = GatedConv2d(convolution(bias=False), nn.BatchNorm2d(FILTERS).double()).train(), []
    layer.norm.tuned.register_forward_hook(lambda norm, taken, given: seen.append(taken[0]))
    layer(images(), torch.zeros(3, FILTERS, dtype=torch.float64))
    seen[0].square().sum().backward()
    expected = torch.autograd.grad(layer.tuned(images()).square().sum(), layer.tuned.weight)[0]
    torch.testing.assert_close(layer.tuned.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_whoever_listens_to_the_convolution_hears_it():
    heard = []
    for listen in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        conv = convolution()
        getattr(conv, listen)(lambda *args, listen=listen: heard.append(listen))
        respond(conv, images().requires_grad_()).sum().backward()
    conv = convolution()
    conv.forward = lambda features: (heard.append("own"), nn.Conv2d.forward(conv, features))[1]
    respond(conv, images())
    assert heard == ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "own"]


@pytest.mark.parametrize("gates", [torch.tensor([1.0, 0.0, 1.0] * 4), torch.full((FILTERS,), 0.3)])
def test_gates_that_are_the_same_for_all_images(gates):
    layer, features = GatedConv2d(convolution(), nn.BatchNorm2d(FILTERS).double()).train(), images()
    layer(features, gates.double()).square().sum().backward()
    found = layer.tuned.weight.grad.clone()
    layer.zero_grad()
    layer(features, gates.double().expand(3, -1)).square().sum().backward()
    torch.testing.assert_close(found, layer.tuned.weight.grad, rtol=1e-12, atol=1e-12)


class Scaled(torch.Tensor):
    """A weight that reaches the convolution as twice what it holds."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        scale = 2 if func is torch.conv2d else 1
        plain = [scale * each.as_subclass(torch.Tensor) if isinstance(each, Scaled) else each for each in args]
        return func(*plain, **(kwargs or {}))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.conv2d else result


@pytest.mark.parametrize("run", [itself, respond])
def test_whoever_stands_between_the_convolution_and_torch_is_heard_in_the_backward_too(run):
    conv, weight = convolution(bias=False), convolution(bias=False).weight.detach()
    _, plain, _ = gradients(conv, itself, 5)
    with Doubling():
        _, found, _ = gradients(conv, run, 5)
    torch.testing.assert_close(found, 2 * plain)
    layer = nn.Module()
    layer.weight = weight.as_subclass(Scaled)
    call = lambda layer, features: torch.conv2d(features, layer.weight, None, (1, 1), (0, 0), (1, 1), 1)  # noqa: E731
    layer.forward = lambda features: call(layer, features)
    _, found = gradients(layer, run, 5)
    torch.testing.assert_close(found, 2 * plain)


def test_second_derivatives_and_gradients_under_a_transform():
    conv = convolution().requires_grad_()
    run = lambda features, weight, bias: respond_with(conv, features, weight, bias)  # noqa: E731
    inputs = [images()[:1, :, :4, :4].clone().requires_grad_(), conv.weight, conv.bias]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    twice = []
    for response in (respond(conv, inputs[0]), conv(inputs[0])):
        outer = torch.zeros_like(response).requires_grad_()
        of_features = torch.autograd.grad(response, inputs[0], outer, create_graph=True)[0]
        twice.append(torch.autograd.grad(of_features.sum(), outer)[0])
    torch.testing.assert_close(*twice)
    assert twice[0].any()
    response = respond(conv, images())
    outer = torch.stack([outer_gradient(response, number) for number in (1, 5)])
    by_one = [torch.autograd.grad(response, conv.weight, one, retain_graph=True)[0] for one in outer]
    at_once = torch.vmap(lambda one: torch.autograd.grad(response, conv.weight, one, retain_graph=True)[0])(outer)
    torch.testing.assert_close(at_once, torch.stack(by_one))


def respond_with(conv, features, weight, bias):
    conv.forward = lambda features: torch.conv2d(features, weight, bias, (1, 1), (0, 0), (1, 1), 1)
    return respond(conv, features)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trace_is_the_plain_convolution():
    class Responding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = convolution()

        def forward(self, features):
            return respond(self.conv, features)

    traced = torch.jit.trace(Responding(), images())
    assert "Python" not in str(traced.inlined_graph)


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
