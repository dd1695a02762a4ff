"""Which convolutions count, and what lies below a cut."""

from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import lightning_transfer as lt
from lightning_transfer.functional import apply_collaborative, remove_collaborative
from lightning_transfer.methods.collaborative.depths import find_depths
from lightning_transfer.nn import CollaborativeEnsemble

# name, convolutions, counted
NETWORKS = [
    ("resnet18", 20, 17),
    ("resnet50", 53, 49),
    ("resnet26d", 31, 27),
    ("resnetv2_50", 54, 49),  # its head is a convolution
    ("nf_resnet50", 53, 49),
    ("regnety_002", 70, 66),
    ("densenet121", 120, 120),
    ("convnext_atto", 40, 40),  # what it calls downsample is its main path
    ("mobilenetv3_small_050", 53, 53),
    ("inception_v3", 94, 94),
    ("vit_tiny_patch16_224", 1, 1),
]


def head_of(network):
    return next(path for path, child in network.named_modules() if child is network.get_classifier())


@pytest.mark.parametrize(("name", "num_convs", "num_counted"), NETWORKS)
def test_convolutions_are_counted_from_the_input_and_cuts_are_nested(name, num_convs, num_counted):
    network = timm.create_model(name)
    depths = find_depths(network, head=head_of(network))
    convs = [path for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    assert (len(convs), len(depths.convs)) == (num_convs, num_counted)
    below = [set(depths.below(number)) for number in range(depths.most + 1)]
    assert below[0] == set()
    assert all(smaller < larger for smaller, larger in pairwise(below))
    for number, layers in enumerate(below):
        assert [path in layers for path in depths.convs] == [place < number for place in range(num_counted)]


def test_a_convolution_inside_the_head_is_not_counted():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Sequential(nn.Dropout(), nn.Conv2d(4, 5, 1)))
    assert find_depths(network, head="2").convs == ("0", "1")


def test_torchvisions_resnet50_has_49():
    assert len(find_depths(torchvision.models.resnet50()).convs) == 49


def test_the_order_is_that_of_running_not_of_writing():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, images):
            return self.second(self.first(images)).mean((2, 3))

    depths = find_depths(Backwards())
    assert depths.convs == ("first", "second")
    assert depths.below(1) == ["first"]


def test_a_shortcut_is_frozen_with_the_block_that_it_goes_around():
    depths = find_depths(timm.create_model("resnet18"))
    inside = {"layer2.0.downsample.0", "layer2.0.downsample.1"}
    number = depths.convs.index("layer2.0.conv2")
    assert not inside & set(depths.below(number))
    assert inside <= set(depths.below(number + 1))


def ensemble(name="resnet18", **frozen):
    torch.manual_seed(0)
    found = CollaborativeEnsemble({"own": timm.create_model(name, num_classes=3)})
    found.freeze(frozen)
    return found.train()


