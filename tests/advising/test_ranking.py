"""Rankings of networks: accuracies against scikit-learn's, pictures against timm's, and that nothing is touched."""

import copy
import random
import threading
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset
from torchvision.transforms import v2

import lightning_transfer as lt
from lightning_transfer.advising import backbones
from lightning_transfer.advising import ranking as of_ranking
from lightning_transfer.probing import PENALTIES
from lightning_transfer.splitting import folds
from lightning_transfer.stamps import checksum
from tests.advising.test_verdicts import answers

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CONFIG = {"mean": MEAN, "std": STD, "input_size": (3, 8, 8), "crop_pct": 1.0, "interpolation": "bilinear"}


class Net(nn.Module):
    """Gives the pixels of some channels, coarsely, as features; with a head, logits."""

    def __init__(self, channels=(0, 1, 2), *, classes=0, last=None, grain=2, **config):
        super().__init__()
        self.channels, self.pretrained_cfg = list(channels), {**CONFIG, **config}
        self.grain, self.pool = grain, nn.AdaptiveAvgPool2d(grain)
        with torch.random.fork_rng():
            self.fc = nn.Linear(grain**2 * len(channels), classes) if classes else nn.Identity()
        self.last = last or (lambda logits: logits)
        self.given = []  # shared by its copies

    def __deepcopy__(self, memo):
        options = {"classes": getattr(self.fc, "out_features", 0), "last": self.last, "grain": self.grain}
        twin = Net(self.channels, **options, **self.pretrained_cfg)
        twin.load_state_dict(self.state_dict())
        twin.given = self.given
        return twin

    def forward(self, images):
        self.given.append(images)
        return self.last(self.fc(self.pool(images[:, self.channels]).flatten(1)))


def pixels_and_labels(number=40, side=8, *, signal=60, seed=0):
    """Noise of three classes, of which the first channel shows which."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    pixels = generator.integers(0, 200, (number, side, side, 3))
    pixels[..., 0] = np.clip(pixels[..., 0] // 2 + signal * labels[:, None, None], 0, 255)
    return pixels.astype(np.uint8), labels


class Pictures(Dataset):
    """PIL images, which `make` turns into something else."""

    def __init__(self, *given, make=lambda image: image, groups=None):
        self.pixels, self.labels = given or pixels_and_labels()
        self.make = make
        if groups is not None:
            self.groups = groups

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.make(Image.fromarray(self.pixels[index])), int(self.labels[index])


def by_hand(network, data):
    """Features, of pictures made by timm's own transform."""
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    with torch.no_grad():
        return np.stack([network(transform(image)[None])[0].double().numpy() for image, _ in data])


def right_by_scikit_learn(features, labels, groups=None):
    """Which images are right by a probe whose penalty is chosen without them."""

    def fit(kept, penalty):
        scaler = StandardScaler().fit(features[kept])
        each = scaler.scale_ * (len(kept) / (len(kept) - 1)) ** 0.5
        scaler.scale_[:] = np.sort(each)[(len(each) - 1) // 2]  # all are divided by the lower median
        model = LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-6)
        model.fit(scaler.transform(features[kept]), labels[kept])
        return lambda some: model.predict_log_proba(scaler.transform(features[some]))

    def split(some):
        given = None if groups is None else [groups[index] for index in some]
        for out in folds(labels[some].tolist(), given):
            yield np.delete(some, out), some[out]

    right = np.zeros(len(labels))
    for kept, out in split(np.arange(len(labels))):
        losses = {
            penalty: -sum(
                fit(inner, penalty)(held)[np.arange(len(held)), labels[held]].sum() for inner, held in split(kept)
            )
            for penalty in PENALTIES
        }
        right[out] = fit(kept, min(losses, key=losses.get))(out).argmax(1) == labels[out]
    return right


def half_interval(apart, groups, among=1):
    """Of 95 %, of so many means over groups together, by Student's t."""
    sums = np.array([(apart - apart.mean())[np.array(groups) == group].sum() for group in dict.fromkeys(groups)])
    spread = max((sums @ sums * len(sums) / (len(sums) - 1)) ** 0.5, 1) / len(apart)  # one image's worth at least
    return spread * stats.t.ppf(1 - 0.025 / among, len(sums) - 1)


