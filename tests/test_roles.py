"""The head of somebody else's network: found, or one error that lists the candidates and the argument to write."""

import lightning as L
import pytest
import timm
import torch
import torchvision
from torch import nn

import lightning_transfer as lt
from lightning_transfer.glue.checkpoints import TrainingOnly
from lightning_transfer.networks import entry_of
from lightning_transfer.roles import find_head, has_forward, in_width
from tests.toys import LitToy, PlToy, ToyNet


def wrapped(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet10t", "model.fc"),
        ("vit_tiny_patch16_224", "model.head"),
        ("convnext_atto", "model.head.fc"),
        ("mobilenetv3_small_050", "model.classifier"),
        ("efficientnet_b0", "model.classifier"),
        ("regnetx_002", "model.head.fc"),
    ],
)
def test_timm_models_are_asked(name, path):
    module = wrapped(model=timm.create_model(name))
    assert find_head(module).path == path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "net.fc"),
        ("vgg11", "net.classifier.6"),
        ("vit_b_16", "net.heads.head"),
        ("densenet121", "net.classifier"),
        ("squeezenet1_1", "net.classifier"),
    ],
)
def test_torchvision_models_are_found_by_name(name, path):
    with torch.device("meta"):
        module = wrapped(net=torchvision.models.get_model(name))
    assert find_head(module).path == path


def test_a_head_beside_a_backbone_without_one():
    assert (
        find_head(wrapped(backbone=timm.create_model("resnet10t", num_classes=0), head=nn.Linear(512, 3))).path
        == "head"
    )


def test_the_last_linear_that_runs_is_taken_and_the_module_is_as_before():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    module.unused = nn.Linear(3, 3)
    module.forward = lambda x: module[2](module[1](module[0](x)))
    module[1].eval()
    assert find_head(module, probe=lambda: module(torch.rand(2, 4))).path == "2"
    assert [child.training for child in module.children()] == [True, False, True, True]
    assert not any(child._forward_hooks for child in module.modules())
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("module", "head", "message"),
    [
        (
            wrapped(student=ToyNet(), teacher=ToyNet()),
            "auto",
            "ambiguous: student.fc, teacher.fc. Pass one: head='student.fc'",
        ),
        (wrapped(a=nn.Linear(2, 2), b=nn.Linear(2, 2)), "auto", "ambiguous: a, b. Pass one"),
        (wrapped(encoder=nn.Conv2d(3, 3, 3), pool=nn.AvgPool2d(2)), "auto", "No classifier found.*encoder, pool"),
        (wrapped(model=ToyNet()), "model.fcc", "Did you mean 'model.fc'?"),
        (wrapped(model=ToyNet()), "fc", "Did you mean 'model.fc'?"),
        (wrapped(model=ToyNet()), "model.bn", "BatchNorm2d without a Linear layer"),
        (wrapped(classifier=nn.Sequential(nn.Conv2d(3, 2, 1))), "auto", "No classifier found.*per-pixel"),
        (
            wrapped(pixels=nn.Sequential(nn.Conv2d(3, 2, 1))),
            "pixels",
            "ends in a convolution without a global pool",
        ),
        (
            wrapped(model=timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)),
            "auto",
            "ambiguous: model.head, model.head_dist",
        ),
    ],
)
def test_what_is_unclear_lists_the_candidates(module, head, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        find_head(module, head)


class HiddenFc(nn.Module):
    """A hidden layer with a head's name."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.fc(x).relu())


def test_a_hidden_layer_with_a_heads_name_is_no_head():
    module = wrapped(net=HiddenFc())
    with pytest.raises(lt.TransferConfigError, match=r"ambiguous: net.fc, net.out. Pass one: head='net.out'"):
        find_head(module, probe=lambda: module.net(torch.rand(1, 4)))
    assert find_head(module, "net.out").path == "net.out"


class Heads(nn.Module):
    """Two tasks' heads, or, if gated, one whose hidden layer is halved."""

    def __init__(self, *, is_gated):
        super().__init__()
        self.is_gated, self.first, self.last = is_gated, nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, features):
        first = self.first(features)
        return self.last(nn.functional.glu(first)) if self.is_gated else (first, self.last(features))


