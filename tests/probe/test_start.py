"""What a head starts as: the linear probe of what it takes, by scikit-learn and loops written out by hand."""

import copy
import types

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import lightning_transfer as lt
from lightning_transfer.glue.samplers import importance_of
from lightning_transfer.methods.probe.drawing import draw
from lightning_transfer.probing import PENALTIES
from lightning_transfer.splitting import folds
from tests import toys
from tests.contracts.test_as_found import anatomy
from tests.field import shapes
from tests.toys import LitToy, assert_same, fit, weights

PIXELS, LABELS = toys.target_data().tensors
pytestmark = pytest.mark.filterwarnings("ignore:After ProbeStart the")  # of networks that are not pretrained


def by_scikit_learn(features, labels):
    """Log-probabilities that a logistic regression gives the features it was fitted on, and its penalty."""

    def fitted(rows, numbers, penalty):
        mean, each = rows.mean(0), rows.std(0, ddof=1)
        each = np.sort(each[each > 0])
        std = each[(len(each) - 1) // 2]  # the lower median
        sides = 2 if len({*numbers}) == 2 else 1  # of two classes scikit-learn has one row, ours each other's negative
        model = LogisticRegression(C=sides / penalty, max_iter=10_000, tol=1e-10).fit((rows - mean) / std, numbers)
        classes = model.classes_.tolist()
        return lambda others: model.predict_log_proba((others - mean) / std), classes

    rows, numbers = features.double().numpy(), labels.numpy()
    losses = dict.fromkeys(PENALTIES, 0.0)
    for out in folds(labels.tolist()):
        kept = sorted({*range(len(labels))} - {*out})
        for penalty in PENALTIES:
            says, classes = fitted(rows[kept], numbers[kept], penalty)
            scores = says(rows[out])
            for row, number in zip(scores, numbers[out], strict=True):
                losses[penalty] -= row[classes.index(number)] if number in classes else 0  # nothing can be said of it
    best = min(losses, key=losses.get)
    return torch.from_numpy(fitted(rows, numbers, best)[0](rows)), best


class Seen(LitToy):
    """Remembers what the network is when the first batch comes, in evaluation too."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 0:
            self.started = toys.weights(self)
            self.modes = [child.training for child in self.modules()]
            self.eval()
            with torch.no_grad():
                self.logits = self(PIXELS)
            self.train()


def started(module, *callbacks, data=None, **options):
    data = toys.target_data() if data is None else data
    fit(module, callbacks or [lt.ProbeStart()], loader=DataLoader(data, batch_size=5), max_epochs=1, **options)
    return module


def features_by_hand(net, pixels=PIXELS):
    """An image at a time, written out in numpy's terms of the layers."""
    rows = []
    for image in pixels:
        maps = F.conv2d(image[None], net.conv.weight, net.conv.bias)[0]
        scale = (net.bn.running_var + net.bn.eps).rsqrt() * net.bn.weight
        maps = (maps - net.bn.running_mean[:, None, None]) * scale[:, None, None] + net.bn.bias[:, None, None]
        rows.append(maps.clamp(min=0).flatten(1).mean(1))
    return torch.stack(rows).detach()


def test_the_first_logits_are_the_probes_scores_and_nothing_else_has_moved(caplog):
    expected, penalty = by_scikit_learn(features_by_hand(toys.toy_net()), LABELS)
    with caplog.at_level("INFO", "lightning.pytorch"):
        module = started(Seen())
    torch.testing.assert_close(module.logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)
    line = next(message for message in caplog.messages if "ProbeStart" in message)
    assert f"'model.fc' starts as a linear probe of 24 training images (penalty {penalty:g}; " in line
    assert "keep their weights" not in line
    assert all(module.modes)
    for name, value in LitToy().state_dict().items():
        assert torch.equal(value, module.started[name]) == (not name.startswith("model.fc"))


def test_a_vision_transformer_starts_as_the_probe_of_its_features():
    class Still(shapes.VisionTransformer):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, data = Still(), shapes.Pictures(Still, 40, shapes.CLASSES, seed=1)
    with torch.no_grad():
        net = module.model.eval()
        features = net.forward_head(net.forward_features(data.images), pre_logits=True)
        module.train()
        started(module, data=data)
        expected, _ = by_scikit_learn(features, data.labels)
        torch.testing.assert_close(net.head(features).double().log_softmax(1), expected, atol=1e-3, rtol=0)


def test_parameters_stay_the_same_objects_and_nothing_is_left():
    module = LitToy()
    before, objects = anatomy(module), {name: id(param) for name, param in module.named_parameters()}
    started(module)
    assert {name: id(param) for name, param in module.named_parameters()} == objects
    assert anatomy(module) == before


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", ["adafilter", "gated", "soft", "auto", "selective"])
def test_beside_each_method_in_either_order_it_is_the_probe_of_what_the_head_takes(name, first):
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, unaugmented=toys.source_data())
    always = lt.Schedule(1.0, 1.0)
    bank = lt.FilterBank.from_model(nn.Sequential(nn.Conv2d(3, 4, 3)), layers=["0"], normalize=False)
    methods = {
        "adafilter": lambda: lt.AdaFilter(gated="model.conv", gate_width=4),
        "gated": lambda: lt.GatedTransfer(ratio=2),
        "soft": lambda: lt.SoftFinetuning(source, weight=always),
        "auto": lambda: lt.SoftFinetuning(source),
        "selective": lambda: lt.SelectiveJointFinetuning(
            source, neighbors=lt.Neighbors(k=3, bank=bank), weight=always, target=toys.target_data()
        ),
    }
    module, features = Seen(), features_by_hand(toys.toy_net())
    started(module, *[lt.ProbeStart(), methods[name]()][:: 1 if first else -1])
    if name == "gated":
        squeeze, expand = (module.started[f"model.fc.transfer.{layer}.weight"] for layer in ("squeeze", "expand"))
        features = (F.relu(features @ squeeze.T) @ expand.T).sigmoid() * features
    expected, _ = by_scikit_learn(features, LABELS)
    torch.testing.assert_close(module.logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("head", "first"), [("auto", True), ("auto", False), ("model.fc", True)])