def test_copies_of_images_are_not_scored_by_a_probe_that_has_seen_them():
    """Noise that shows no class: with copies in other folds all would be right."""
    pixels, labels = pixels_and_labels(30, signal=0)
    data = Pictures(pixels, labels)
    (once,), (often,) = (lt.rank_networks([Net(grain=8)], some).rows for some in (data, Subset(data, [*range(30)] * 3)))
    assert once.accuracy < 0.7
    assert often.accuracy < 0.7
    assert often.error > 0.9 * once.error  # of three times as many images it would be .58 times as large


@pytest.mark.parametrize("groups", [None, [index // 2 for index in range(40)]], ids=["alone", "groups"])
def test_accuracies_and_intervals_are_those_of_a_loop_by_hand(groups):
    data = Pictures(*pixels_and_labels(signal=25), groups=groups)
    networks = {"blind": Net((1, 2)), "sees": Net((0,)), "sees less": Net((0, 1, 2))}
    ranking = lt.rank_networks(networks, data)
    right = {name: right_by_scikit_learn(by_hand(net, data), data.labels, groups) for name, net in networks.items()}
    of = range(40) if groups is None else groups
    assert [row.name for row in ranking.rows] == sorted(right, key=lambda name: -right[name].mean())
    for row in ranking.rows:
        apart = right[row.name] - right[ranking.best]
        assert row.accuracy == pytest.approx(right[row.name].mean(), abs=1 / 40)  # rounding may turn one image
        assert row.difference == pytest.approx(apart.mean(), abs=1 / 40)
        assert 1.96 * row.error == pytest.approx(half_interval(right[row.name], of), rel=0.03)
        if row.name != ranking.best:
            assert row.interval == pytest.approx(half_interval(apart, of, among=3), rel=0.03)
    assert ranking.groups == (None if groups is None else 20)


def test_the_network_that_sees_the_signal_wins_and_the_page_says_who_is_not_told_apart():
    networks = {"blind": Net((1, 2)), "<b>twin</b>": Net((0,)), "sees": Net((0,))}
    ranking = lt.rank_networks(networks, Pictures(*pixels_and_labels(60)))
    assert ranking.best == "<b>twin</b>"  # of equals the first
    assert [row.is_told_apart for row in ranking.rows] == [False, False, True]
    page = str(ranking)
    assert "Not shown to be worse than <b>twin</b>: sees." in page
    assert "60 images, 3 classes" in page
    assert "the intervals of all differences between two networks hold jointly with 95 %" in page
    assert "<b>" not in ranking._repr_html_()
    assert "&lt;b&gt;twin&lt;/b&gt;" in ranking._repr_html_()
    alone = lt.rank_networks({"blind": networks["blind"], "sees": networks["sees"]}, Pictures(*pixels_and_labels(60)))
    assert "sees is shown to be better than each of the others." in str(alone)


def test_what_an_image_takes_is_that_of_the_batch_which_nothing_disturbed(monkeypatch):
    ticks = iter(np.cumsum([0, 9, 0, 1, 0, 9]).tolist())  # the beginning and the end of each of three batches
    monkeypatch.setattr(backbones, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    (row,) = lt.rank_networks({"one": Net((0,))}, Pictures(*pixels_and_labels(60)), batch_size=20).rows
    assert row.milliseconds == 50


@pytest.mark.parametrize(("equals", "groups"), [(6, 60), (10, 15)])
def test_of_rankings_of_equal_networks_few_call_one_worse(equals, groups, monkeypatch):
    """The best is chosen of all. A share of 100 may be off by 2.2 points with one standard error."""

    class Ran:
        def __init__(self, *_):
            pass

        def look(self, name, network):
            return SimpleNamespace(features=None, milliseconds=1.0, parameters=1), (8, 8)

    monkeypatch.setattr(of_ranking, "Run", Ran)
    random, worse = np.random.default_rng(0), 0
    nets = {str(number): Net((0,)) for number in range(equals)}
    data = Pictures(*pixels_and_labels(60), groups=np.repeat(range(groups), 60 // groups).tolist())
    for _ in range(100):
        found, _ = answers(random, groups=groups, size=60 // groups, folds=1, candidates=equals - 1, noise=0.0)
        given = iter([right for (right,) in found])
        monkeypatch.setattr(of_ranking, "probed", lambda *_, given=given, **options: next(given))
        worse += any(row.is_told_apart for row in lt.rank_networks(nets, data).rows)
    assert worse / 100 <= 0.05 + 2 * 0.022


def test_images_of_a_group_are_held_out_together():
    """Each image has a twin, by which its label is known; with twins in one group it is not."""
    pixels, labels = pixels_and_labels(30, signal=0)
    twins = np.concatenate([pixels, pixels]), np.concatenate([labels, labels])
    known, not_known = (
        lt.rank_networks({"net": Net(grain=8)}, Pictures(*twins, groups=groups)).rows[0].accuracy
        for groups in (None, [*range(30)] * 2)
    )
    assert known > 0.6 > 0.5 > not_known


def as_bytes(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


MAKES = {
    "PIL": lambda image: image,
    "array": np.asarray,
    "uint8": as_bytes,
    "float": lambda image: as_bytes(image).float() / 255,
    "0 to 255": lambda image: as_bytes(image).float(),
    "RGBA": lambda image: image.convert("RGBA"),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_each_network_is_given_what_timms_transform_makes(make):
    networks = {
        "one": Net(),
        "other": Net(mean=(0.1,) * 3, std=(1.0,) * 3, input_size=(3, 12, 10), crop_pct=0.8, interpolation="bicubic"),
        "padded": Net(input_size=(3, 14, 14), crop_mode="border", crop_pct=0.9),
    }
    pixels, labels = pixels_and_labels(12, side=20)
    data = Pictures(pixels[:, :, :15], labels, make=make)
    ranking = lt.rank_networks(networks, data, batch_size=5)
    for row in ranking.rows:
        network = networks[row.name]
        transform = create_transform(**resolve_model_data_config(network), is_training=False)
        expected = torch.stack([transform(Image.fromarray(image[:, :15])) for image in pixels])
        assert row.size == expected.shape[2:] == network.pretrained_cfg["input_size"][1:]
        found = torch.cat(network.given)[-12:]  # before them come those that a head is sought with
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len({row.size for row in ranking.rows}) == 3


@pytest.mark.parametrize(
    "last",
    [None, lambda logits: logits.softmax(1), lambda logits: {"logits": logits, "loss": 0}],
    ids=["logits", "softmax", "dict"],
)
def test_features_are_what_the_head_takes(last):
    """Two logits with random weights would do worse."""
    data = Pictures(*pixels_and_labels(60, signal=20))
    bare, headed = Net(), Net(classes=2, last=last)
    rows = {row.name: row for row in lt.rank_networks({"bare": bare, "headed": headed}, data).rows}
    assert rows["headed"].accuracy == rows["bare"].accuracy
    assert rows["headed"].interval < 0.04
    assert rows["headed"].parameters == rows["bare"].parameters == 0


def test_a_network_of_timms_is_asked_for_its_features_with_or_without_its_head(monkeypatch):
    asked, create = [], timm.create_model

    def without_download(name, *, pretrained=False, **options):
        asked.append((name, pretrained))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return create(name, **options)

    headed, bare = without_download("resnet10t"), without_download("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "create_model", without_download)
    for network in (headed, bare):
        network.pretrained_cfg = {**network.pretrained_cfg, **CONFIG, "input_size": (3, 32, 32)}
    data = Pictures(*pixels_and_labels(24))
    rows = lt.rank_networks({"headed": headed, "bare": bare, "named": "resnet10t.c3_in1k"}, data).rows
    of = {row.name: row for row in rows}
    assert of["headed"].accuracy == of["bare"].accuracy
    assert of["headed"].parameters == of["bare"].parameters == of["named"].parameters
    assert of["headed"].parameters == sum(each.numel() for each in bare.parameters())
    assert of["named"].size == (176, 176)
    assert asked[2:] == [("resnet10t.c3_in1k", True)]
    assert [row.name for row in lt.rank_networks([bare], data).rows] == ["resnet10t"]


class Data(L.LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, sampler=SubsetRandomSampler(range(30)))


@pytest.mark.parametrize("give", [Data, lambda data: Data(data).train_dataloader(), lambda data: [*data][:30]])
def test_a_datamodule_a_loader_and_a_list_are_read_as_the_dataset(give):
    expected = lt.rank_networks([Net()], Pictures(*(part[:30] for part in pixels_and_labels(40))))
    found = lt.rank_networks([Net()], give(Pictures(*pixels_and_labels(40))))
    assert found.images == 30
    assert found.rows[0].accuracy == expected.rows[0].accuracy


class Drawing(Pictures):
    def __getitem__(self, index):
        torch.rand(()), np.random.rand(), random.random()
        return super().__getitem__(index)


class Enabling(nn.Module):
    """Draws and enables gradients in its forward, as some do."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = CONFIG
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images):
        with torch.set_grad_enabled(True):
            torch.rand(()), np.random.rand(), random.random()
            return self.fc(self.bn(self.conv(images)).mean((2, 3)))


def state_of(network):
    modes = [(module.training, len(module._forward_hooks)) for module in network.modules()]
    wants = [(param.requires_grad, param.grad, param.is_inference()) for param in network.parameters()]
    return modes, wants, checksum(network.state_dict()), str(network)


def test_networks_and_random_state_are_left_as_they_were(capfd):
    headed = timm.create_model("resnet10t", num_classes=4)
    headed.pretrained_cfg = {**headed.pretrained_cfg, "input_size": (3, 32, 32)}
    networks = {"own": Enabling(), "timm": headed.eval()}
    networks["own"].bn.eval()
    networks["own"].fc.requires_grad_(False)
    before = [state_of(network) for network in networks.values()]
    rng = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        lt.rank_networks(networks, Drawing(*pixels_and_labels(12)))
        assert not torch.is_grad_enabled()
    assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == rng
    assert [state_of(network) for network in networks.values()] == before
    assert capfd.readouterr().out == ""


def test_kept_features_are_used_again_where_all_is_the_same(tmp_path):
    data, network = Pictures(*pixels_and_labels(12)), Net(classes=3)

    def forwards(network, data):
        network.given.clear()
        rows.append(lt.rank_networks({"net": network}, data, cache=tmp_path).rows[0])
        return sum(len(images) for images in network.given if len(images) == 12)

    rows = []
    assert forwards(network, data) == 12
    assert forwards(copy.deepcopy(network), data) == 0
    assert rows[0] == rows[1]
    [file] = tmp_path.iterdir()
    content = torch.load(file, weights_only=True)
    for damaged in ({**content, "features": content["features"] + 1}, {}):
        torch.save(damaged, file)
        assert forwards(network, data) == 12
    assert forwards(network, data) == 0
    with torch.no_grad():
        network.fc.weight += 1
    assert forwards(network, data) == 12
    network.pretrained_cfg["std"] = (0.3, 0.3, 0.3)
    assert forwards(network, data) == 12
    data.pixels[7] += 1
    assert forwards(network, data) == 12


class Broken(Pictures):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("truncated")
        return super().__getitem__(index)


class NotFinite(Net):
    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        return super().forward(images) / (images[:, 0, 0, :1] > images.mean()) / 0.0


def normalised(image):
    return (as_bytes(image).float() / 255 - 0.5) / 0.25


def noisy(image):
    return torch.rand(3, 8, 8)


class Own(nn.Module):
    """Gives what a function of it and of images does."""

    def __init__(self, forward, channels=3, *, scale=1.0, **config):
        super().__init__()
        self.run, self.pretrained_cfg = forward, {**CONFIG, **config}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(channels, 12, 3), nn.Linear(12, 10)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, images):
        return self.run(self, images)


def means(net, images):
    return net.conv(images).mean((2, 3))


def scaled(net, images):
    return means(net, images) * net.scale


def locked():
    network = Own(means)
    network.lock = threading.Lock()
    return network


def configured(config):
    network = Net()
    network.pretrained_cfg = config
    return network


def of_numbers(white, dtype):
    return lambda image: (as_bytes(image) / 255 * white).round().to(dtype)


def collated(batch):
    return torch.utils.data.default_collate([(as_bytes(image), 1 - label % 2) for image, label in batch])


REFUSED = {
    "digits": ([Net()], Pictures(make=of_numbers(16, torch.int64)), "int64 from 0 to 14, white at 255, .* / 14"),
    "12 bits": ([Net()], Pictures(make=of_numbers(4095, torch.uint16)), "uint16 from 0 to 3517, white at 65535"),
    "whole floats": ([Net()], Pictures(make=of_numbers(40, torch.float32)), "float32 from 0 to 34, white at 255"),
    "collate_fn": ([Net()], DataLoader(Pictures(), collate_fn=collated), "collate_fn, <function collated.*__getitem__"),
    "lists for groups": ([Net()], Pictures(groups=[[0]] * 40), r"Pictures.groups has an entry \[0\]; .* = \[str"),
    "tensors for groups": ([Net()], Pictures(groups=[*torch.zeros(40)]), r"groups has an entry tensor\(0.\)"),
    "a path": ([Net()], "data/train", r"The dataset is a path; load it: ImageFolder\('data/train'\)"),
    "a number for a name": ({1: Net()}, Pictures(), "Networks: 1, a Net; .* a string"),
    "size of two": ({"mine": Net(input_size=(8, 8))}, Pictures(), r"mine: .* is \(8, 8\); .* \(3, 224, 224\)"),
    "size of one": ({"mine": Net(input_size=8)}, Pictures(), "mine: .* is 8; expected channels"),
    "four channels": ({"mine": Own(means, 4, input_size=(4, 8, 8))}, Pictures(), r"mine: .*\(4, 8, 8\).*3, or 1"),
    "grey unsaid": ({"mine": Own(means, 1)}, Pictures(), r"mine does not run .* have 1 channels, .*input_size.\] ="),
    "no mapping": ({"mine": configured(3)}, Pictures(), "mine, a Net, .* network.pretrained_cfg ="),
    "locked": (
        {"mine": locked()},
        Pictures(),
        "mine, an Own, cannot be copied .TypeError: cannot pickle '_thread.lock'",
    ),
    "rows": ({"mine": Own(lambda net, images: means(net, images)[:1])}, Pictures(), r"mine .*\(1, 12\) of 8 images"),
    "flat maps": (
        {"mine": Own(lambda net, images: net.conv(images)[:, :, :2])},
        Pictures(),
        r"mine gives maps \(8, 12, 2, 6\).*mean..1, 2..",
    ),
    "cubes": (
        {"mine": Own(lambda net, images: net.conv(images), input_size=(3, 14, 14))},
        Pictures(),
        "mine gives maps",
    ),
    "normalised": ([Net()], Pictures(make=normalised), "pixels run from -2 to .* without Normalize"),
    "normalised loader": ([Net()], Data(Pictures(make=normalised)), "pixels run from .* without Normalize"),
    "augmented": ([Net()], Pictures(make=noisy), "transform is random: .* without Normalize and augmentation"),
    "dictionaries": ([Net()], [{"image": 1, "label": 2}], r"expected \(image, class number\).*\[\(sample"),
    "labels": ([Net()], [(image, 0.5) for image, _ in Pictures()], "expected .image, class number"),
    "one class": ([Net()], [(image, 0) for image, _ in Pictures()], "of 1 classes"),
    "unlabelled": ([Net()], [(image, index - 1) for index, (image, _) in enumerate(Pictures())], "A label is -1"),
    "groups are classes": (
        [Net()],
        Pictures(groups=[index % 3 for index in range(40)]),
        "3 of 3 classes have images of only one",
    ),
    "two groups": ([Net()], Pictures(groups=[int(index > 9) for index in range(40)]), "of 2 groups"),
    "unreadable": ([Net()], Broken(), "Image 5 cannot be read: OSError: truncated"),
    "empty": ([Net()], [], "empty"),
    "none": ([], Pictures(), "Networks: none"),
    "a number": ([3], Pictures(), "'int', an int"),
    "a string": ("resnet10tt", Pictures(), "timm has no model 'resnet10tt'"),
    "one name": ([Net(), Net()], Pictures(), "Networks share the name 'Net'. Name each: rank_networks"),
    "no configuration": ({"mine": nn.Flatten()}, Pictures(), "mine, a Flatten, .* network.pretrained_cfg ="),
    "unknown": (["resnet10tt"], Pictures(), "timm has no model 'resnet10tt'. Did you mean"),
    "pixels": ({"mine": Net(last=lambda out: out[None])}, Pictures(), r"mine gives Tensor\(1, 8, 12\)"),
    "not finite": ({"mine": NotFinite()}, Pictures(), "mine gives NaN or infinite features of image"),
}


@pytest.mark.parametrize(("networks", "data", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_ranked_is_refused_by_name(networks, data, says):
    with pytest.raises(lt.TransferConfigError, match=says):
        lt.rank_networks(networks, data)


def test_a_wrong_size_is_refused_before_any_network_runs():
    first = Net()
    with pytest.raises(lt.TransferConfigError, match="other: "):
        lt.rank_networks({"first": first, "other": Net(input_size=8)}, Pictures())
    assert not first.given


def kept(network, data, folder, **options):
    """The features that a ranking keeps."""
    lt.rank_networks([network], data, cache=folder, **options)
    [file] = folder.iterdir()
    return torch.load(file, weights_only=True)["features"].double().numpy()


def logits(net, images):
    return net.fc(means(net, images))


def partly_logits(net, images):
    """Give logits, but of some images with the opposite sign."""
    return logits(net, images) * torch.where(images.mean((1, 2, 3)) > 0, 1, -1)[:, None]


def mostly_zeros(net, images):
    """Give logits as rectified ones, which are all 0 of most images."""
    return (logits(net, images) - 0.5).relu()


def and_then_others(net, images):
    """Give logits, and run the head once more on something else."""
    found = logits(net, images)
    net.fc(means(net, images.flip(1)))
    return found


FORMS = {
    "mostly zeros": (mostly_zeros, means),
    "partly logits": (partly_logits, partly_logits),
    "twice": (and_then_others, means),
}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(("forward", "expected"), FORMS.values(), ids=FORMS)
def test_whether_a_network_gives_logits_is_decided_once_for_all_images(tmp_path, forward, expected, batch_size):
    data = Pictures()
    found = kept(Own(forward), data, tmp_path, batch_size=batch_size)
    np.testing.assert_allclose(found, by_hand(Own(expected), data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [Own(scaled, scale=0.5), Own(lambda net, images: means(net, images) ** 2)])
def test_kept_features_of_another_network_are_not_used(tmp_path, other):
    data = Pictures()
    for network in (Own(scaled), other, Own(scaled)):
        found = kept(network, data, tmp_path)
        np.testing.assert_allclose(found, by_hand(network, data), rtol=1e-4, atol=1e-5)


def channels_last(net, images):
    return net.conv(images).permute(0, 2, 3, 1)


def flat_maps(net, images):
    net.num_features = 12
    return net.conv(images)[:, :, :2].permute(0, 2, 3, 1)


MAPS = {
    "first": (lambda net, images: net.conv(images), (3, 8, 8), means),
    "last": (channels_last, (3, 8, 8), means),
    "wide first": (lambda net, images: net.conv(images), (3, 8, 20), means),
    "wide last": (channels_last, (3, 8, 20), means),
    "said": (flat_maps, (3, 8, 8), lambda net, images: net.conv(images)[:, :, :2].mean((2, 3))),
}


@pytest.mark.parametrize(("forward", "size", "expected"), MAPS.values(), ids=MAPS)
def test_maps_are_averaged_over_height_and_width_wherever_channels_are(tmp_path, forward, size, expected):
    data = Pictures()
    found = kept(Own(forward, input_size=size), data, tmp_path)
    hand = by_hand(Own(expected, input_size=size), data)
    np.testing.assert_allclose(found, hand, rtol=1e-4, atol=1e-5)


def test_maps_of_timms_with_channels_last_and_the_size_that_it_was_made_for(tmp_path):
    options = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1,) * 4, "num_heads": (1,) * 4}
    with torch.random.fork_rng():
        network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, global_pool="", **options).eval()
    data = Pictures(*pixels_and_labels(12))
    found = kept(network, data, tmp_path)
    assert lt.rank_networks([network], data, cache=tmp_path).rows[0].size == (64, 64)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 64, 64)}
    np.testing.assert_allclose(found, by_hand(network, data).mean((1, 2)), rtol=1e-3, atol=1e-5)


def test_a_network_of_one_channel_is_given_grey_pictures(tmp_path):
    data = Pictures()
    options = {"mean": sum(MEAN) / 3, "std": sum(STD) / 3}
    grey = [(Image.fromarray(pixels).convert("L"), 0) for pixels in data.pixels]
    network = Own(means, 1, input_size=(1, 8, 8))
    hand = [(np.asarray(image) / 255 - options["mean"]) / options["std"] for image, _ in grey]
    with torch.no_grad():
        expected = means(network, torch.tensor(np.stack(hand))[:, None].float()).double().numpy()
    np.testing.assert_allclose(kept(network, data, tmp_path), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [Net(last=lambda out: out @ torch.ones(5)), Own(lambda net, _: net.none, 64)])
def test_a_networks_own_error_names_it(network):
    with pytest.raises((RuntimeError, AttributeError)) as caught:
        lt.rank_networks({"mine": network}, Pictures())
    assert "while mine ran on images (8, 3, 8, 8)" in str(caught.value.__notes__)


def test_tensors_with_other_class_numbers_and_workers_do_too():
    pixels, labels = pixels_and_labels(30)
    data = TensorDataset(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels) * 7)
    rows = [lt.rank_networks([Net()], data, num_workers=workers).rows[0] for workers in (0, 1)]
    assert (
        rows[0].accuracy
        == rows[1].accuracy
        == lt.rank_networks([Net()], Pictures(*pixels_and_labels(30))).rows[0].accuracy
    )


def at_size(network, data, size):
    """Features of pictures that torchvision resizes to a square, and normalises as timm's configuration says."""
    config = network.pretrained_cfg
    resize = v2.Resize((size, size), v2.InterpolationMode(config["interpolation"]))
    make = v2.Compose(
        [resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    )
    with torch.no_grad():
        return np.stack([network(make(image)[None])[0].double().numpy() for image, _ in data])


@pytest.mark.parametrize("config", [{}, {"crop_pct": 0.5, "input_size": (3, 20, 20), "interpolation": "bicubic"}])
def test_all_networks_may_get_pictures_of_one_size(tmp_path, config):
    data = Subset([(image.resize((18, 12)), label) for image, label in Pictures()], [*range(30)])
    network = Net(**config)
    found = kept(network, data, tmp_path, image_size=14)
    assert {tuple(images.shape[1:]) for images in network.given} == {(3, 14, 14)}
    np.testing.assert_allclose(found, at_size(Net(**config), data, 14), rtol=1e-4, atol=1e-5)
    rows = lt.rank_networks({"a": Net(), "b": network}, data, image_size=14).rows
    assert [row.size for row in rows] == [(14, 14)] * 2


def test_kept_features_of_another_size_are_not_used(tmp_path):
    data, network = Pictures(*pixels_and_labels(12)), Net()
    for image_size, number in ((None, 1), (14, 2), (6, 3), (14, 3), (None, 3)):
        lt.rank_networks([network], data, cache=tmp_path, image_size=image_size)
        assert len([*tmp_path.iterdir()]) == number


def test_a_network_that_takes_another_size_alone_is_refused_before_any_runs(tmp_path):
    options = {"img_size": 64, "depth": 1, "num_classes": 3}
    with torch.random.fork_rng():
        vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    first, data = Net(), Pictures(*pixels_and_labels(12))
    says = "image_size is 32 x 32, and vit, a VisionTransformer, takes only images of 64 x 64 pixels. Leave vit out, or"
    with pytest.raises(lt.TransferConfigError, match=says):
        lt.rank_networks({"first": first, "vit": vit}, data, image_size=32)
    assert not first.given
    name = f"local-dir:{lt.export(vit, tmp_path / 'vit')}"  # known when its weights are loaded
    with pytest.raises(lt.TransferConfigError, match=f"and {name}, a VisionTransformer, .* Leave {name} out"):
        lt.rank_networks([name], data, image_size=32)
    assert lt.rank_networks({"vit": vit}, data, image_size=64).rows[0].size == (64, 64)
    with pytest.raises(lt.TransferConfigError, match=r"image_size=\(3, 3\); it takes a whole number"):
        lt.rank_networks([first], data, image_size=(3, 3))