def test_heads_side_by_side_are_ambiguous():
    def ran(heads):
        module = wrapped(body=nn.Linear(3, 4), heads=heads)
        return find_head(module, probe=lambda: module.heads(module.body(torch.rand(1, 3)))).path

    with pytest.raises(lt.TransferConfigError, match=r"ambiguous: heads.first, heads.last. Pass one"):
        ran(Heads(is_gated=False))
    assert ran(Heads(is_gated=True)) == "heads.last"
    tasks = {"colour": nn.Linear(4, 3), "shape": nn.Sequential(nn.ReLU(), nn.Linear(4, 2))}
    for heads in (nn.ModuleDict(tasks), nn.ModuleList(tasks.values())):
        module = wrapped(body=nn.Linear(3, 4), heads=heads)
        for name in ("auto", "heads"):
            with pytest.raises(lt.TransferConfigError, match=r"ambiguous: heads\.\w+, heads\.\w+\.1. Pass one"):
                find_head(module, name)
    assert find_head(wrapped(head=nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]))).path == "head.2"


@pytest.mark.parametrize(("narrow", "path"), [(True, "net.classifier.1"), (False, "net.classifier")])
def test_a_container_is_narrowed_or_taken_whole(narrow, path):
    module = wrapped(net=wrapped(body=nn.Linear(2, 2), classifier=nn.Sequential(nn.Dropout(), nn.Linear(2, 3))))
    assert find_head(module, narrow=narrow).path == path


def test_a_lazy_head_that_has_not_run_is_refused_by_name():
    with pytest.raises(lt.TransferConfigError, match="LazyLinear, whose width is not known before it has run"):
        in_width(find_head(wrapped(net=wrapped(body=nn.Linear(2, 2), fc=nn.LazyLinear(3)))).module)


def test_parts_of_ours_are_no_candidates():
    module = wrapped(model=ToyNet(), lightning_transfer_x=TrainingOnly("X", wrapped(head=nn.Linear(2, 2))))
    assert find_head(module).path == "model.fc"


def test_a_probe_that_fails_tells_nothing():
    module = wrapped(a=nn.Linear(2, 2))
    with pytest.raises(lt.TransferConfigError, match="not sure to be 'a'"):
        find_head(module, probe=lambda: module(1))


class OfBatch(nn.Module):
    """Takes a batch, and holds a network in which no name says what the head is."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, batch):
        images, _ = batch
        return self.net(images)


class OfImages(OfBatch):
    """Takes images."""

    def forward(self, images):
        return self.net(images + torch.rand(()))


@pytest.mark.parametrize("build", [OfBatch, OfImages])
@pytest.mark.parametrize("probe", [None, lambda: 1 / 0])
def test_without_an_example_or_with_one_that_fails_a_blank_picture_runs(build, probe):
    module = build()
    state = torch.get_rng_state()
    assert find_head(module, probe=probe).path == "net.4"
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(child._forward_hooks for child in module.modules())


def test_has_forward():
    class Steps(LitToy):
        forward = nn.Module.forward

    assert has_forward(LitToy())
    assert has_forward(PlToy())
    assert not has_forward(Steps())


def test_images_go_to_what_can_be_called():
    class Steps(L.LightningModule):
        def __init__(self, **children):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    class Whole(Steps):
        def forward(self, images):
            return self.head(self.body(images))

    def found(module):
        return entry_of(module, find_head(module))

    apart = {"body": nn.Linear(3, 2), "head": nn.Linear(2, 2)}
    assert found(Whole(**apart)) == ""
    assert found(Steps(**apart)) == "body"
    assert found(Steps(model=ToyNet())) == "model"
    with pytest.raises(lt.TransferConfigError, match=r"beside the head 'head'; found: body, other.*forward of Steps"):
        found(Steps(**apart, other=nn.Linear(1, 1)))
    with pytest.raises(lt.TransferConfigError, match="'nets', a ModuleDict, takes no images"):
        found(Steps(nets=nn.ModuleDict(apart)))
