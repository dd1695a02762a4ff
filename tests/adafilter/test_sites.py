"""What is found in networks that people use, and what is refused by name."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import lightning_transfer as lt
from lightning_transfer.functional import apply_adafilter, remove_adafilter
from lightning_transfer.methods.adafilter.apply import gates_of
from tests.toys import LitToy, fit, with_statistics

POOLED = "it works on pooled features, not on an image"
NETWORKS = [  # gated convolutions, of them without a norm of their own, and reasons of those that are left
    ("timm", "resnet18", 19, 0, {}),
    ("timm", "resnet26d", 28, 0, {}),
    ("timm", "resnext26ts", 28, 0, {}),
    ("timm", "seresnet50", 52, 0, {POOLED: 32}),
    ("timm", "densenet121", 119, 61, {}),
    ("timm", "efficientnet_b0", 48, 0, {POOLED: 32}),
    ("timm", "tf_efficientnet_b0", 48, 0, {POOLED: 32}),
    ("timm", "mobilenetv3_small_050", None, 0, None),
    ("timm", "convnext_atto", 39, 39, {}),
    ("timm", "nf_resnet26", None, None, None),
    ("torchvision", "resnet18", 19, 0, {}),
    ("torchvision", "resnext50_32x4d", 52, 0, {}),
    ("torchvision", "densenet121", 119, 61, {}),
    ("torchvision", "efficientnet_b0", 48, 0, {POOLED: 32}),
    ("torchvision", "mobilenet_v3_small", 33, 0, {POOLED: 18}),
    ("torchvision", "shufflenet_v2_x0_5", 55, 0, {}),
    ("torchvision", "squeezenet1_0", 24, 24, {"it gives the class logits": 1}),
]


def make(source, name):
    torch.manual_seed(0)
    net = timm.create_model(name) if source == "timm" else getattr(torchvision.models, name)(weights=None)
    return with_statistics(net).eval()


@pytest.mark.parametrize(
    ("source", "name", "number", "bare", "reasons"), NETWORKS, ids=[f"{row[0]}-{row[1]}" for row in NETWORKS]
)
@torch.no_grad()
def test_networks_that_people_use(source, name, number, bare, reasons):
    """Found, exact at the start, copied, trained in, and put back as they were."""
    net, images = make(source, name), torch.randn(2, 3, 64, 64)
    before, keys, kinds = (
        net(images),
        list(net.state_dict()),
        {path: type(layer) for path, layer in net.named_modules()},
    )
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    report = apply_adafilter(net)
    gates = gates_of(net)
    assert number is None or len(report.replaced) == number
    assert bare is None or sum(not site.norm for site in gates.sites) == bare
    if reasons is not None:
        found = [reason for reason in report.left.values() if reason != "it is the stem"]
        assert {reason: found.count(reason) for reason in found} == reasons
    assert torch.equal(net(images), before)
    assert torch.equal(copy.deepcopy(net)(images), before)
    remove_adafilter(net)
    assert list(net.state_dict()) == keys
    assert {path: type(layer) for path, layer in net.named_modules()} == kinds
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


class Odd(nn.Module):
    """A network with everything that stands in the way."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.unused = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.good, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.alias = self.named = nn.Conv2d(4, 4, 1)
        self.shown, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        features = self.up(self.twice(self.twice(self.stem(images))))
        features = self.normed(features)
        response = self.shared(features)
        features = self.bn(response) + response  # taken twice: the norm cannot be gated with it
        features = torch.relu(self.after(self.good(features)))
        features = features * self.squeeze(features.mean((2, 3), keepdim=True))
        shown = self.shown(self.alias(features))
        return self.fc(self.last(shown).mean((2, 3))), shown


def test_what_stands_in_the_way_is_named():
    report = apply_adafilter(net := Odd())
    assert report.replaced == ("shared", "good", "shown")
    assert [site.norm for site in net.adafilter.sites] == ["", "after", ""]
    assert dict(report.left) == {
        "stem": "it is the stem",
        "twice": "it runs 2 times in a pass",
        "up": "a ConvTranspose2d is not supported",
        "normed": "it has a parametrization or hooks of its own",
        "unused": "it does not run on an image",
        "squeeze": POOLED,
        "alias": "it is in the network under 2 names",
    }


