"""Other networks beside a backbone whose head stands apart: which images they get, and that nothing is left of it."""

import copy
import pickle
import threading
import weakref
from functools import partial

import lightning.pytorch as L
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_transfer as lt
from lightning_transfer.functional import apply_collaborative, remove_collaborative
from lightning_transfer.glue.trials import Trials
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights


class Apart(LitToy):
    """Backbone and head beside each other, and what a project does between them."""

    def __init__(self, backbone=None):
        super().__init__()
        del self.model
        torch.manual_seed(7)
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
        self.backbone = backbone or made
        self.fc = nn.Linear(6, toys.TARGET_CLASSES)

    def features(self, pixels):
        return F.normalize(self.backbone(pixels).mean((2, 3)), dim=1)

    def forward(self, pixels):
        return self.fc(self.features(pixels))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def joined(module=None, **options):
    module = module or Apart()
    apply_collaborative(module, [toys.OtherNet()], **options)
    return module


def together(**options):
    return lt.CollaborativeFinetuning([toys.OtherNet()], **options)


def by_hand(plain, other, images):
    """Logits of both networks in float64, and their mean."""
    plain, other = plain.double().eval(), other.double().eval()
    own = plain.fc(F.normalize(plain.backbone(images.double()).mean((2, 3)), dim=1))
    return torch.stack([own, other(images.double())])


def test_gives_the_mean_of_its_own_logits_and_of_the_others_on_the_same_images():
    module, images = joined().eval(), torch.randn(5, 3, 6, 6)
    expected = by_hand(Apart(), module.fc.member("source1"), images)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(module.double()(images.double()), expected.mean(0), atol=1e-14, rtol=1e-14)


def test_one_alone_the_best_and_the_module_without_the_others():
    module, plain = joined().eval(), Apart().eval()
    images, labels = toys.target_data().tensors
    expected = by_hand(copy.deepcopy(plain), module.fc.member("source1"), images).argmax(2)
    module.train()
    assert module.fc.measure([(images, labels)]) == pytest.approx(
        {name: (says == labels).double().mean().item() for name, says in zip(("own", "source1"), expected, strict=True)}
    )
    alone = module.fc.member("own")
    assert torch.equal(alone.eval()(images), plain(images))
    assert list(alone.state_dict()) == list(plain.state_dict())
    assert type(module.fc.best_member([(images, expected[1])])) is toys.OtherNet
    assert type(module.fc.best_member([(images, expected[0])])) is Apart
    with pytest.raises(lt.TransferConfigError, match=r"apart.*ensemble\.member\('source1'\)"):
        remove_collaborative(module, "source1")
    remove_collaborative(module)
    for network in (module, alone):
        assert type(network.fc) is nn.Linear
        assert not any(child._forward_pre_hooks for child in network.modules())


