"""Advice on small data: what is measured, that nothing of the user's is touched, and what is refused."""

import copy
import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import lightning_transfer as lt
from lightning_transfer.advising import measuring, parts
from lightning_transfer.advising.evidence import Setting
from lightning_transfer.advising.measuring import Measured
from lightning_transfer.advising.parts import fold
from tests import toys

QUIET = {"accelerator": "cpu"}


def source(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), **options)


def advise(module=None, data=None, **options):
    given = {"steps": 3, "trainer": QUIET, **options}
    return lt.advise(module or toys.LitToy(), data or toys.target_loader(), **given)


def test_every_image_is_held_out_once_and_groups_stay_together():
    labels = [0, 1, 2] * 20
    groups = [index // 6 for index in range(60)]
    folds = fold(labels, groups)
    assert sorted(index for fold in folds for index in fold) == list(range(60))
    assert len(folds) == 4
    assert all(
        {groups[index] for index in fold}.isdisjoint(groups[i] for i in range(60) if i not in fold) for fold in folds
    )
    plain = fold(labels, None)
    assert [[labels[index] for index in fold].count(0) for fold in plain] == [5, 5, 5, 5]


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [8, 10])
def test_few_images_of_a_class_can_be_held_out(shots, num_classes):
    labels = [label for label in range(num_classes) for _ in range(shots)]
    folds = fold(labels, None)
    assert sorted(index for part in folds for index in part) == list(range(len(labels)))
    assert max(map(len, folds)) - min(map(len, folds)) <= num_classes // 4
    assert all(len({labels[index] for index in part}) == len(part) for part in folds)  # else a class has none to learn


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (40, 2, 2, 2), (9, 7, 3, 2, 1), (5, 5)])
def test_groups_of_any_sizes_can_be_held_out(sizes):
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    folds = fold([index % 2 for index in range(len(groups))], groups)
    assert len(folds) == min(4, len(sizes))
    assert sum(len({groups[index] for index in part}) for part in folds) == len(sizes)


