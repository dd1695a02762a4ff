"""Networks side by side: any make, each alone again, in every way a step can run."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader

import lightning_transfer as lt
from lightning_transfer.functional import apply_collaborative, remove_collaborative
from lightning_transfer.nn import CollaborativeEnsemble
from lightning_transfer.surgery import structures_in
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights

pytestmark = pytest.mark.usefixtures("thin_resnets")


class Holder(nn.Module):
    def __init__(self, name="resnet10t", **options):
        super().__init__()
        self.model = timm.create_model(name, num_classes=3, **options)


def held(*sources, name="resnet10t", **options):
    torch.manual_seed(0)
    module = Holder(name)
    apply_collaborative(module, list(sources), backbone="model", **options)
    return module.model.eval()


def test_gives_the_mean_of_logits():
    ensemble = held(timm.create_model("resnet14t"), toys.OtherNet())
    images = torch.randn(4, 3, 64, 64)
    expected = sum(member.network(images).double() for member in ensemble.members.values()) / 3
    torch.testing.assert_close(ensemble(images).double(), expected)


def test_heads_are_new_and_the_rest_is_copied():
    source = timm.create_model("resnet18", num_classes=7)
    before = weights(source)
    ensemble = held(source)
    theirs = ensemble.members.source1.network
    assert theirs.get_classifier().out_features == theirs.num_classes == 3
    found = weights(theirs)
    assert_same({k: v for k, v in found.items() if "fc" not in k}, {k: v for k, v in before.items() if "fc" not in k})
    assert_same(weights(source), before)
    again = held(source)
    assert_same(weights(again), weights(ensemble))  # new weights are the same in every process


def test_two_of_a_kind_do_not_start_alike():
    source = timm.create_model("resnet10t", num_classes=7)
    ensemble = held(source, source)
    heads = [ensemble.members[name].network.fc.weight for name in ("source1", "source2")]
    assert not torch.equal(*heads)


def test_a_network_that_takes_one_size_is_given_it():
    module = LitToy()
    module.model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1)
    lt.functional.apply_collaborative(module, [timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)])
    assert module.model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_pictures_are_normalised_and_sized_as_each_network_knows_them():
    vit = timm.create_model("vit_tiny_patch16_224")
    larger = timm.create_model("resnet18")
    larger.pretrained_cfg = {**larger.pretrained_cfg, "input_size": (3, 288, 288)}
    ensemble = held(vit, larger)
    seen = {}
    for name, member in ensemble.members.items():
        member.network.register_forward_pre_hook(lambda network, args, name=name: seen.update({name: args[0]}))
    pixels = torch.rand(2, 3, 96, 96)
    config, theirs = (
        ensemble.model_config if False else timm.create_model("resnet10t").pretrained_cfg,
        vit.pretrained_cfg,
    )

    def normalised(values, config):
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        return (values - mean) / std

    ensemble(normalised(pixels, config))
    torch.testing.assert_close(seen["own"], normalised(pixels, config))
    resized = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen["source1"], normalised(resized, theirs), atol=1e-5, rtol=1e-5)
    assert seen["source2"].shape[-1] == round(96 * 288 / config["input_size"][-1])


def test_grey_images_are_normalised_by_the_mean_of_the_colours_statistics():
    module = Holder(in_chans=1)
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1, img_size=32)
    apply_collaborative(module, [vit], backbone="model")
    member = module.model.members.source1
    networks = module.model.members.own.network, vit
    mine, theirs = ([np.mean(each.pretrained_cfg[key]) for key in ("mean", "std")] for each in networks)
    pixels = np.array([0.0, 1.0])
    found = (pixels - mine[0]) / mine[1] * member.scale.item() + member.shift.item()
    assert found == pytest.approx((pixels - theirs[0]) / theirs[1], rel=1e-5)
    assert module.model(torch.rand(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.resnet18,
        torchvision.models.densenet121,
        partial(torchvision.models.vgg11, init_weights=False),
        partial(timm.create_model, "convnext_atto"),
        partial(timm.create_model, "efficientnet_b0"),
        partial(timm.create_model, "resnetv2_50"),
    ],
)
def test_networks_of_any_make_join(make):
    ensemble = held(make(), frozen_layers={"source1": 3}).train()
    images = torch.randn(2, 3, 64, 64)
    assert ensemble(images).shape == (2, 3)
    alone = ensemble.member("source1")
    assert all(param.requires_grad for param in alone.parameters())
    assert not any(type(layer).__name__ == "FrozenNorm" for layer in alone.modules())
    with torch.no_grad():
        expected = ensemble.eval().members.source1(images)
        torch.testing.assert_close(alone.eval()(images), expected)


def test_one_alone_is_a_plain_network_that_loads_strictly():
    module = Holder()
    own = module.model
    apply_collaborative(module, {"places": timm.create_model("resnet14t")}, backbone="model", frozen_layers={"own": 4})
    for name in ("own", "places"):
        twin = module.model.member(name)
        plain = timm.create_model("resnet10t" if name == "own" else "resnet14t", num_classes=3)
        plain.load_state_dict(twin.state_dict(), strict=True)
    with pytest.raises(lt.TransferConfigError, match="Did you mean 'places'"):
        module.model.member("place")
    remove_collaborative(module)
    assert module.model is own
    with pytest.raises(lt.TransferConfigError, match="nothing to remove"):
        remove_collaborative(module)


def test_the_best_is_the_one_that_validation_or_a_loader_says():
    def constant(label):
        network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        nn.init.zeros_(network[3].weight)
        network[3].bias.data = F.one_hot(torch.tensor(label), 3).float()
        return network

    ensemble = CollaborativeEnsemble({"zero": constant(0), "two": constant(2)})
    with pytest.raises(lt.TransferConfigError, match=r"ensemble\.best_member\(loader\)"):
        ensemble.best_member()
    batches = [(torch.rand(4, 3, 5, 5), torch.tensor([2, 2, 1, 0])), (torch.rand(1, 3, 5, 5), torch.tensor([2]))]
    assert ensemble.measure(batches) == pytest.approx({"zero": 1 / 5, "two": 3 / 5})
    loader, before = DataLoader([(torch.rand(3, 5, 5), 2)]), torch.get_rng_state()
    ensemble.measure(loader)
    assert torch.equal(torch.get_rng_state(), before)
    best = ensemble.best_member(batches)
    assert best(torch.rand(1, 3, 5, 5)).argmax().item() == 2


def test_in_fit_each_networks_accuracy_is_that_of_the_last_validation():
    module = LitToy()
    runner = toys.trainer([lt.CollaborativeFinetuning({"other": toys.OtherNet()})])
    runner.fit(module, toys.target_loader(), toys.target_loader(5))
    images, labels = toys.target_data().tensors
    expected = {
        name: (member(images).argmax(1) == labels).float().mean().item()
        for name, member in module.eval().model.members.items()
    }
    assert module.model.accuracies == pytest.approx(expected)
    assert runner.callback_metrics["transfer/val_accuracy/other"] == pytest.approx(expected["other"])
    remove_collaborative(module, "best")
    assert type(module.model) is (toys.OtherNet if expected["other"] > expected["own"] else toys.ToyNet)


def test_a_try_before_training_is_no_validation():
    module = LitToy()
    runner = toys.trainer([lt.CollaborativeFinetuning([toys.OtherNet()])], num_sanity_val_steps=2, max_steps=1)
    runner.fit(module, toys.target_loader(), toys.target_loader())
    assert module.model.accuracies == {}
    assert "transfer/val_accuracy/own" not in runner.callback_metrics


def test_networks_that_differ_in_a_number_only_are_not_taken_for_each_other(tmp_path):
    class Scaled(toys.OtherNet):
        def __init__(self, factor=1.0):
            super().__init__()
            self.factor = factor

        def forward(self, pixels):
            return super().forward(self.factor * pixels)

    class Lit(LitToy):
        def __init__(self):
            super().__init__()
            self.model = Scaled()
            self.model.fc = nn.Linear(7, 5)

    fit(Lit(), [lt.CollaborativeFinetuning([Scaled(-3.0)]), toys.SaveEveryStep(tmp_path)], max_steps=1)
    with pytest.raises(lt.TransferConfigError, match="neither timm's nor made as your own"):
        lt.load_from_checkpoint(Lit, tmp_path / "step=1.ckpt")


def test_a_copy_pickle_or_checkpoint_is_the_same():
    module = Holder()
    apply_collaborative(
        module, [timm.create_model("resnet10t")], backbone="model", frozen_layers={"own": 3, "source1": 1}
    )
    images = torch.randn(2, 3, 64, 64)
    module.eval()
    expected = module.model(images)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.model(images), expected)
        before, mine = weights(module), twin.train().model.members.own.network
        twin.model(images)
        assert_same(weights(module), before)
        moved = {
            name
            for name, value in weights(mine).items()
            if (value != before[f"model.members.own.network.{name}"]).any()
        }
        assert moved
        assert not any(name.startswith(("conv1", "bn1")) for name in moved)  # these are frozen in a copy too
        twin.model.thaw()
        assert all(param.requires_grad for param in twin.parameters())
    state = module.state_dict()
    fresh = Holder()
    for path, spec in structures_in(state):
        CollaborativeEnsemble.rebuild(fresh, path, spec)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.eval().model(images), expected)
    assert fresh.model.frozen == {"own": 3, "source1": 1}


def test_timms_networks_are_built_from_a_checkpoint(tmp_path):
    class Lit(LitToy):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model("resnet10t", num_classes=toys.TARGET_CLASSES)

    module = Lit()
    fit(
        module,
        [lt.CollaborativeFinetuning([timm.create_model("resnet18")]), toys.SaveEveryStep(tmp_path)],
        max_epochs=1,
    )
    loaded = lt.load_from_checkpoint(Lit, tmp_path / "step=6.ckpt")
    assert_same(weights(loaded), weights(module))


def test_names_of_timms_are_loaded_with_pretrained_weights(monkeypatch):
    asked, real = [], timm.create_model

    def create_model(name, **options):
        asked.append((name, options))
        return real("resnet10t")

    monkeypatch.setattr(timm, "create_model", create_model)
    module = nn.ModuleDict({"model": real("resnet10t", num_classes=3)})
    apply_collaborative(module, ["resnet50.a1_in1k"], backbone="model")
    assert asked == [("resnet50.a1_in1k", {"pretrained": True})]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ("resnet18", {}, r"sources is a str.*CollaborativeFinetuning\(\[network\]\)"),
        ([3], {}, "source1 is an int"),
        ({"own": toys.OtherNet()}, {}, "'own' cannot name a source"),
        ({"a.b": toys.OtherNet()}, {}, "'a.b' cannot name a source"),
        ([toys.OtherNet()], {"weight": -1}, "weight=-1"),
        ([toys.OtherNet()], {"loss": "mse"}, "loss='mse'"),
        ([toys.OtherNet()], {"labels": 1}, "labels=1"),
        ([toys.OtherNet()], {"search": 5}, r"search=5; it takes a LayerSearch"),
        ([toys.OtherNet()], {"search": lt.LayerSearch(), "frozen_layers": {"own": 1}}, "not both"),
        ([toys.OtherNet()], {"frozen_layers": "missing.json"}, "There is no LayerPlan at missing.json"),
        ([toys.OtherNet()], {"frozen_layers": 4}, "frozen_layers=4; it takes counts by network"),
    ],
)
def test_wrong_options_are_refused_when_it_is_made(sources, options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.CollaborativeFinetuning(sources, **options)


class Headless(LitToy):
    """Features, and nothing that turns them into logits."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("module", "source", "options", "message"),
    [
        (
            LitToy,
            toys.OtherNet(),
            {"frozen_layers": {"other": 1}},
            "no network is called 'other'. Known: 'own', 'source1'",
        ),
        (LitToy, toys.OtherNet(), {"frozen_layers": {"source1": 2}}, "of its 2 convolutions at most 1 can be frozen"),
        (LitToy, toys.OtherNet(), {"frozen_layers": {"source1": -1}}, r"frozen_layers\['source1'\]=-1"),
        (
            LitToy,
            nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            {},
            "1 chan",
        ),
        (LitToy, nn.Conv2d(3, 4, 1), {}, "source1, a Conv2d, has to be an image classifier.*No classifier found"),
        (
            LitToy,
            toys.OtherNet(),
            {"backbone": "mdl"},
            "backbone='mdl' is not a module of LitToy. Did you mean 'model'",
        ),
        (Headless, toys.OtherNet(), {}, r"'model' of Headless gives no logits.*self\.model = network.*No classifier"),
    ],
)
def test_what_cannot_be_joined_is_named_and_the_module_is_as_found(module, source, options, message):
    module = module()
    before = [(name, type(child)) for name, child in module.named_modules()]
    with pytest.raises(lt.TransferConfigError, match=message):
        fit(module, [lt.CollaborativeFinetuning([source], **options)])
    assert [(name, type(child)) for name, child in module.named_modules()] == before
    assert all(param.requires_grad for param in module.parameters())


