"""Which networks timm makes by name, and which take pictures of one size only."""

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

import lightning_transfer as lt
from lightning_transfer.networks import timm_name
from lightning_transfer.tracing import required_size, run_on_a_picture
from tests import toys

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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet5O", "timm has no model 'resnet5O'. Did you mean 'resnet50'"),
        ("resnet50.a1_in1K", "Did you mean 'resnet50.a1_in1k'"),  # timm knows the architecture
        ("timm/resnet10t.c3_in1k", "Did you mean 'resnet10t.c3_in1k'"),
        ("my_networks/mine", "timm.list_models(pretrained=True) lists all. A folder is named 'local-dir:FOLDER'."),
        ("seresnet18", "timm has no weights for 'seresnet18'"),
    ],
)
@pytest.mark.parametrize(
    "given",
    [
        lambda name: lt.SourceTask.from_timm(name, toys.source_data()),
        lambda name: lt.SoftFinetuning({"from_timm": name, "dataset": toys.source_data()}),
        lambda name: lt.CollaborativeFinetuning(["resnet10t", name]),
        lambda name: lt.rank_networks(["resnet10t", name], toys.source_data()),
    ],
    ids=["source", "mapping", "sources", "rank"],
)
def test_a_name_that_timm_does_not_have_is_refused_before_anything_is_loaded(name, said, given, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a network was loaded"))
    with pytest.raises(lt.TransferConfigError) as refused:
        given(name)
    assert said in str(refused.value)


def test_without_internet_the_message_names_the_folder_that_takes_its_place(monkeypatch):
    def offline(*args, **options):
        raise LocalEntryNotFoundError("Please check your connection.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(lt.TransferConfigError, match="your connection. Without internet, .*'local-dir:FOLDER'"):
        lt.rank_networks(["resnet10t"], [(torch.zeros(3, 8, 8), label % 2) for label in range(8)])


def test_what_the_message_says_writes_the_folder(tmp_path):
    network = made()
    timm.models.save_for_hf(network, tmp_path / "net")
    assert (lt.networks.loaded(f"local-dir:{tmp_path / 'net'}").fc.weight == network.fc.weight).all()