@pytest.mark.parametrize(
    ("gated", "expected"),
    [
        ("layer4.*", 5),
        (["layer4.1.*", "conv1"], 3),
        (lambda name, conv: conv.kernel_size == (1, 1), 3),
    ],
)
def test_layers_are_chosen_by_pattern_or_predicate(gated, expected):
    assert len(apply_adafilter(timm.create_model("resnet18"), gated=gated).replaced) == expected


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: timm.create_model("resnet18"), {"gated": "layer5.*"}, "matches no convolution. Known: .conv1"),
        (Odd, {"gated": "twice"}, "gated='twice' cannot be gated: it runs 2 times in a pass"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), {}, "has lazy layers. Run it once on a batch"),
        (lambda: nn.Linear(3, 3), {}, "Linear has none. The other methods take any network: Soft"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), {}, "only a patch embedding. The other methods"),
        (lambda: timm.create_model("resnet18"), {"estimator": "hard"}, "estimator='hard' is not known"),
        (lambda: timm.create_model("resnet18"), {"gate_width": 0}, "gate_width=0"),
        (lambda: timm.create_model("resnet18"), {"backbone": "nope"}, "backbone='nope' is not a module of ResNet"),
    ],
)
def test_what_is_not_right_is_refused_by_name(module, options, message):
    module = module()
    kinds = [type(layer) for layer in module.modules()]
    with pytest.raises(lt.TransferConfigError, match=message):
        apply_adafilter(module, **options)
    assert [type(layer) for layer in module.modules()] == kinds


def test_a_gated_network_is_not_gated_again():
    net = timm.create_model("resnet18")
    apply_adafilter(net)
    with pytest.raises(lt.TransferConfigError, match="gated already. Call remove_adafilter"):
        apply_adafilter(net)
    remove_adafilter(net)
    with pytest.raises(lt.TransferConfigError, match="not gated: there is nothing to remove"):
        remove_adafilter(net)


def test_a_network_is_found_in_a_module():
    class Module(nn.Module):
        def training_step(self):
            """As a LightningModule has."""

    one, several, none = Module(), Module(), Module()
    one.encoder, one.head = timm.create_model("resnet18"), nn.Linear(3, 3)
    several.student, several.teacher = timm.create_model("resnet18"), timm.create_model("resnet18")
    assert apply_adafilter(one).replaced[0] == "encoder.layer1.0.conv1"
    with pytest.raises(lt.TransferConfigError, match="several parts with convolutions: 'student', 'teacher'"):
        apply_adafilter(several)
    assert apply_adafilter(several, backbone="teacher").replaced[0] == "teacher.layer1.0.conv1"
    with pytest.raises(
        lt.TransferConfigError,
        match="filters of convolutions, and Module has none. The other",
    ):
        apply_adafilter(none)


@pytest.mark.parametrize(
    "make", [lambda: "model.conv", lambda: ["model.c*"], lambda: lambda name, _: name == "model.conv"]
)
def test_names_to_gate_start_at_the_users_module(make):
    module = LitToy()
    assert apply_adafilter(module, gated=make()).replaced == ("model.conv",)
    fit(module, [lt.AdaFilter(gated=make())], max_steps=1)  # finds the same convolutions again
    with pytest.raises(lt.TransferConfigError, match=r"gated='conv' matches no convolution.*model\.conv"):
        apply_adafilter(LitToy(), gated="conv")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("compute", [nn.utils.weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)])
def test_a_network_with_computed_weights_is_refused_with_the_way_out(compute):
    module = LitToy()
    compute(module.model.conv)
    with pytest.raises(lt.TransferConfigError, match=r"computed from others\. Use .*parametrizations.*prune\.remove"):
        fit(module, [lt.AdaFilter(gated="model.conv")])


def test_another_error_of_copying_a_network_is_left_as_it_is():
    class Full(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        apply_adafilter(nn.Sequential(Full(3, 4, 3)))


def test_layers_that_are_left_out_for_one_reason_are_named_together(caplog):
    class Three(LitToy):
        def __init__(self):
            super().__init__()
            self.model.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3))

    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(Three(), [lt.AdaFilter(gated=["model.conv.2"])], max_steps=1)
    assert "AdaFilter: not gated: model.conv.0, model.conv.1: left out by gated=." in caplog.messages
