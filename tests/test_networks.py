"""Which networks timm makes by name, and which take pictures of one size only."""

import timm
import torch
from torch import nn

from lightning_transfer.networks import timm_name
from lightning_transfer.tracing import required_size, run_on_a_picture

VIT = {"img_size": 64, "depth": 1}


def made(name="test_resnet", config=None, **options):
    network = timm.create_model(name, **options)
    if config is not None:
        network.pretrained_cfg = config(network.pretrained_cfg)
    return network


def test_a_name_is_of_a_network_that_timm_makes_by_it_whole():
    class Mine(type(made())):
        pass

    subclass = made()
    subclass.__class__ = Mine
    assert timm_name(made()) == timm_name(torch.compile(made())) == "test_resnet"
    assert timm_name(made(num_classes=0)) == timm_name(made(config=lambda old: {**old, "mean": (0, 0, 0)}))
    for network in (
        made(features_only=True),
        made("test_vit", features_only=True),
        made(config=lambda old: {"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1)}),
        nn.Sequential(made()),
        subclass,
        nn.Linear(2, 2),
    ):
        assert timm_name(network) is None


def test_a_size_is_required_only_by_a_network_that_refuses_others():
    vit = "vit_tiny_patch16_224"
    assert required_size(made(vit, **VIT)) == (64, 64)
    assert required_size(made(vit, config=lambda old: {**old, "input_size": (3, 96, 96)}, **VIT)) == (64, 64)
    for network in (made(vit, dynamic_img_size=True, **VIT), made(), nn.Sequential(made(vit, **VIT))):
        assert required_size(network) is None


def test_a_network_of_a_size_of_its_own_runs_on_a_picture_of_it():
    network = made("vit_tiny_patch16_224", img_size=(48, 80), depth=1, num_classes=5)
    assert run_on_a_picture(network).shape == (1, 5)