def test_each_of_several_networks_starts_as_the_probe_of_its_own_features(head, first):
    other, module = toys.OtherNet(), Seen()
    started(module, *[lt.ProbeStart(head=head), lt.CollaborativeFinetuning([other])][:: 1 if first else -1])
    other.eval()
    theirs = F.relu(other.conv2(F.relu(other.bn1(other.conv1(PIXELS))))).mean((2, 3)).detach()
    for name, features in (("own", features_by_hand(toys.toy_net())), ("source1", theirs)):
        head = f"model.members.{name}.network.fc"
        logits = features @ module.started[f"{head}.weight"].T + module.started[f"{head}.bias"]
        expected, _ = by_scikit_learn(features, LABELS)
        torch.testing.assert_close(logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)


class Features(LitToy):
    """Its images are the features."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.model = nn.Sequential()
        self.model.fc = nn.Linear(width, num_classes)

    def on_train_start(self):
        self.eval()

    def on_train_batch_start(self, batch, batch_idx):
        return -1  # nothing is trained


def test_an_image_counts_as_often_as_the_loader_draws_it():
    labels = (torch.arange(600) % 20 == 0).long()
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)) + 0.8 * labels[:, None]
    sampler = WeightedRandomSampler(torch.where(labels == 1, 19.0, 1.0), 600)
    module, start = Features(4, 2), lt.ProbeStart()
    fit(module, [start], loader=DataLoader(TensorDataset(features, labels), 50, sampler=sampler))
    weighted = LogisticRegression(class_weight={0: 1.0, 1: 19.0}).fit(features, labels)
    found = module(features).argmax(1)
    assert (found == torch.from_numpy(weighted.predict(features))).double().mean() > 0.95
    assert (found[labels == 1] == 1).double().mean() > 0.7  # a probe of all images alike finds one in six


def test_the_weights_of_a_sampler_that_is_shared_out_are_seen():
    sampler = WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 4)
    shared = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    for given in (sampler, shared):
        assert importance_of(DataLoader(range(4), 2, sampler=given)).tolist() == [1, 2, 3, 4]


def test_an_index_that_a_sampler_repeats_counts_as_often():
    repeated = [0, 1, 1, 3, 3, -1]
    for given in ({"sampler": repeated}, {"sampler": SubsetRandomSampler(repeated)}, {"batch_sampler": [repeated]}):
        assert importance_of(DataLoader(range(4), **given)).tolist() == [1, 2, 0, 3]
    assert importance_of(DataLoader(range(4), sampler=[3, 0])) is None


def test_of_many_images_every_class_is_looked_at_and_counts_by_its_share():
    labels = torch.cat([torch.arange(4).repeat_interleave(1400), 4 + torch.arange(60).repeat_interleave(5)])
    centres = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    features = 3 * centres[labels] + torch.randn(5900, 16, generator=torch.Generator().manual_seed(1))
    module = Features(16, 64)
    fit(module, [lt.ProbeStart()], loader=DataLoader(TensorDataset(features, labels), 500))
    assert (module(features[labels >= 4]).argmax(1) == labels[labels >= 4]).double().mean() > 0.99
    places, importance = draw(TensorDataset(features, labels), None, most=600)
    counts = torch.zeros(64).index_add(0, labels[places], importance)
    torch.testing.assert_close(counts / counts.sum(), labels.bincount() / 5900.0)


def test_an_average_of_the_weights_starts_as_the_probe_too():
    if not hasattr(L.callbacks, "EMAWeightAveraging"):
        return  # newer than the oldest Lightning

    class Watched(L.callbacks.EMAWeightAveraging):
        def on_train_epoch_start(self, trainer, pl_module):
            assert_same(weights(self._average_model.module), weights(pl_module))
            self.is_checked = True

    for callbacks in (
        [lt.ProbeStart(), Watched()],
        [Watched(), lt.ProbeStart()],
        [lt.ProbeStart(), lt.GatedTransfer(ratio=2), Watched()],
    ):
        fit(LitToy(), callbacks, max_epochs=1)
        assert next(callback for callback in callbacks if isinstance(callback, Watched)).is_checked


class Averaging(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.average = {name: value.clone() for name, value in pl_module.state_dict().items()}


class Inside(LitToy):
    def __init__(self):
        super().__init__()
        self.average = nn.ModuleDict({"of": copy.deepcopy(self.model)})


class Held(LitToy):
    def __init__(self):
        super().__init__()
        self.average = types.SimpleNamespace(shadow=[param.detach().clone() for param in self.parameters()])


class Slow(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["slow"] = param.detach().clone()


class BySlow(LitToy):
    def configure_optimizers(self):
        return Slow(self.parameters(), lr=0.1)


class BySeveral(LitToy):
    """Has two optimizers of one class; the first has the head. Holds a sparse tensor, too."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.mask = torch.zeros_like(self.model.fc.weight).to_sparse()

    def configure_optimizers(self):
        return [Slow(self.model.fc.parameters(), lr=0.1), Slow(self.model.conv.parameters(), lr=0.1)]


