"""Filter banks: Gabor filters by loops, and a network's own convolutions called by hand."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective.banks import FilterBank
from tests import toys
from tests.reference import selective

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)


def by_hand(conv, pixels):
    return F.conv2d(pixels, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def plain():
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2, bias=False))


def of_plain(model, pixels):
    pixels = (pixels - IMAGENET[0]) / IMAGENET[1]
    first = by_hand(model[0], pixels)
    return [first, by_hand(model[2], first.relu())]


def of_torchvision(model, pixels):
    pixels = (pixels - IMAGENET[0]) / IMAGENET[1]
    first = by_hand(model.features[0], pixels)
    squeezed = by_hand(model.features[3].squeeze, F.max_pool2d(first.relu(), 3, 2, ceil_mode=True))
    return [first, squeezed]


def of_timm(model, pixels):
    pixels = (pixels - 0.5) / 0.5
    first, norm = by_hand(model.conv1[0], pixels), model.conv1[1]
    normed = F.batch_norm(first, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return [first, by_hand(model.conv1[3], normed.relu())]


def test_a_bank_of_a_network_does_not_depend_on_the_type_that_new_tensors_have():
    network, pixels = plain(), torch.rand(2, 3, 8, 8)
    expected = FilterBank.from_model(network, layers=["0"])(pixels)
    torch.set_default_dtype(torch.float64)
    try:
        found = FilterBank.from_model(network, layers=["0"])(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0])


def trained(model):
    """As after some training: BatchNorm's statistics are no longer 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


NETWORKS = {
    "plain": (plain, ["0", "2"], of_plain),
    "torchvision": (torchvision.models.squeezenet1_1, ["features.0", "features.3.squeeze"], of_torchvision),
    "timm": (lambda: trained(timm.create_model("test_resnet")), ["conv1.0", "conv1.3"], of_timm),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def bank_of(name, **options):
    make, layers, oracle = NETWORKS[name]
    model = make()
    return model, layers, oracle, FilterBank.from_model(model, layers, **options)


# Gabor


def test_gabor_is_four_sizes_of_six_orientations_real_and_imaginary():
    bank = FilterBank.gabor()
    assert bank.num_filters == (12, 12, 12, 12)
    assert [tuple(filters.shape) for filters in bank.buffers()] == [(12, 1, size, size) for size in (7, 11, 15, 19)]
    for size, filters in zip((7, 11, 15, 19), bank.buffers(), strict=True):
        assert filters[:, 0].numpy() == pytest.approx(selective.gabor(size, 6), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"sizes": (5, 9), "orientations": 4}])
def test_gabor_filters_have_zero_mean_and_unit_length_and_are_rotations(options):
    half = options.get("orientations", 6)  # filters of the first quarter turn, two an orientation
    for filters in FilterBank.gabor(**options).buffers():
        assert filters.sum((1, 2, 3)).abs().max() < 1e-5
        assert torch.allclose(filters.square().sum((1, 2, 3)), torch.ones(len(filters)), atol=1e-5)
        along_x, along_y = filters[:2, 0], filters[half : half + 2, 0]
        assert torch.allclose(along_y, along_x.mT, atol=1e-6)
        for number in range(half):
            turned = filters[number, 0].rot90(-1)  # a quarter turn, from x to y
            assert torch.allclose(filters[half + number, 0], turned, atol=1e-6)


def test_gabor_responses_are_to_the_grey_image():
    pixels = torch.rand(2, 3, 13, 12)
    bank = FilterBank.gabor(sizes=(5, 7), orientations=2)
    for size, maps in zip((5, 7), bank(pixels), strict=True):
        for image, found in zip(pixels, maps, strict=True):
            grey = image.double().mean(0, keepdim=True).numpy()
            expected = selective.responses(grey, selective.gabor(size, 2)[:, None])
            assert found.numpy() == pytest.approx(expected, abs=1e-5)
    assert [maps.shape for maps in bank(pixels[:, :1])] == [maps.shape for maps in bank(pixels)]
    coarse = FilterBank.gabor(sizes=(5, 7), orientations=2, stride=3)
    for some, every in zip(coarse(pixels), bank(pixels), strict=True):
        assert torch.allclose(some, every[:, :, ::3, ::3], atol=1e-6)


def test_a_bank_describes_every_option():
    def told(**options):
        return FilterBank.gabor(**options).describe()

    different = [told(), told(sizes=(7, 11, 15)), told(sizes=(7, 11, 15, 21)), told(orientations=4), told(stride=2)]
    assert len(set(different)) == 5
    assert told() == told()


@pytest.mark.parametrize("side", [6, 8, 12, 16, 18])
def test_images_that_are_too_small_are_told_the_largest_filter_at_once(side):
    images = TensorDataset(torch.rand(6, 3, side, 24), torch.arange(6))
    borrowing = lt.SelectiveJointFinetuning(
        lt.SourceTask(images, num_classes=6), neighbors=2, weight=1.0, target=images
    )
    message = rf"{side} x 24 pixels.* 19 x 19\. .*Resize\(38\), or pass bank=FilterBank.from_model\("
    for select in (
        lambda: lt.select_neighbors(images, images, k=2),
        lambda: toys.fit(toys.LitToy(), [borrowing], loader=DataLoader(images, batch_size=2)),
    ):
        with pytest.raises(lt.TransferConfigError, match=message):
            select()