def test_a_network_that_gives_more_than_logits_in_training_is_named():
    class Two(toys.OtherNet):
        def forward(self, pixels):
            logits = super().forward(pixels)
            return (logits, logits) if self.training else logits

    with pytest.raises(lt.TransferConfigError, match="source1 gives a tuple; expected .*aux_logits=False"):
        fit(LitToy(), [lt.CollaborativeFinetuning([Two()])])
    with pytest.raises(lt.TransferConfigError, match=r"timm has no model 'resnet10x'\. Did you mean"):
        lt.CollaborativeFinetuning([Two(), "resnet10x"])


def test_a_network_that_is_called_with_more_than_images_is_named():
    """As those of the library transformers: `self.model(pixel_values=images, labels=labels)`."""

    class Named(LitToy):
        def forward(self, pixels):
            return self.model(pixel_values=pixels, labels=None)

    class Two(LitToy):
        def forward(self, pixels):
            return self.model(pixels, None)

    for module, called in ((Named(), "pixel_values, labels"), (Two(), "2 arguments")):
        with pytest.raises(
            lt.TransferConfigError, match=rf"is called with {called}; of several, each takes the images alone"
        ):
            fit(module, [lt.CollaborativeFinetuning([toys.OtherNet()])])


def test_removal_measures_all_networks_before_and_the_kept_one_after():
    module = LitToy()
    apply_collaborative(module, [toys.OtherNet()])
    own, other = (module.model.member(name).eval() for name in module.model.names)
    images = [3 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    loader = [(some, other(some).argmax(1)) for some in images]
    both = sum(int(((own(some) + other(some)).argmax(1) == labels).sum()) for some, labels in loader) / 24
    removal = remove_collaborative(module, "source1", loader=loader)
    assert (removal.accuracy_before, removal.accuracy_after) == (both, 1.0)
    assert both < 1
