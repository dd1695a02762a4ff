"""What a pretrained network says of the target's images: the loss, the annealing, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_transfer as lt
from lightning_transfer.functional import knowledge_loss
from lightning_transfer.methods.soft.knowledge import normalize_alike
from tests import toys
from tests.toys import LitToy, SaveEveryStep, StatefulLoader, assert_same, fit, weights

GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own


def pretrained():
    network = toys.toy_net()
    network.fc = toys.source_head()
    return network


def keeping(network=None, weight=0.5, mix="add", **options):
    return lt.SoftFinetuning(lt.SourceKnowledge(network or pretrained(), **options), weight=weight, mix=mix)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_loss_is_the_formula(temperature):
    draw = np.random.default_rng(0)
    logits, other = draw.normal(size=(2, 6, 4)) * 3
    total = 0.0
    for mine, kept in zip(logits, other, strict=True):
        said, wanted = (np.exp(one / temperature) / np.exp(one / temperature).sum() for one in (mine, kept))
        total += sum(two * (np.log(two) - np.log(one)) for one, two in zip(said, wanted, strict=True))
    found = knowledge_loss(torch.tensor(logits), torch.tensor(other), temperature=temperature)
    assert float(found) == pytest.approx(temperature**2 * total / 6, rel=1e-12)


class Frozen(LitToy):
    """Its BatchNorm uses the statistics that it has kept."""

    def on_train_batch_start(self, *_):
        self.model.bn.eval()


class Scaled(nn.Module):
    def forward(self, pixels):
        return (pixels - 3) / 5


class ScaledBefore(LitToy):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Scaled(), self.model)


class ScaledInside(LitToy):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Scaled(), self.model, nn.Linear(toys.WIDTH, toys.TARGET_CLASSES))
        self.model[1].fc = nn.Identity()


class WithTeacher(LitToy):
    def __init__(self):
        super().__init__()
        self.teacher = toys.toy_net()

    def forward(self, pixels):
        return self.model(pixels / 5)


class Compiled(LitToy):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")


@GRAD
@pytest.mark.parametrize(
    ("module", "head"),
    [
        (LitToy, "auto"),
        (Frozen, "auto"),
        (ScaledBefore, "auto"),
        (ScaledInside, "auto"),
        (WithTeacher, "model.fc"),
        (Compiled, "auto"),
    ],
)
def test_nothing_is_forgotten_before_the_first_step(module, head):
    """The pretrained network gets what the network gets, after what the module does with the images, and normalises
    it alike."""
    callback = lt.SoftFinetuning(lt.SourceKnowledge(pretrained()), weight=1.0, head=head)
    runner = fit(module(), [callback], max_steps=1)
    assert abs(float(runner.callback_metrics["transfer/knowledge_loss"])) < 1e-6


def test_a_pretrained_batchnorm_uses_the_batch_as_that_of_the_network_does_and_keeps_its_own():
    kept, network, images = pretrained().eval(), pretrained(), toys.target_data().tensors[0]
    normalize_alike(kept, network)
    assert torch.equal(kept(images), network(images))
    assert_same(kept.state_dict(), pretrained().state_dict())
    for other in (network.bn.eval(), nn.GroupNorm(2, toys.WIDTH)):
        network.bn = other
        normalize_alike(kept, network)
        assert torch.equal(kept(images), pretrained().eval()(images))


def test_an_annealed_weight_ends_and_frees_the_pretrained_network():
    """The first two steps by hand, the others plain."""
    module = LitToy()
    callback = keeping(weight=lt.Schedule(until_steps=2))
    fit(module, [callback], max_steps=4)
    assert callback.part._pretrained == ()
    assert callback.part.head.training  # of a part in eval mode Lightning warns
    net, kept, old = toys.toy_net(), toys.source_head(), pretrained()  # normalises by the batch
    optimizer = torch.optim.SGD([*net.parameters(), *kept.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-3)
    images, labels = toys.target_data().tensors
    for step, weight in enumerate((1.0, 0.5, 0.0, 0.0)):
        rows = slice(4 * step, 4 * step + 4)
        features = net.features(images[rows])
        loss = F.cross_entropy(net.fc(features), labels[rows])
        if weight:
            said, wanted = kept(features) / 2, (old(images[rows]).detach() / 2).softmax(1)
            loss = loss + weight * 4 * ((wanted.log() - said.log_softmax(1)) * wanted).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = weights(module)
    assert_same(
        {name: found[f"model.{name}"] for name in dict(net.named_parameters())}, dict(net.named_parameters()), 1e-5
    )


def test_a_run_leaves_the_networks_as_they_are():
    network = pretrained()
    before = copy.deepcopy(network.state_dict())
    knowledge = lt.SourceKnowledge(network)
    mine = copy.deepcopy(knowledge.pretrained.state_dict())
    module = LitToy()
    fit(module, [lt.SoftFinetuning(knowledge)])
    assert_same(network.state_dict(), before)
    assert all(param.requires_grad for param in network.parameters())
    assert network.training
    assert_same(knowledge.pretrained.state_dict(), mine)
    assert not module.model._forward_pre_hooks
    assert not module.model.fc._forward_pre_hooks


def test_a_run_does_not_resume_with_another_pretrained_network(tmp_path):
    fit(LitToy(), [keeping(), SaveEveryStep(tmp_path)], loader=StatefulLoader(), max_steps=3)
    other = pretrained()
    with torch.no_grad():
        other.conv.weight += 1
    with pytest.raises(lt.TransferConfigError, match="pretrained network"):
        fit(LitToy(), [keeping(other)], loader=StatefulLoader(), ckpt_path=tmp_path / "step=2.ckpt")


def test_a_run_does_not_resume_with_the_other_kind_of_source(tmp_path):
    task = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    kinds = {"SourceKnowledge": keeping, "SourceTask": lambda: lt.SoftFinetuning(task, weight=0.5)}
    for theirs, mine in (kinds, [*kinds][::-1]):
        fit(LitToy(), [kinds[theirs](), SaveEveryStep(tmp_path)], max_epochs=1)
        with pytest.raises(lt.TransferConfigError, match=f"with a {theirs} and is resumed with a {mine}. Pass the old"):
            fit(LitToy(), [kinds[mine]()], ckpt_path=tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_timms_networks_are_held(name):
    network = timm.create_model(name, num_classes=7, in_chans=3, img_size=32 if "vit" in name else None)
    knowledge = lt.SourceKnowledge(as_if_trained(network))
    network.reset_classifier(toys.TARGET_CLASSES)

    class Lit(LitToy):
        def __init__(self):
            super().__init__()
            self.model = network

    module = Lit()
    images = torch.rand(8, 3, 32, 32)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.arange(8) % toys.TARGET_CLASSES), batch_size=4
    )
    runner = fit(module, [lt.SoftFinetuning(knowledge, weight=1.0)], loader=loader, max_steps=2)
    assert float(runner.callback_metrics["transfer/knowledge_loss"]) > 0


class Headless(LitToy):
    """The head apart from the backbone."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = self.model, self.model.fc
        self.backbone.fc = nn.Identity()
        del self.model

    def forward(self, pixels):
        return self.fc(self.backbone(pixels))


