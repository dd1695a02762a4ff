"""Convolutions whose backward leaves filters out: the gradients are the plain convolution's, for less arithmetic."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_transfer.methods.adafilter.sparing import respond
from lightning_transfer.nn import GatedConv2d

FILTERS = 12


def images():
    return torch.randn(3, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def convolution(**options):
    torch.manual_seed(1)
    return nn.Conv2d(4, FILTERS, 3, dtype=torch.float64, **options)


def gates(num_taken):
    """Not zero for some image at so many filters."""
    taken = torch.zeros(3, FILTERS, dtype=torch.bool)
    taken[torch.arange(num_taken) % 3, torch.arange(num_taken) * 5 % FILTERS] = True
    return taken


def gradients(conv, taken, response_of):
    features = images().requires_grad_()
    response = response_of(conv, features)
    generator = torch.Generator().manual_seed(2)
    outer = torch.randn(response.shape, dtype=torch.float64, generator=generator) * taken[:, :, None, None]
    response.backward(outer)
    return [response.detach(), features.grad, *(param.grad for param in conv.parameters())]


@pytest.mark.parametrize("num_taken", [0, 1, 7, FILTERS])
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same"}, {"groups": 2}],
)
def test_gradients_are_the_plain_convolutions(num_taken, options):
    conv, taken = convolution(**options), gates(num_taken)
    expected = gradients(copy.deepcopy(conv), taken, lambda conv, features: conv(features))
    found = gradients(conv, taken, lambda conv, features: respond(conv, features, taken))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert not conv.weight.grad[~taken.any(0)].any()


@pytest.mark.parametrize("num_taken", [3, 6])
def test_filters_that_nobody_took_cost_no_backward(num_taken):
    taken = gates(num_taken)

    def flops(is_spared):
        conv, features = convolution(), images().requires_grad_()
        response = respond(conv, features, taken if is_spared else None)
        with FlopCounterMode(display=False) as counter:
            response.backward(taken[:, :, None, None].expand(response.shape).double())
        return counter.get_total_flops()

    assert flops(is_spared=True) == flops(is_spared=False) * num_taken / FILTERS > 0


def test_gates_of_a_layer_leave_out_what_either_of_its_convolutions_does_not_need():
    layer, features = GatedConv2d(convolution(bias=False), nn.BatchNorm2d(FILTERS).double()).train(), images()
    features.requires_grad_()
    by_image = torch.zeros(3, FILTERS, dtype=torch.float64)
    by_image[:, :3] = 1  # tuned for all images, the next three for one of them, the others for none
    by_image[0, 3:6] = 1
    with FlopCounterMode(display=False) as counter:
        response = layer(features, by_image)
        forwards = counter.get_total_flops()
        response.sum().backward()
    a_pass = forwards / 2  # of one convolution
    of_tuned, of_frozen = 2 * a_pass * 6 / FILTERS, a_pass * 9 / FILTERS
    assert counter.get_total_flops() == forwards + of_tuned + of_frozen


def test_a_convolution_that_is_listened_to_runs_itself():
    heard = []
    for listen in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        conv = convolution()
        getattr(conv, listen)(lambda *args, listen=listen: heard.append(listen))
        respond(conv, images().requires_grad_(), gates(3)).sum().backward()
    conv = convolution()
    conv.forward = lambda features: (heard.append("own"), nn.Conv2d.forward(conv, features))[1]
    respond(conv, images(), gates(3))
    assert heard == ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "own"]