@pytest.mark.parametrize(
    ("kind", "callback", "holder"),
    [
        (LitToy, Averaging(), "Averaging"),
        (LitToy, L.callbacks.ModelPruning("l1_unstructured", amount=0.5), "ModelPruning"),
        (Inside, None, "average.of.fc.weight"),
        (Held, None, "average"),
        (BySlow, None, "Slow"),
        (BySeveral, None, "Slow"),
    ],
)
def test_a_copy_of_the_head_from_before_is_warned_of(kind, callback, holder):
    with pytest.warns(UserWarning, match=rf"'model\.fc' starts as a linear probe, and {holder} holds a copy of it"):
        fit(kind(), [callback, lt.ProbeStart(head="model.fc")][callback is None :], max_epochs=1)


def test_a_head_of_zeros_has_no_copies():
    class Zeros(LitToy):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.model.fc.weight)
            self.counts = nn.Buffer(torch.zeros_like(self.model.fc.weight))

    fit(Zeros(), [lt.ProbeStart()], max_epochs=1)


def test_hooks_that_augment_in_training_mode_do_not_while_the_probe_looks():
    class Augmented(LitToy):
        def __init__(self):
            super().__init__()
            self.modes = []

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.modes.append((self.training, self.model.training))
            return batch

    module = Augmented()
    fit(module, [lt.ProbeStart()], max_epochs=1, limit_train_batches=1)
    assert module.modes[-1] == (True, True)
    assert {*module.modes[:-1]} == {(False, False)}


class OneLogit(Seen):
    def __init__(self):
        super().__init__()
        self.model.fc = nn.Linear(toys.WIDTH, 1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]).flatten(), batch[1].flatten().float())


@pytest.mark.parametrize("labels", [(LABELS > 2).long(), (LABELS > 2).float(), (LABELS > 2).float()[:, None]])
def test_one_logit_is_the_score_of_one_class_over_the_other(labels):
    module = started(OneLogit(), data=TensorDataset(PIXELS, labels))
    expected, _ = by_scikit_learn(features_by_hand(toys.toy_net()), labels.flatten().long())
    difference = expected[:, 1:] - expected[:, :1]
    torch.testing.assert_close(module.logits.double(), difference, atol=1e-2, rtol=0)


class TwoLayers(Seen):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(8)
            hidden = nn.Linear(toys.WIDTH, 6)
        self.model.fc = nn.Sequential(hidden, nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, toys.TARGET_CLASSES))


@pytest.mark.parametrize("head", ["auto", "model.fc"])
def test_of_a_head_of_several_layers_the_last_starts_as_the_probe_of_what_it_takes(head):
    module = started(TwoLayers(), lt.ProbeStart(head=head))
    weight, bias = TwoLayers().model.fc[0].weight, TwoLayers().model.fc[0].bias
    assert torch.equal(module.started["model.fc.0.weight"], weight)
    expected, _ = by_scikit_learn(F.relu(features_by_hand(toys.toy_net()) @ weight.T + bias).detach(), LABELS)
    torch.testing.assert_close(module.logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)