def test_a_head_apart_is_found_and_trains_as_one_inside():
    inside, apart = LitToy(), Headless()
    fit(inside, [keeping()])
    fit(apart, [keeping()])
    assert_same(dict(apart.fc.named_parameters()), dict(inside.model.fc.named_parameters()))


@GRAD
def test_a_compiled_network_that_was_trained_before_is_heard():
    plain, compiled = LitToy(), LitToy()
    compiled.model.compile(backend="eager")
    for module in (plain, compiled):
        module(torch.zeros(4, 3, 6, 6)).sum().backward()
        module.zero_grad()
        fit(module, [keeping()])
    assert_same(weights(compiled), weights(plain), 1e-6)


def test_a_network_is_copied_and_saved_in_a_step_as_without_the_callback():
    class Copying(LitToy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            twin = copy.deepcopy(self.model)
            twin(batch[0]).sum().backward()  # it is not heard
            self.__dict__["saved"] = pickle.dumps(twin)
            return loss

    copying, plain = Copying(), LitToy()
    fit(copying, [keeping()])
    fit(plain, [keeping()])
    assert_same(weights(copying), weights(plain))
    assert b"KnowledgeTerm" not in copying.saved


class Two(toys.ToyNet):
    """Predicts by the mean of two heads."""

    def __init__(self):
        super().__init__()
        self.fc, self.other = toys.source_head(), nn.Linear(toys.WIDTH, toys.SOURCE_CLASSES)

    def forward(self, pixels):
        features = self.features(pixels)
        return (self.fc(features) + self.other(features)) / 2


class Dicts(toys.ToyNet):
    def forward(self, pixels):
        return {"logits": super().forward(pixels)}


class OfDicts(LitToy):
    def __init__(self):
        super().__init__()
        self.model = Dicts()
        self.model.load_state_dict(toys.toy_net().state_dict())

    def forward(self, pixels):
        return self.model(pixels)["logits"]


def test_a_network_that_returns_a_dict_trains_as_any():
    plain, module = LitToy(), OfDicts()
    network = copy.deepcopy(module.model)
    network.fc = toys.source_head()
    fit(plain, [keeping()])
    fit(module, [keeping(network)])
    assert_same(weights(module), weights(plain))


class OneChannel(LitToy):
    def __init__(self):
        super().__init__()
        self.model.conv = nn.Conv2d(1, toys.WIDTH, 3)

    def forward(self, pixels):
        return self.model(pixels[:, :1])


def test_an_error_of_the_pretrained_network_says_where_it_is():
    with pytest.raises(RuntimeError, match="to have 3 channels") as failed:
        fit(OneChannel(), [keeping()])
    assert (
        "in the pretrained ToyNet, which was called with the inputs of the tuned network" in failed.value.__notes__[0]
    )


class Tokens(nn.Module):
    """Its classifier runs on each place, before the mean."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, toys.WIDTH, 3), nn.Linear(toys.WIDTH, toys.SOURCE_CLASSES)

    def forward(self, pixels):
        return self.fc(self.conv(pixels).flatten(2).mT).mean(1)


def test_a_classifier_of_places_is_refused():
    module = LitToy()
    module.model = Tokens()
    network = copy.deepcopy(module.model)
    module.model.fc = nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)
    with pytest.raises(lt.TransferConfigError, match=r"'fc' of the pretrained Tokens gave \(4, 16, 7\); expected one"):
        fit(module, [keeping(network)])


class Hidden(LitToy):
    """Two layers in place of the classifier, the last of which takes as many features."""

    def __init__(self):
        super().__init__()
        wide = nn.Linear(toys.WIDTH, toys.WIDTH)
        self.model.fc = nn.Sequential(wide, nn.ReLU(), nn.Linear(toys.WIDTH, toys.TARGET_CLASSES))


def test_a_head_after_other_new_layers_is_refused_and_the_whole_is_right():
    with pytest.raises(lt.TransferConfigError, match=r"head 'model.fc.2' takes the output of a Linear .* head='model"):
        fit(Hidden(), [keeping()])
    fit(Hidden(), [lt.SoftFinetuning(lt.SourceKnowledge(pretrained()), head="model.fc")])


class InPlace(toys.ToyNet):
    """Normalises the images that it is given themselves."""

    def forward(self, pixels):
        return super().forward(pixels.sub_(0.5).div_(2))


class AfterIts(LitToy):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            batch[0].zero_()
        return loss


@GRAD
@pytest.mark.parametrize("place", ["network", "step", "compiled"])
def test_images_that_are_changed_in_place_are_refused(place):
    """The pretrained network would get them changed; torch does not notice, since the first layer is frozen."""
    module, network = AfterIts() if place == "step" else LitToy(), None
    if place != "step":
        module.model = InPlace()
        module.model.load_state_dict(toys.toy_net().state_dict())
        network = copy.deepcopy(module.model)
        network.fc = toys.source_head()
    module.model.conv.requires_grad_(False)
    if place == "compiled":
        module.model.compile(backend="eager")
    with pytest.raises(lt.TransferConfigError, match="changed the images in place after they entered 'model'"):
        fit(module, [keeping(network)])


class Sum(LitToy):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(("mix", "fix"), [("add", "weight= times the batch size"), ("convex", "use mix='add'")])
def test_a_sum_is_refused_with_the_fix_for_its_mix(mix, fix):
    with pytest.raises(lt.TransferConfigError, match=f"a sum, or a mean times the batch size.* {fix}"):
        fit(Sum(), [lt.SoftFinetuning(lt.SourceKnowledge(pretrained()), weight=0.5, mix=mix)])


def test_a_network_with_other_weights_is_warned_of():
    module = LitToy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.model = toys.ToyNet()
    with pytest.warns(UserWarning, match=r"'model' are not like .* \(cosine similarity -?0\.\d\d\)"):
        fit(module, [keeping()], max_steps=1)


def test_a_new_classifier_is_warned_of():
    network = toys.toy_net()
    network.fc = nn.Linear(toys.WIDTH, 200)
    with pytest.warns(UserWarning, match=r"'fc' that SourceKnowledge keeps has the random weights of a new Linear"):
        fit(LitToy(), [keeping(network)], max_steps=1)
    nn.init.normal_(network.fc.weight, std=0.2)
    fit(LitToy(), [keeping(network)], max_steps=1)  # warnings are errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_convnext", "test_vit", "resnet10t"])
def test_new_classifiers_of_timm_are_known(name, dtype):
    network = timm.create_model(name, num_classes=37)
    assert lt.SourceKnowledge(network.to(dtype)).is_new
    network.float().reset_classifier(37)
    assert lt.SourceKnowledge(network.to(dtype)).is_new
    as_if_trained(network)
    assert not lt.SourceKnowledge(network).is_new


def as_if_trained(network):
    with torch.no_grad():
        network.get_classifier().bias += 0.01
        network.get_classifier().weight *= 1.3
    return network


@pytest.mark.parametrize("others", [[], [lt.FrozenStatistics()]], ids=["batch", "frozen"])
@pytest.mark.parametrize("options", [{}, {"estimator": "all_tuned"}])
def test_beside_adafilter_nothing_is_forgotten_at_first(options, others):
    callback = keeping(weight=1.0)
    runner = fit(LitToy(), [lt.AdaFilter(gated="model.conv", **options), *others, callback], max_steps=1)
    assert float(runner.callback_metrics["transfer/knowledge_loss"]) == pytest.approx(0, abs=1e-5)


def test_a_lazy_head_is_refused_by_name():
    module = LitToy()
    module.model.fc = nn.LazyLinear(5)
    with pytest.raises(lt.TransferConfigError, match="[Ll]azy"):
        fit(module, [keeping()], max_steps=1)


class InParts(LitToy):
    def forward(self, pixels):
        return self.model.fc(self.model.features(pixels))


class Twice(LitToy):
    def forward(self, pixels):
        return self.model(pixels) + self.model(pixels)


@pytest.mark.parametrize(
    ("module", "said"), [(InParts, r"ran 'model' 0 times and its head 'model\.fc' 1 times"), (Twice, "ran 'model' 2")]
)
def test_a_step_in_which_images_and_features_are_not_of_one_pass_is_refused(module, said):
    with pytest.raises(lt.TransferConfigError, match=said):
        fit(module(), [keeping()])


def test_a_convex_mix_that_leaves_the_target_out_is_refused():
    with pytest.raises(lt.TransferConfigError, match="weight of 1 throughout would leave your own loss out"):
        keeping(weight=1.0, mix="convex")


def test_by_default_the_weight_is_annealed():
    callback = lt.SoftFinetuning(lt.SourceKnowledge(pretrained()), mix="convex")
    fit(LitToy(), [callback], max_steps=4)
    assert callback.part.options["weight"] == "1 to 0"
    assert callback.part.options["weight until"] == "0.5"
    assert callback.part.annealing.is_over


def test_what_is_not_a_pretrained_classifier_is_refused():
    with pytest.raises(lt.TransferConfigError, match="network is an int; expected the pretrained network"):
        lt.SourceKnowledge(3)
    with pytest.raises(lt.TransferConfigError, match="timm has no model 'resnet10tt'"):
        lt.SourceKnowledge("resnet10tt")
    with pytest.raises(lt.TransferConfigError, match=r"ConvNeXt has no classifier \(num_classes=0\)"):
        lt.SourceKnowledge(timm.create_model("test_convnext", num_classes=0))
    with pytest.raises(lt.TransferConfigError, match="temperature=0; it takes a positive number"):
        lt.SourceKnowledge(pretrained(), temperature=0)
    with pytest.raises(lt.TransferConfigError, match=r"The classifier 'conv' is a Conv2d; expected a Linear"):
        lt.SourceKnowledge(pretrained(), head="conv")
    with pytest.raises(lt.TransferConfigError, match=r"Two predicts by more than its classifier 'fc'"):
        lt.SourceKnowledge(Two(), head="fc")
    module = LitToy()
    with pytest.raises(lt.TransferConfigError, match=r"Make it before the classifier is replaced"):
        fit(module, [keeping(module.model)])
    wide = pretrained()
    wide.fc = nn.Linear(toys.WIDTH + 1, 5)
    with pytest.raises(lt.TransferConfigError, match="takes 9 features, the target head 'model.fc' takes 8"):
        fit(LitToy(), [keeping(wide)])
    with pytest.raises(lt.TransferConfigError, match="backbone='modle' is not a module of LitToy"):
        fit(LitToy(), [keeping(backbone="modle")])


def test_the_mixin_names_what_to_use():
    class Lit(lt.SourceTaskMixin, LitToy):
        def __init__(self):
            super().__init__()
            self.add_source_task(lt.SourceKnowledge(pretrained()))

    with pytest.raises(lt.TransferConfigError, match=r"add functional\.knowledge_loss to the loss"):
        Lit()