class Steps(Apart):
    """A training step written out, to be varied."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch[0]), batch[1])


class OfAnotherView(Steps):
    def logits(self, pixels):
        features, _ = self.features(pixels), self.features(pixels.flip(3))
        return self.fc(features)


class OfTwoViews(Steps):
    def logits(self, pixels):
        both = self.features(pixels), self.features(pixels.flip(3))
        return (self.fc(both[0]) + self.fc(both[1])) / 2


class OfViewsInARow(Steps):
    def logits(self, pixels):
        features = self.features(pixels)
        return self.fc(torch.cat([features, features]))[: len(pixels)]


class HeadTwice(Steps):
    def logits(self, pixels):
        features = self.features(pixels)
        return self.fc(features) + self.fc(features)


class CheckpointedHead(Steps):
    def logits(self, pixels):
        return checkpoint(self.fc, self.features(pixels), use_reentrant=False)


class OfTokens(Steps):
    def logits(self, pixels):
        return self.fc(self.backbone(pixels).flatten(2).transpose(1, 2)).mean(1)


class OfADict(Steps):
    def __init__(self):
        class OfDicts(nn.Sequential):
            def forward(self, given):
                return super().forward(given["pixels"] if isinstance(given, dict) else given)

        super().__init__(OfDicts(nn.Conv2d(3, 6, 3)))

    def logits(self, pixels):
        return self.fc(self.backbone({"pixels": pixels}).mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (OfAnotherView, r"ran 2 times before its head took 4 features, last on \(4, 3, 6, 6\)"),
        (OfTwoViews, "ran 2 times"),
        (OfViewsInARow, r"ran 1 times before its head took 8 features, last on \(4, 3, 6, 6\)"),
        (HeadTwice, "ran 0 times before its head took 4 features"),
        (CheckpointedHead, "ran 0 times.*checkpoint the head alone"),
        (OfTokens, r"own gives \(4, 4, 5\)"),
        (OfADict, "last on dict"),
    ],
)
def test_images_are_never_paired_with_the_features_of_others(module, found):
    class Stepless(module):
        def on_before_optimizer_step(self, optimizer):
            raise AssertionError("it has stepped")

    fit(module(), [lt.CollaborativeFinetuning([])])  # alone, nothing is paired
    user = Stepless()
    with pytest.raises(lt.TransferConfigError, match=rf"{found}.*self\.model = torch\.nn\.Sequential"):
        fit(user, [together()])
    assert user.fc.passes.leave() == (None, 0)
    remove_collaborative(user)
    assert list(user.state_dict()) == list(module().state_dict())


def test_threads_that_share_a_module_do_not_get_each_others_images():
    module, images = joined().eval(), torch.randn(2, 5, 3, 6, 6)
    expected = [module(each) for each in images]
    features = module.features(images[0])
    found = []
    other = threading.Thread(target=lambda: found.append(module(images[1])))
    other.start(), other.join()
    assert torch.equal(module.fc(features), expected[0])
    assert torch.equal(found[0], expected[1])


def test_images_that_a_backward_recomputes_are_not_those_of_a_later_head():
    def gradients(run):
        module = joined().eval()
        for images in torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0)):
            module.fc(run(module, images)).square().sum().backward()
        return module, [param.grad for param in module.parameters()]

    _, expected = gradients(Apart.features)
    module, found = gradients(lambda module, images: checkpoint(module.features, images, use_reentrant=False))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    with pytest.raises(lt.TransferConfigError, match="ran 0 times before its head took 4 features"):
        module.fc(torch.randn(4, 6))


def test_the_cure_that_is_named_works():
    class Cured(LitToy):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(Apart().backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    module = Cured()
    fit(module, [together()])
    assert module.model.names == ["own", "source1"]


def test_features_alone_are_forgotten_with_the_next_call_of_the_module():
    module, plain = joined(), joined()
    images = torch.randn(4, 3, 6, 6)
    for _ in range(3):
        module.eval().features(torch.randn(4, 3, 6, 6))
    assert torch.equal(module(images), plain.eval()(images))


def test_no_image_is_held_after_a_step_nor_by_a_copy():
    class Watched(Apart):
        seen = None

        def training_step(self, batch, batch_idx):
            loss, images = super().training_step(batch, batch_idx), batch[0].clone()
            self.features(images)  # of which the head takes nothing
            self.seen = weakref.ref(images)
            return loss

        def on_train_batch_start(self, batch, batch_idx):
            assert self.seen is None or self.seen() is None

        on_train_epoch_end = lambda self: self.on_train_batch_start(None, 0)  # noqa: E731

    fit(Watched(), [together()])
    module = joined()
    module.features(torch.randn(4, 3, 6, 6))
    twin = copy.deepcopy(module)
    assert module.fc.passes.leave()[1] == 1
    assert twin.fc.passes.leave() == (None, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_the_same_and_apart_from_the_first(copied):
    module, images = joined(frozen_layers={"own": 1, "source1": 1}).eval(), torch.randn(4, 3, 6, 6)
    expected, twin = module(images), copied(module)
    assert torch.equal(twin(images), expected)
    remove_collaborative(twin)
    assert type(twin.backbone[1]) is nn.BatchNorm2d
    assert all(param.requires_grad for param in twin.parameters())
    assert not twin.backbone._forward_pre_hooks
    assert torch.equal(module(images), expected)
    assert module.fc.frozen == {"own": 1, "source1": 1}


def test_layers_are_frozen_from_the_backbones_input_on():
    module, before = joined(frozen_layers={"own": 1}), weights(Apart())
    fit(module, max_epochs=1)
    moved = {name for name, value in weights(module).items() if name in before and (value != before[name]).any()}
    assert moved == {"backbone.3.weight", "backbone.3.bias"}
    assert {name: len(depths.convs) for name, depths in module.fc.depths().items()} == {"own": 2, "source1": 2}
    with pytest.raises(lt.TransferConfigError, match="of its 2 convolutions at most 1"):
        module.fc.freeze({"own": 2})


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("how", ["module", "backbone", "backbone in place", "head in place"])
def test_compiled_it_trains_the_same(how):
    plain, module = Apart(), Apart()
    if how == "backbone":
        module.backbone = torch.compile(module.backbone, backend="eager")
    elif how != "module":
        module.get_submodule("fc" if "head" in how else "backbone").compile(backend="eager")
    runner = torch.compile(module, backend="eager") if how == "module" else module
    for each in (plain, runner):
        each(toys.target_data().tensors[0][:4])  # graphs of before know of no images that enter
        fit(each, [together()], max_epochs=1)
    found = {name.replace("_orig_mod.", ""): value for name, value in weights(module).items()}
    numbers = {name: value for name, value in weights(plain).items() if "extra" not in name}
    assert_same({name: found[name] for name in numbers}, numbers, 1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_checkpointed_activations_train_the_same(whole):
    class Checkpointed(Apart):
        def forward(self, pixels):
            run = super().forward if whole else self.features
            given = checkpoint(run, pixels, use_reentrant=False)
            return given if whole else self.fc(given)

    plain, module = Apart(), Checkpointed()
    plain.backbone[1], module.backbone[1] = nn.Identity(), nn.Identity()  # it runs twice, so its statistics move twice
    fit(plain, [together(frozen_layers={"source1": 1})])
    fit(module, [together(frozen_layers={"source1": 1})])
    assert_same(weights(module), weights(plain))


def test_parameters_of_the_head_are_the_heads_and_new_ones_join_their_neighbors():
    class Groups(Apart):
        def configure_optimizers(self):
            self.groups = [{"params": [*self.backbone.parameters()], "lr": 0.01}, {"params": [*self.fc.parameters()]}]
            return torch.optim.SGD(self.groups, lr=0.3)

    module = Groups()
    fit(module, [together()], max_steps=1)
    names = {id(param): name for name, param in module.named_parameters()}
    body, head = ({names[id(param)] for param in group["params"]} for group in module.groups)
    parts = {f"fc.members.{name}" for name in ("own.network", "source1.network.fc")}
    assert head == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert "fc.members.source1.network.conv1.weight" in body
    assert body | head == {*names.values()}


def test_a_backbone_that_embeds_is_not_taken_for_the_classifier():
    class Embedding(Apart):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)))

        def features(self, pixels):
            return self.backbone(pixels)

    assert type(joined(Embedding()).fc) is lt.nn.CollaborativeEnsemble


@pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance")
def test_checkpoints_build_the_networks_again_and_hold_no_hook(tmp_path):
    class Saved(Apart):
        def __init__(self, backbone=None):
            super().__init__(backbone)
            self.save_hyperparameters()

    module = Saved(Apart().backbone)
    callbacks = [lt.CollaborativeFinetuning([timm.create_model("resnet10t")]), toys.SaveEveryStep(tmp_path)]
    runner = fit(module, callbacks, max_steps=1)
    runner.save_checkpoint(tmp_path / "after.ckpt")
    images = torch.randn(2, 3, 32, 32)
    for name in ("step=1", "after"):
        file = tmp_path / f"{name}.ckpt"
        kept = torch.load(file, weights_only=False)["hyper_parameters"]["backbone"]
        assert not kept._forward_pre_hooks
        loaded = lt.load_from_checkpoint(Saved, file, weights_only=False, backbone=None)
        assert_same(weights(loaded), weights(module))
        assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert len(module.backbone._forward_pre_hooks) == 1


def test_a_search_counts_the_backbones_layers_and_scores_by_the_module():
    callback = together(search=lt.LayerSearch(particles=1, iterations=0, proxy_epochs=1))
    module = Apart()
    fit(module, [callback], max_epochs=1)
    assert callback.plan.num_layers == {"own": 2, "source1": 2}
    assert all(each.accuracy is not None for each in callback.plan.evaluations)


class WithoutForward(Apart):
    """Runs backbone and head in its steps only."""

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.fc(self.features(batch[0])), batch[1])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_search_needs_a_forward_and_says_so_before_candidates_are_trained(monkeypatch, ahead):
    monkeypatch.setattr(Trials, "train", lambda *_, **options: pytest.fail("a candidate was trained"))
    callback = together(search=lt.LayerSearch(particles=1, iterations=0, proxy_epochs=1))
    module = WithoutForward()
    options = {"trainer": {"accelerator": "cpu"}}
    run = partial(callback.search.run, module, toys.target_loader(), together(), **options)
    with pytest.raises(lt.TransferConfigError, match=r"WithoutForward has no forward.*def forward\(self, images\)"):
        run() if ahead else fit(module, [callback], max_epochs=1)
    assert type(module.fc) is nn.Linear
    fit(module, [together()], max_steps=1)  # without a search it trains