def test_classes_without_images_start_as_they_were_which_is_said_once(caplog):
    some = [index for index, label in enumerate(LABELS.tolist()) if label != 3]
    with caplog.at_level("INFO", "lightning.pytorch"):
        module = started(Seen(), data=Subset(toys.target_data(), some))
    assert sum("1 of its classes have no image among these" in message for message in caplog.messages) == 1
    assert torch.equal(module.started["model.fc.weight"][3], toys.toy_net().fc.weight[3])
    expected, _ = by_scikit_learn(features_by_hand(toys.toy_net(), PIXELS[some]), LABELS[some])
    found = module.logits[some][:, [0, 1, 2, 4]].double().log_softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


class Noisy(Dataset):
    """Images that are something else when they are drawn for training."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        self.loaded.append(index)
        return PIXELS[index] + torch.randn(3, 6, 6), LABELS[index]


@pytest.mark.parametrize("sampler", [None, [*range(2, 20)]])
def test_images_without_augmentation_are_those_that_the_loader_draws(sampler):
    module, noisy, plain = Seen(), Noisy(), toys.Recorder(toys.target_data())
    loader = DataLoader(noisy, batch_size=5, sampler=None if sampler is None else SubsetRandomSampler(sampler))
    fit(module, [lt.ProbeStart(unaugmented=plain)], loader=loader, max_epochs=1)
    drawn = sampler or [*range(24)]
    assert plain.loaded == drawn
    assert sorted(noisy.loaded) == drawn  # in training alone
    expected, _ = by_scikit_learn(features_by_hand(toys.toy_net(), PIXELS[drawn]), LABELS[drawn])
    torch.testing.assert_close(module.logits[drawn].double().log_softmax(1), expected, atol=1e-3, rtol=0)


def mixed(samples):
    """Half of an image and half of the one before it, as a collate_fn with MixUp makes them."""
    images, labels = default_collate(samples)
    wanted = F.one_hot(labels, 5).float()
    return (images + images.roll(1, 0)) / 2, (wanted + wanted.roll(1, 0)) / 2


def test_images_that_a_collate_fn_mixes_are_taken_from_a_loader_that_does_not():
    module, loader = Seen(), DataLoader(toys.target_data(), batch_size=5, collate_fn=mixed)
    with pytest.raises(lt.TransferConfigError, match=r"soft labels.*: ProbeStart\(unaugmented=DataLoader\(dataset\)\)"):
        fit(LitToy(), [lt.ProbeStart()], loader=loader)
    fit(module, [lt.ProbeStart(unaugmented=DataLoader(toys.target_data()))], loader=loader, max_steps=1)
    expected, _ = by_scikit_learn(features_by_hand(toys.toy_net()), LABELS)
    torch.testing.assert_close(module.logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)


def test_the_penalty_is_chosen_with_images_of_a_group_held_out_together():
    data = toys.target_data()
    data.groups = [0] * 24
    with pytest.raises(lt.TransferConfigError, match="24 training images are of one group"):
        started(Seen(), data=data)
    data.groups = [index // 2 for index in range(24)]
    started(Seen(), data=data)


class Dicts(Seen):
    def forward(self, batch):
        return self.model(batch["image"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["label"])

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 0:
            self.logits = self.model.eval()(PIXELS).detach()
            self.train()


class DictData(toys.Recorder):
    def __getitem__(self, index):
        image, label = self.dataset[index]
        return {"image": image, "label": label}


def test_batches_and_forwards_of_another_form_are_read_as_the_messages_say():
    data = DictData(toys.target_data())
    with pytest.raises(lt.TransferConfigError, match=r"adapt=lambda batch: \(batch\['image'\], batch\['label'\]\)"):
        started(Dicts(), data=data)
    adapt = lambda batch: (batch["image"], batch["label"])  # noqa: E731
    with pytest.raises(lt.TransferConfigError, match=r"ProbeStart\(forward=lambda module, images: module.model"):
        started(Dicts(), lt.ProbeStart(adapt=adapt), data=data)
    expected, _ = by_scikit_learn(features_by_hand(toys.toy_net()), LABELS)
    for forward in (lambda module, images: module.model(images), lambda module, images: module.model.features(images)):
        module = started(Dicts(), lt.ProbeStart(adapt=adapt, forward=forward), data=data)
        torch.testing.assert_close(module.logits.double().log_softmax(1), expected, atol=1e-3, rtol=0)