@pytest.mark.parametrize("number", [0, 1, 5, 9, 16])
def test_below_the_cut_nothing_moves_and_above_everything_learns(number):
    network = ensemble(own=number)
    below = set(find_depths(timm.create_model("resnet18")).below(number))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        network.train()  # a user's own
        network(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        path = name.removeprefix("members.own.network.").rpartition(".")[0]
        if name != "_extra_state":
            assert (value == before[name]).all() == (path in below), name


def test_no_graph_is_built_below_the_cut():
    network = ensemble(own=9)
    given = {}
    for path, layer in network.members.own.network.named_modules():
        layer.register_forward_hook(lambda layer, args, output, path=path: given.update({path: output.requires_grad}))
    network(torch.randn(2, 3, 32, 32))
    conv = find_depths(timm.create_model("resnet18")).convs[9]
    assert given[conv]
    assert not given[list(given)[list(given).index(conv) - 1]]
    assert not any(given[path] for path in ("conv1", "bn1", "layer1", "layer1.0.bn1"))


def test_frozen_norms_survive_train_and_conversion_and_come_back():
    network = ensemble(own=5)
    mine = network.members.own.network
    frozen = {path for path, layer in mine.named_modules() if type(layer).__name__ == "FrozenNorm"}
    assert len(frozen) == 5
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    converted.train()
    names = {path: type(layer).__name__ for path, layer in converted.members.own.network.named_modules()}
    assert {path for path, name in names.items() if name == "FrozenNorm"} == frozen
    network = ensemble(own=5)
    keys = list(network.state_dict())
    network.thaw()
    assert list(network.state_dict()) == keys
    plain = timm.create_model("resnet18", num_classes=3)
    found = network.members.own.network
    assert [(p, type(c)) for p, c in found.named_modules()] == [(p, type(c)) for p, c in plain.named_modules()]
    assert all(layer.training for layer in found.modules() if isinstance(layer, _NormBase))
    assert all(param.requires_grad for param in found.parameters())


def test_norms_wake_in_the_mode_that_they_would_be_in():
    network = ensemble(own=5)
    network.eval()
    images = torch.randn(2, 3, 32, 32)
    expected, alone = network(images), network.member("own")
    assert not any(layer.training for layer in alone.modules())
    assert torch.equal(alone(images), expected)
    network.train()
    assert all(layer.training for layer in network.member("own").modules())


def test_a_norm_that_its_user_has_put_to_rest_stays_so():
    own = timm.create_model("resnet18", num_classes=3).train()
    own.bn1.eval()
    module = nn.ModuleDict({"model": own})
    apply_collaborative(module, [timm.create_model("resnet10t")], backbone="model")
    remove_collaborative(module)
    assert not own.bn1.training
    assert own.layer1[0].bn1.training


def test_a_norm_with_weights_of_its_own_inside_rests_whole():
    class Leaky(nn.BatchNorm2d):
        def __init__(self, number):
            super().__init__(number)
            self.act = nn.PReLU(number)

        def forward(self, features):
            return self.act(super().forward(features))

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Leaky(4), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(4, 2))
    keys = [f"members.own.network.{key}" for key in net.state_dict()]
    found = CollaborativeEnsemble({"own": net})
    found.freeze({"own": 1})
    assert keys == [key for key in found.state_dict() if key != "_extra_state"]
    assert not net[1].act.weight.requires_grad
    assert type(net[1]).__name__ == "FrozenNorm"


def test_a_plan_for_other_networks_is_refused():
    module = nn.ModuleDict({"model": timm.create_model("resnet18", num_classes=3)})
    plan = lt.LayerPlan({"own": 3}, {"own": 49})
    with pytest.raises(lt.TransferConfigError, match=r"networks of {'own': 49} convolutions; these have {'own': 17}"):
        apply_collaborative(module, [], backbone="model", frozen_layers=plan)


def test_freezing_that_is_refused_leaves_what_was_frozen():
    network = ensemble(own=5)
    with pytest.raises(lt.TransferConfigError, match="at most 16"):
        network.freeze({"own": 17})
    assert network.frozen == {"own": 5}
    assert not network.members.own.network.conv1.weight.requires_grad


def test_a_parameter_that_was_frozen_before_stays_so():
    network = timm.create_model("resnet18", num_classes=3)
    network.conv1.weight.requires_grad = False
    found = CollaborativeEnsemble({"own": network})
    found.freeze({"own": 3})
    found.thaw()
    assert [name for name, param in network.named_parameters() if not param.requires_grad] == ["conv1.weight"]


def test_weights_that_are_shared_with_a_layer_above_the_cut_learn():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.three.weight = self.one.weight
            self.fc = nn.Linear(3, 2)

        def forward(self, images):
            return self.fc(self.three(self.two(self.one(images))).mean((2, 3)))

    found = CollaborativeEnsemble({"own": Tied()})
    found.freeze({"own": 2})
    assert [name for name, param in found.named_parameters() if not param.requires_grad] == [
        f"members.own.network.{name}" for name in ("one.bias", "two.weight", "two.bias")
    ]