def test_a_small_group_beside_a_large_one_may_not_be_drawn_and_then_more_is_scored(monkeypatch):
    monkeypatch.setattr(parts, "MOST", 300)
    groups = [index // 900 for index in range(3600)] + [4, 5]
    folds = fold([index % 2 for index in range(3602)], groups)
    assert len({groups[index] for part in folds for index in parts.some(part, 300)}) > 1


def test_a_single_large_group_is_not_all_that_is_scored():
    groups = [index // 260 for index in range(1040)]
    folds = fold([0, 1] * 520, groups)
    assert len(folds) == 2
    assert len({groups[index] for part in folds for index in part}) == 2


def test_a_source_that_augments_at_random_changes_nothing_of_the_target():
    class Drawing(TensorDataset):
        def __getitem__(self, index):
            return (super().__getitem__(index)[0] + torch.rand(1), 0)

    drawn = []

    class Recording(toys.LitToy):
        def training_step(self, batch, batch_idx):
            drawn[-1].append(float(torch.rand(())))  # as dropout would
            return super().training_step(batch, batch_idx)

    for kind, options in (
        (TensorDataset, {"num_classes": 7}),
        (Drawing, {"num_classes": 7}),
        (
            TensorDataset,
            {"head": torch.nn.Linear(toys.TARGET_CLASSES, 7), "forward": lambda module, images: module(images)},
        ),
    ):
        drawn.append([])
        source = lt.SourceTask(kind(*toys.source_data().tensors), **options)
        loader = DataLoader(TensorDataset(*toys.target_data().tensors), batch_size=4, shuffle=True)
        advise(Recording(), loader, source=source)
    assert drawn[0] == drawn[1] == drawn[2]


def test_no_batch_of_one_image_is_trained_on():
    sizes = []

    class Sized(toys.LitToy):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    advise(Sized(), DataLoader(toys.images(28, 2, seed=1), batch_size=5), steps=8)  # now and then 21 of 28 train
    assert 1 not in sizes


def test_with_enough_images_one_part_is_enough():
    assert [len(fold) for fold in fold([0, 1] * 600, None)] == [300]
    assert [len(fold) for fold in fold([0, 1] * 400, None)] == [200, 200]


def test_probe_and_fine_tuning_are_what_a_hand_written_loop_finds():
    data = toys.images(40, toys.TARGET_CLASSES, seed=5)
    pixels, labels = data.tensors
    module = toys.LitToy()
    found = advise(module, DataLoader(data, batch_size=8), steps=20).measured
    probed, tuned = [], []
    for out in fold(labels.tolist(), None):
        kept = [index for index in range(40) if index not in out]
        net = copy.deepcopy(module.model).eval()
        with torch.no_grad():
            features = net.features(pixels).double()
        scaled = (features - features[kept].mean(0)) / features[kept].std(0)
        model = LogisticRegression(C=1 / 10, max_iter=10_000, tol=1e-10).fit(scaled[kept], labels[kept])
        probed += list(model.predict(scaled[out]) == labels[out].numpy())
        twin = copy.deepcopy(module)
        optimizer = twin.configure_optimizers()
        twin.train()
        batches = [kept[start : start + 8] for start in range(0, len(kept), 8)]
        for step in range(20):
            some = batches[step % len(batches)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(twin(pixels[some]), labels[some]).backward()
            optimizer.step()
        with torch.no_grad():
            tuned += (twin.eval()(pixels[out]).argmax(1) == labels[out]).tolist()
    assert found.scored == 40
    assert found.probe == pytest.approx(np.mean(probed))
    assert found.tuned == pytest.approx(np.mean(tuned))
    apart = np.array(tuned, float) - np.array(probed, float)
    error = max(stats.sem(apart), 1 / 40) * stats.t.ppf(0.975, 39) / 1.96
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.distance == pytest.approx(100 * (np.mean(tuned) - np.mean(probed)))
    assert (found.images, found.classes, found.gap) == (40, 5, None)
    assert found.fewest == int(torch.bincount(labels).min())


def test_the_gap_is_that_of_the_features_in_front_of_the_head(monkeypatch):
    limits = 12, 15
    monkeypatch.setattr(measuring, "TARGET_IMAGES", limits[0])
    monkeypatch.setattr(measuring, "SOURCE_IMAGES", limits[1])
    module = toys.LitToy()
    found = advise(module, source=source()).measured
    labels = toys.target_data().tensors[1].tolist()
    kept = [index for index in range(24) if index not in fold(labels, None)[0]]
    with torch.no_grad():
        net = module.model.eval()
        sides = [net.features(toys.target_data().tensors[0][kept]), net.features(toys.source_data().tensors[0])]
        some = [parts.some(list(range(len(side))), most) for side, most in zip(sides, limits, strict=True)]
        assert [len(chosen) for chosen in some] == [*limits]
    assert found.gap == lt.functional.domain_gap(*(side[chosen] for side, chosen in zip(sides, some, strict=True)))
    with pytest.raises(ZeroDivisionError):
        advise(source=source(forward=lambda module, images: 1 / 0))
    free = source(forward=lambda module, images: module.model.features(images))
    assert advise(module, source=free).measured.gap == found.gap


def test_module_data_and_random_state_are_as_they_were():
    module = toys.LitToy().train()
    module.model.bn.eval()
    before, modes = toys.weights(module), [child.training for child in module.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    shuffled = DataLoader(toys.target_data(), batch_size=4, shuffle=True)
    first = advise(module, shuffled, source=source())
    toys.assert_same(toys.weights(module), before)
    assert [child.training for child in module.modules()] == modes
    assert not module.losses
    assert module._trainer is None
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(5)
    assert advise(module, shuffled, source=source()) == first


class Guarded(LightningDataModule):
    def train_dataloader(self):
        return toys.target_loader()

    def val_dataloader(self):
        raise AssertionError("validation data was asked for")

    test_dataloader = val_dataloader


class Careful(toys.LitToy):
    def validation_step(self, batch, batch_idx):
        raise AssertionError("validation was run")


class Waiting(Careful):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def test_a_rate_that_waits_for_validation_stays():
    assert advise(Waiting(), steps=15).measured == advise(steps=15).measured


def test_validation_and_test_data_are_not_looked_at():
    assert advise(Careful(), Guarded()).measured.images == 24


def test_both_namespaces_and_a_module_without_forward():
    class Headless(toys.LitToy):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    class Apart(toys.LitToy):
        forward = pl.LightningModule.forward

        def __init__(self):
            super().__init__()
            self.head, self.model.fc = self.model.fc, torch.nn.Identity()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.head(self.model(batch[0])), batch[1])

    expected = advise(source=source()).measured
    assert advise(toys.PlToy(), source=source()).measured == expected
    assert replace(advise(Headless(), source=source()).measured, guess="") == expected
    assert replace(advise(Apart(), source=source()).measured, guess="") == expected


def test_unaugmented_images_are_what_is_looked_at():
    data = toys.target_data()

    class Noise(torch.utils.data.Dataset):
        targets = data.tensors[1]

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.randn(3, 6, 6), data.tensors[1][index]

    clean = advise(steps=1, unaugmented=data, data=DataLoader(Noise(), batch_size=4)).measured
    assert clean.probe == advise(steps=1).measured.probe


def test_what_is_said_has_what_was_measured_and_the_lines_to_write():
    advice = advise(source=source(), steps=60)
    said = str(advice)
    seen = advice.measured
    assert f"24 labelled images, 5 classes, {seen.fewest} of the rarest" in said
    assert f"Linear probe {seen.probe:.1%}, fine-tuning {seen.tuned:.1%}" in said
    assert f"{seen.distance:+.1f} +- {1.96 * 100 * seen.error:.1f} points, on 24 images" in said
    assert f"Domain gap: {seen.gap:.2f}" in said
    low, high = (lt.advising.evidence.place(seen.distance + side * 196 * seen.error) for side in (-1, 1))
    assert advice.place == (low if low == high else f"between {low} and {high}")
    for each in advice.expected:
        change = f"{each.points:+5.1f} +- {each.interval:.1f} points"
        assert each.method in said
        assert (change in said) == (each.verdict != "not known")
        assert (lt.advising.advise.LINES[each.method] in said) == (each.verdict in ("recommended", "may help"))
    assert {each.method for each in advice.expected} > {each.method for each in advise(steps=60).expected} > set()
    assert "pass source=" in str(advise())


@pytest.mark.parametrize("change", [lambda images: images.abs(), lambda images: 40 * images])
def test_a_source_that_is_scaled_otherwise_is_not_taken_for_a_far_one(change):
    images, labels = toys.source_data().tensors
    theirs = change(images)
    wrong = advise(source=lt.SourceTask(TensorDataset(theirs, labels), head=toys.source_head()))
    assert wrong.measured.gap is None
    assert f" in the target, from {theirs.min():.2f} to {theirs.max():.2f} in the source: give" in str(wrong)
    assert "pixels" not in str(advise(source=source()))


def test_groups_that_say_no_more_than_classes_do_are_refused():
    data = toys.images(24, 3, seed=5)
    data.groups = [int(label) for label in data.tensors[1]]
    with pytest.raises(lt.TransferConfigError, match="Of 3 classes 3 have images of one group only"):
        advise(data=DataLoader(data, batch_size=8))
    data.groups[:4] = range(10, 14)
    data.groups[4:8] = range(20, 24)
    assert len({int(label) for label in data.tensors[1][:8]}) > 1
    assert advise(data=DataLoader(data, batch_size=8)).measured.images == 24


def seen(**changes):
    known = {"images": 100, "classes": 5, "fewest": 20, "scored": 100, "probe": 0.6, "tuned": 0.6, "error": 0.02}
    return Measured(**{**known, "gap": 0.6, **changes})


@pytest.mark.parametrize(("gap", "is_close"), [(0.74, False), (0.76, True), (0.84, True), (0.86, False)])
def test_a_gap_that_other_images_may_put_on_the_other_side_is_said_to_be_so(gap, is_close):
    page = str(lt.advising.advise.Advice(seen(gap=gap), "near", {"near": 1.0}, is_known=True, expected=()))
    assert ("come out on the other side" in page) == is_close


@pytest.mark.parametrize(("tuned", "error", "expected"), [(0.49, 0.05, True), (0.51, 0.01, False), (0.49, 0.06, False)])
def test_fine_tuning_falls_short_ten_points_below_the_probe_and_surely_below_it(tuned, error, expected):
    assert seen(tuned=tuned, error=error).falls_short == expected


@pytest.mark.parametrize(("share", "is_named"), [(0.11, True), (0.09, False)])
def test_settings_are_named_from_a_tenth_of_what_is_known(monkeypatch, share, is_named):
    apart = 0.05 * math.sqrt(2 * math.log((1 - share) / share))  # of gap, in front of a setting that is just alike
    settings = [Setting(name, 20.0, 0.6 + more, 0.0, {}, {}) for name, more in (("alike", 0.0), ("other", apart))]
    monkeypatch.setattr(lt.advising.advise, "known_settings", lambda: settings)
    monkeypatch.setattr(lt.advising.advise, "measure", lambda *args, **options: seen())
    assert ("other at 20 a class" in advise().alike) == is_named


def test_fine_tuning_that_goes_wrong_is_named():
    class Wild(toys.LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e4)

    data = DataLoader(toys.images(200, toys.TARGET_CLASSES, seed=6), batch_size=20)
    wrong = advise(Wild(), data)
    assert "learning rate is too high" in str(wrong)
    assert wrong.expected == ()
    assert "most like" not in str(wrong)
    assert "Nothing is shown" not in str(wrong)
    assert "too few steps" in str(advise(toys.LitToy(), data, steps=10))
    assert "too few steps" not in str(advise(toys.LitToy(), data, steps=200))


def test_a_module_without_a_forward_is_told_how_it_was_run_and_few_steps_are_named():
    class Headless(toys.LitToy):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    assert "were run through 'model'" in str(advise(Headless()))
    assert "without a forward" not in str(advise()).lower()
    assert "Fine-tuning had 3 steps, the benchmarks that it is held against had 300:" in str(advise(steps=3))
    assert "that it is held against" not in str(lt.advising.advise.Advice(seen(), "near", {"a": 1.0}, True, ()))


@pytest.mark.parametrize(
    ("changes", "is_guessing"),  # a share of .4 of 100 images comes out as .496 at most, of 25 as .592
    [
        ({"probe": 0.3, "tuned": 0.49}, True),
        ({"probe": 0.3, "tuned": 0.50}, False),
        ({"probe": 0.50, "tuned": 0.45}, False),
        ({"probe": 0.3, "tuned": 0.59, "groups": 25}, True),
        ({"probe": 0.3, "tuned": 0.60, "groups": 25}, False),
        ({"probe": 0.3, "tuned": 0.50, "groups": 200}, False),
        ({"probe": 0.0, "tuned": 0.0, "commonest": None}, False),
    ],
)
def test_answers_that_may_be_no_better_than_the_most_common_class_are_named(changes, is_guessing):
    measured = seen(**{"commonest": 0.4, **changes})
    assert measured.is_guessing == is_guessing
    page = str(lt.advising.advise.Advice(measured, "near", {"a": 1.0}, True, ()))
    assert ("to say the most common class each time (40.0%)" in page) == is_guessing
    assert ("your target is near" in page) != is_guessing


def test_of_labels_that_go_with_nothing_nothing_is_said():
    uneven = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)
    shuffled = uneven[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    advice = advise(data=DataLoader(TensorDataset(torch.rand(24, 3, 6, 6), shuffled), batch_size=8))
    assert advice.measured.commonest == 0.5
    assert advice.measured.is_guessing
    assert advice.expected == ()


def test_only_what_a_loader_serves_is_looked_at():
    data = toys.Recorder(toys.images(60, toys.TARGET_CLASSES, seed=5))
    served = list(range(0, 60, 3))
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(served))
    found = advise(data=loader).measured
    assert (found.images, found.scored) == (20, 20)
    assert {*data.loaded} == {*served}
    clean = toys.Recorder(data.dataset)
    advise(data=loader, unaugmented=clean)
    assert {*clean.loaded} == {*served}


def test_a_forward_of_the_source_runs_target_images_too():
    images, labels = toys.source_data().tensors
    far = lt.SourceTask(
        TensorDataset(images * 4, labels), num_classes=7, forward=lambda module, images: module.model(images / 4)
    )
    loader = DataLoader(toys.images(60, toys.TARGET_CLASSES, seed=5), batch_size=20)
    callback = lt.SoftFinetuning(far)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.NoEffectWarning)
        toys.fit(toys.LitToy(), [callback], loader=loader)
    assert advise(data=loader, source=far).measured.gap == pytest.approx(callback.part.gap, abs=0.15)


def test_what_is_not_right_is_refused_by_name():
    with pytest.raises(lt.TransferConfigError, match="source is a TensorDataset; wrap the dataset: source="):
        advise(source=toys.source_data())
    with pytest.raises(lt.TransferConfigError, match="steps=0"):
        advise(steps=0)
    with pytest.raises(lt.TransferConfigError, match=r"class LightningDataModule; write LightningDataModule\(\)"):
        advise(data=LightningDataModule)
    with pytest.raises(lt.TransferConfigError, match="ToyNet is no LightningModule"):
        advise(toys.toy_net())
    with pytest.raises(lt.TransferConfigError, match="cannot be split"):
        advise(data=[(torch.zeros(2, 3, 6, 6), torch.tensor([0, 1]))])
    with pytest.raises(lt.TransferConfigError, match="unaugmented has 20 images, the training data 24"):
        advise(unaugmented=toys.source_data())
    with pytest.raises(lt.TransferConfigError, match=r"loader gives a dict.*adapt=lambda batch"):
        advise(data=DataLoader(Named(), batch_size=4))
    with pytest.raises(lt.TransferConfigError, match=r"Labels have shape \(4, 5\).*argmax"):
        advise(data=DataLoader(toys.target_data(), batch_size=4, collate_fn=_mixed))
    with pytest.raises(lt.TransferConfigError, match=r"trainer= has callbacks, max_epochs, devices=2"):
        advise(trainer={"callbacks": [], "max_epochs": 1, "devices": 2})
    with pytest.raises(lt.TransferConfigError, match="trainer is a Trainer"):
        advise(trainer=toys.trainer())
    with pytest.raises(lt.TransferConfigError, match=r"LitToy is a class; pass what it makes: LitToy\(\.\.\.\)"):
        advise(toys.LitToy)
    with pytest.raises(lt.TransferConfigError, match="adapt='image' is no function"):
        advise(adapt="image")
    for labels, words in (
        ([3] * 24, "24 training images: 1, "),
        ([*range(24)], "24, the largest of 1;"),
        ([-1, *[0, 1] * 11, 1], "A label is -1; expected class numbers from 0"),
        ([4, 5] * 12, "Labels run to 5, and the head 'model.fc' gives 5 numbers"),
    ):
        alone = TensorDataset(toys.target_data().tensors[0], torch.tensor(labels))
        with pytest.raises(lt.TransferConfigError, match=words):
            advise(data=DataLoader(alone, batch_size=4))
    larger = TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
    with pytest.raises(lt.TransferConfigError, match=r"of shape \(3, 6, 6\), source images of \(3, 8, 8\)"):
        advise(source=lt.SourceTask(larger, head=toys.source_head()))
    with pytest.raises(lt.TransferConfigError, match="There are 7 labelled training images; advice takes 8"):
        advise(data=DataLoader(TensorDataset(torch.rand(7, 3, 6, 6), torch.arange(7) % 2), batch_size=4))
    with pytest.raises(lt.TransferConfigError, match="are of one group"):
        fold([0, 1, 0, 1], [7, 7, 7, 7])
    with pytest.raises(lt.TransferConfigError, match="does not run its head 'model.fc'"):
        advise(Beside())


def _mixed(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return images, torch.nn.functional.one_hot(labels, 5).float()


class Named(torch.utils.data.Dataset):
    targets = toys.target_data().tensors[1]

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image, label = toys.target_data()[index]
        return {"image": image, "label": label}


class Beside(toys.LitToy):
    def forward(self, pixels):
        return self.model.features(pixels)


def test_batches_that_are_adapted_say_the_same():
    class ByName(toys.LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    pairs = advise(data=DataLoader(toys.target_data(), batch_size=4))
    adapt = {"adapt": lambda batch: (batch["image"], batch["label"])}
    assert advise(ByName(), DataLoader(Named(), batch_size=4), **adapt).measured == pairs.measured
    unlisted = [Named()[index] for index in range(len(Named()))]  # no list of labels: they are read by adapt, too
    assert advise(ByName(), DataLoader(unlisted, batch_size=4), **adapt).measured == pairs.measured
    with pytest.raises(lt.TransferConfigError, match=r"class number.*advise\(\.\.\., adapt=lambda batch"):
        advise(ByName(), DataLoader(unlisted, batch_size=4))


class OfBatch(toys.LitToy):
    """A forward that takes a batch."""

    def forward(self, batch):
        images, _ = batch
        return self.model(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch[1])


def test_a_forward_that_takes_a_batch_is_told_how_images_run_without_a_source_too():
    with pytest.raises(
        lt.TransferConfigError, match=r"advise\(\.\.\., forward=lambda module, images: module.model\(images\)\)"
    ):
        advise(OfBatch())
    asked = advise(OfBatch(), forward=lambda module, images: module.model(images))
    assert asked.measured == advise().measured
    with pytest.raises(lt.TransferConfigError, match="forward='model' is not a function"):
        advise(forward="model")


def test_a_step_that_asks_for_its_logger_gets_one_that_does_nothing():
    class Logging(toys.LitToy):
        def training_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("x", 1.0, batch_idx)
            self.logger.log_hyperparams({"lr": 0.1})
            return super().training_step(batch, batch_idx)

    assert advise(Logging()).measured == advise().measured


def test_nothing_is_like_a_target_that_is_like_nothing(monkeypatch):
    far = [lt.advising.evidence.Setting("elsewhere", 1e6, 0.5, 90.0, {"soft": [1.0, 2.0]}, {"soft": 1.0})]
    monkeypatch.setattr("lightning_transfer.advising.advise.known_settings", lambda: far)
    advice = advise(source=source(), steps=60)
    assert "nothing is expected of any method" in str(advice)
    assert not advice.expected


def test_a_difference_that_never_varies_is_no_certainty():
    marks = (torch.arange(24) % 2).float()[:, None, None, None].expand(24, 3, 6, 6)
    data = TensorDataset(20 * marks, torch.arange(24) % 2)  # told apart by anything
    seen = advise(data=DataLoader(data, batch_size=4), steps=40).measured
    assert seen.probe == seen.tuned == 1.0
    assert seen.error == pytest.approx(stats.t.ppf(0.975, 23) / 1.96 / 24, rel=1e-3)


class Grouped(TensorDataset):
    groups = [index // 4 for index in range(40)]  # noqa: RUF012


def test_images_of_one_group_stand_for_one(monkeypatch):
    asked, folds = [], []
    error = parts.error
    monkeypatch.setattr(measuring, "error", lambda apart, groups: asked.append(groups) or error(apart, groups))
    monkeypatch.setattr(measuring, "fold", lambda *args: folds.append(fold(*args)) or folds[-1])
    single = toys.images(40, toys.TARGET_CLASSES, seed=5)
    found = advise(data=DataLoader(Grouped(*single.tensors), batch_size=8), steps=9).measured
    assert found.scored == 40
    assert asked == [[index // 4 for part in folds[0] for index in part]]
    assert sum(len({index // 4 for index in part}) for part in folds[0]) == 10
    apart, groups = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, 0.0]), [0, 0, 1, 1, 2, 2]
    by_group = [1.0 + 1.0 - 2 / 6, -2 / 6, -1.0 - 2 / 6]
    expected = (sum(value**2 for value in by_group) * 3 / 2) ** 0.5 / 6
    assert error(apart.double(), groups) == pytest.approx(expected * stats.t.ppf(0.975, 2) / 1.96, rel=1e-3)


def test_few_groups_of_images_that_have_nothing_to_tell_have_an_interval_that_holds():
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        apart = torch.from_numpy(100 * random.normal(size=4)).repeat_interleave(5)
        held += abs(apart.mean()) < 1.96 * parts.error(apart, [place // 5 for place in range(20)])
    assert 0.92 < held / 400 < 0.98


def test_two_groups_leave_no_gap_to_measure_and_the_page_says_so():
    class Halves(TensorDataset):
        groups = [index % 2 for index in range(40)]  # noqa: RUF012

    page = str(advise(data=DataLoader(Halves(*toys.images(40, 5, seed=5).tensors), batch_size=8), source=source()))
    assert "40 labelled images of 2 groups, 5 classes" in page
    assert "Domain gap: not measured (beside those held out, all images are of one group)." in page


def test_a_head_by_name_only_is_not_taken_for_the_classifier():
    class Hidden(toys.LitToy):
        def __init__(self):
            super().__init__()
            self.model.fc = torch.nn.Linear(toys.WIDTH, toys.WIDTH)
            self.out = torch.nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)

        def forward(self, pixels):
            return self.out(self.model(pixels).relu())

    with pytest.raises(lt.TransferConfigError, match="is ambiguous"):
        advise(Hidden())
    data = DataLoader(toys.images(60, toys.TARGET_CLASSES, seed=5), batch_size=10)
    torch.manual_seed(1)
    assert advise(Hidden(), data, head="out", steps=150).measured.tuned > 0.5


def test_images_to_score_are_drawn_from_all_classes(monkeypatch):
    monkeypatch.setattr(parts, "MOST", 10)
    pixels, labels = toys.images(400, toys.TARGET_CLASSES, seed=5).tensors
    order = labels.argsort()
    seen = []

    class Scored(toys.LitToy):
        def forward(self, images):
            if not torch.is_grad_enabled() and len(images) == 10:
                seen.append(images)
            return super().forward(images)

    found = advise(Scored(), DataLoader(TensorDataset(pixels[order], labels[order]), batch_size=16), steps=1).measured
    assert found.scored == 40
    assert len({labels[(pixels == image).all((1, 2, 3))].item() for image in torch.cat(seen)}) == 5


class WithTrainer(LightningDataModule):
    """Needs its Trainer, splits at random, and doubles what it moves, or augments it while it trains."""

    def __init__(self):
        super().__init__()
        self.moved = {True: 0, False: 0}

    def setup(self, stage):
        self.images = toys.target_data()
        torch.utils.data.random_split(self.images, [12, 12])

    def train_dataloader(self):
        assert self.trainer.world_size == 1
        return DataLoader(self.images, batch_size=6)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved[self.trainer.training] += 1
        return [batch[0] * 2, batch[1]]


def test_a_datamodule_moves_batches_and_knows_what_is_trained_on():
    module, data = toys.LitToy(), WithTrainer()
    state = torch.get_rng_state()
    found = advise(module, data, steps=3).measured
    assert torch.equal(torch.get_rng_state(), state)
    assert data.trainer is None
    assert data.moved[True] == 4 * 3
    assert data.moved[False] > 0
    pixels, labels = toys.target_data().tensors
    doubled = TensorDataset(2 * pixels, labels)
    assert found == advise(module, DataLoader(doubled, batch_size=6), steps=3).measured


def test_a_schedule_over_epochs_has_them():
    lengths = []

    class Cosine(toys.LitToy):
        def configure_optimizers(self):
            lengths.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            return super().configure_optimizers()

    advise(Cosine(), steps=12)  # of about 18 images in batches of 4
    assert all(epochs in (2, 3) and steps == 12 for epochs, steps in lengths)
    steps = []

    class Counting(toys.LitToy):
        def on_train_end(self):
            steps.append(self.trainer.global_step)

    advise(Counting(), steps=7, trainer={**QUIET, "accumulate_grad_batches": 2, "limit_train_batches": 1})
    assert set(steps) == {7}


def test_a_schedule_that_the_trial_is_too_short_for_is_said_to_be_in_a_trial():
    class OneCycle(toys.LitToy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            rates = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.1, total_steps=99, pct_start=5 / self.trainer.max_epochs
            )
            return [optimizer], [{"scheduler": rates, "interval": "step"}]

    with pytest.raises(ValueError, match=r"(?s)pct_start.*in a trial of [23] epochs; .*more steps="):
        advise(OneCycle(), steps=12)
    advise(OneCycle(), steps=60)