def test_images_as_large_as_the_largest_filter_are_taken():
    assert [maps.shape[-1] for maps in FilterBank.gabor(sizes=(3, 9))(torch.rand(1, 3, 9, 9))] == [7, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (7, 8)}, r"sizes=\(7, 8\).*8 is not"),
        ({"sizes": (1,)}, "sizes=1.*at least 3"),
        ({"sizes": (7.0,)}, "sizes=7.0"),
        ({"orientations": 0}, "orientations=0"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_gabor_refuses_what_is_no_filter(options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        FilterBank.gabor(**options)


# networks


@each_network
def test_responses_are_the_convolutions_own_before_the_nonlinearity(name):
    """Whatever inplace function comes next."""
    model, _, oracle, bank = bank_of(name)
    pixels = torch.rand(2, 3, 40, 36)
    model.eval()
    for found, expected in zip(bank(pixels), oracle(model, pixels), strict=True):
        assert found.min() < 0
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_plain_networks_responses_are_exact():
    model, _, _, bank = bank_of("plain", normalize=False)
    pixels = torch.randn(2, 3, 12, 12)
    first = by_hand(model[0], pixels)
    assert torch.equal(bank(pixels)[0], first)
    assert torch.equal(bank(pixels)[1], by_hand(model[2], first.relu()))


def test_layers_come_in_the_order_they_are_named():
    model = plain()
    forth, back = FilterBank.from_model(model, ["0", "2"]), FilterBank.from_model(model, ["2", "0"])
    pixels = torch.rand(1, 3, 12, 12)
    assert back.num_filters == (6, 4)
    assert all(torch.equal(a, b) for a, b in zip(forth(pixels), reversed(back(pixels)), strict=True))
    assert forth.describe() != back.describe()


@each_network
def test_the_users_network_is_left_as_it_was(name):
    make, layers, _ = NETWORKS[name]
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    bank = FilterBank.from_model(model, layers)
    bank(torch.rand(2, 3, 40, 36))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    responses = bank(torch.full((1, 3, 40, 36), 0.3))
    with torch.no_grad():
        model.get_submodule(layers[0]).weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(bank(torch.full((1, 3, 40, 36), 0.3)), responses, strict=True))
    assert not any(module._forward_hooks for module in bank.modules())


@each_network
def test_train_does_not_switch_a_bank_to_training(name):
    _, _, _, bank = bank_of(name)
    pixels = torch.rand(2, 3, 40, 36)
    before = [maps.clone() for maps in bank(pixels)]
    assert bank.train() is bank
    nn.Sequential(bank).train()
    assert not any(module.training for module in bank.model.modules())
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(bank(pixels), before, strict=True))


def test_hooks_are_gone_after_an_error():
    _, _, _, bank = bank_of("plain", normalize=False)
    with pytest.raises(RuntimeError, match="channels"):
        bank(torch.rand(1, 2, 12, 12))
    assert not any(module._forward_hooks for module in bank.modules())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv1.00"], "'conv1.00' is not a convolution of ResNet. Did you mean 'conv1.0'"),
        (["conv1.0", "conv1.1"], "'conv1.1' is not a convolution of ResNet. Did you mean 'conv1"),
        (["conv1"], "'conv1' is not a convolution"),
        ([], r"layers is empty; write layers=\['conv1.0', 'conv1.3'\]"),
    ],
)
def test_layers_that_are_no_convolutions_are_refused(layers, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        FilterBank.from_model(timm.create_model("test_resnet"), layers)


def test_normalised_pixels_are_refused_by_name():
    _, _, _, bank = bank_of("plain")
    for pixels in (torch.full((1, 3, 12, 12), -0.5), torch.full((1, 3, 12, 12), 1.25)):
        with pytest.raises(lt.TransferConfigError, match=r"already normalised.*from_model\(..., normalize=False\)"):
            bank(pixels)
    _, _, _, bank = bank_of("plain", normalize=False)
    assert len(bank(pixels)) == 2


def test_grey_images_are_what_colour_ones_of_equal_channels_are():
    _, _, _, bank = bank_of("plain")
    grey = torch.rand(2, 1, 12, 12)
    for found, expected in zip(bank(grey), bank(grey.expand(-1, 3, -1, -1)), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_network_on_grey_images_is_given_the_mean_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    grey = torch.rand(2, 1, 12, 12)
    expected = by_hand(model[0], (grey - 0.449) / 0.226)
    assert torch.allclose(FilterBank.from_model(model, ["0"])(grey)[0], expected, atol=1e-5)


def test_a_network_bank_describes_layers_weights_and_normalisation():
    model = plain()
    told = [FilterBank.from_model(model, ["0"]).describe(), FilterBank.from_model(model, ["2"]).describe()]
    told += [FilterBank.from_model(model, ["0", "2"]).describe()]
    told += [FilterBank.from_model(model, ["0"], normalize=False).describe()]
    assert FilterBank.from_model(copy.deepcopy(model), ["0"]).describe() == told[0]
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    told += [FilterBank.from_model(model, ["0"]).describe()]
    assert len(set(told)) == 5


@pytest.mark.parametrize("name", ["gabor", *NETWORKS])
def test_layers_weigh_alike_and_filters_of_a_layer_weigh_alike(name):
    bank = FilterBank.gabor() if name == "gabor" else bank_of(name)[3]
    expected = np.concatenate([np.full(num, 1 / (len(bank.num_filters) * num)) for num in bank.num_filters])
    assert bank.weights.dtype == torch.float64
    assert bank.weights.numpy() == pytest.approx(expected, rel=1e-7)
    maps = bank(torch.rand(1, 3, 40, 36))
    assert bank.num_filters == tuple(layer.shape[1] for layer in maps)
