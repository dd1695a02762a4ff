"""Advice on small data: what a page says, that nothing of the user's is touched, and what is refused."""

import math
import random
from dataclasses import replace

import lightning.pytorch as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import lightning_transfer as lt
from lightning_transfer.advising import trials
from lightning_transfer.advising.advice import Advice, Compared, Measured
from lightning_transfer.advising.verdicts import Difference
from lightning_transfer.splitting import folds
from tests import toys

QUIET = {"accelerator": "cpu"}


def source(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), **options)


def advise(module=None, data=None, **options):
    given = {"steps": 3, "candidates": {}, "trainer": QUIET, **options}
    return lt.advise(module or toys.LitToy(), data or toys.target_loader(), **given)


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


class Bringing(toys.LitToy):
    """Brings callbacks, as a BackboneFinetuning."""

    brought = ()

    def configure_callbacks(self):
        return [*self.brought]


def test_callbacks_of_the_module_that_change_training_are_said_to_be_left_out(recwarn):
    watching, changing = Bringing(), Bringing()
    watching.brought = (L.callbacks.EarlyStopping("val_loss"), L.callbacks.ModelCheckpoint())
    changing.brought = (*watching.brought, L.callbacks.BackboneFinetuning(), lt.FrozenStatistics())
    advise(watching)
    assert not [each for each in recwarn if "configure_callbacks" in str(each.message)]
    with pytest.warns(UserWarning, match="train without BackboneFinetuning, FrozenStatistics, which .* of Bringing"):
        advise(changing)


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


class Noise(torch.utils.data.Dataset):
    """Images of which augmentation leaves nothing."""

    def __init__(self, data):
        self.images, self.targets = data.tensors

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.randn_like(self.images[index]), self.targets[index]


def test_unaugmented_images_are_what_is_looked_at():
    data = toys.target_data()
    clean = advise(steps=1, unaugmented=data, data=DataLoader(Noise(data), batch_size=4)).measured
    assert clean.probe == advise(steps=1).measured.probe


def test_this_packages_methods_look_at_the_unaugmented_images_that_are_trained_on(monkeypatch):
    large = [toys.images(number, toys.SOURCE_CLASSES, seed=7) for number in (24, 300)]
    data, images = (TensorDataset(F.interpolate(each.tensors[0], 24), each.tensors[1] % 3) for each in large)
    looks = []

    class Looking(lt.ProbeStart):
        def on_train_start(self, trainer, pl_module):
            looks.append(torch.stack([image for image, _ in self.unaugmented]))
            super().on_train_start(trainer, pl_module)

    monkeypatch.setattr("lightning_transfer.advising.candidates.ProbeStart", Looking)
    given = {"source": lt.SourceTask(images, head=toys.source_head()), "unaugmented": data, "candidates": None}
    found = advise(data=DataLoader(Noise(data), batch_size=4), **given)
    shown = {each.name: each for each in found.candidates}
    assert (
        shown["SelectiveJointFinetuning"].line == "callbacks=[lt.SelectiveJointFinetuning(source, target=unaugmented)]"
    )
    assert shown["SelectiveJointFinetuning"].folds, shown["SelectiveJointFinetuning"].reason
    assert shown["Looking"].line == "callbacks=[lt.Looking(unaugmented=unaugmented)]"
    outs = folds(data.tensors[1].tolist(), None)
    kept = [data.tensors[0][sorted({*range(len(data))} - {*out})] for out in outs]
    trained_on = [[seen.equal(part) for part in kept].index(True) for seen in looks]
    assert {*trained_on} == {*range(len(kept))}


def test_groups_that_say_no_more_than_classes_do_are_refused():
    data = toys.images(24, 3, seed=5)
    data.groups = [int(label) for label in data.tensors[1]]
    with pytest.raises(lt.TransferConfigError, match="3 of 3 classes have images of only one group: if it is held"):
        advise(data=DataLoader(data, batch_size=8))
    data.groups[:4] = range(10, 14)
    data.groups[4:8] = range(20, 24)
    assert len({int(label) for label in data.tensors[1][:8]}) > 1
    assert advise(data=DataLoader(data, batch_size=8)).measured.images == 24


@pytest.mark.parametrize("is_guessing", [True, False])
def test_answers_that_may_be_no_better_than_the_most_common_class_are_named(is_guessing):
    advice = Advice(seen(commonest=0.4, is_guessing=is_guessing), (GOOD,))
    assert ("than always predicting the most common class (40.0%)" in str(advice)) == is_guessing
    assert (advice.best is None) == is_guessing


def test_too_few_scored_images_are_no_reason_to_look_at_labels():
    few = {"commonest": 0.4, "probe": 0.3, "tuned": 0.4, "is_guessing": True, "scored": 20}
    said = str(Advice(seen(**few), (GOOD,)))
    assert "Give it more minutes: only 20 of 100 images were scored" in said
    assert "Look at your labels" not in said
    assert "Look at your labels" in str(Advice(seen(**few, images=20), (GOOD,)))


def test_of_labels_that_go_with_nothing_nothing_is_said():
    uneven = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)
    shuffled = uneven[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    advice = advise(data=DataLoader(TensorDataset(torch.rand(24, 3, 6, 6), shuffled), batch_size=8))
    assert advice.measured.commonest == 0.5
    assert advice.measured.is_guessing
    assert advice.best is None


def test_with_three_groups_a_perfect_probe_is_not_guessing_and_there_are_three_parts():
    data = toys.images(60, 2, seed=5)
    data.tensors[0].add_(4 * data.tensors[1][:, None, None, None])
    data.groups = [index % 3 for index in range(60)]
    advice = advise(data=DataLoader(data, batch_size=8), steps=1)
    assert advice.measured.probe == 1.0
    assert not advice.measured.is_guessing
    assert "leaves out one of 3 parts" in str(advice)


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


def test_what_is_not_right_is_refused_by_name():
    with pytest.raises(lt.TransferConfigError, match="source is a TensorDataset; wrap the dataset: source="):
        advise(source=toys.source_data())
    with pytest.raises(lt.TransferConfigError, match="steps=0"):
        advise(steps=0)
    with pytest.raises(lt.TransferConfigError, match=r"class LightningDataModule; write LightningDataModule\(\)"):
        advise(data=LightningDataModule)
    with pytest.raises(lt.TransferConfigError, match="ToyNet is neither a LightningModule nor a LightningDataModule"):
        advise(toys.toy_net())
    with pytest.raises(lt.TransferConfigError, match="cannot be split"):
        advise(data=[(torch.zeros(2, 3, 6, 6), torch.tensor([0, 1]))])
    with pytest.raises(lt.TransferConfigError, match="unaugmented has 20 images, the train loader's dataset 24"):
        advise(unaugmented=toys.source_data())
    with pytest.raises(lt.TransferConfigError, match=r"loader gives a dict.*adapt=lambda batch"):
        advise(data=DataLoader(Named(), batch_size=4))
    with pytest.raises(lt.TransferConfigError, match=r"Labels have shape \(4, 5\).*argmax"):
        advise(data=DataLoader(toys.target_data(), batch_size=4, collate_fn=_mixed))
    with pytest.raises(lt.TransferConfigError, match=r"trainer= has callbacks, devices=2"):
        advise(trainer={"callbacks": [], "devices": 2})
    with pytest.raises(lt.TransferConfigError, match=r"trainer\['max_epochs'\]=0"):
        advise(trainer={**QUIET, "max_epochs": 0})
    with pytest.raises(lt.TransferConfigError, match="trainer is a Trainer"):
        advise(trainer=toys.trainer())
    with pytest.raises(lt.TransferConfigError, match=r"LitToy is a class; pass an instance: LitToy\(\.\.\.\)"):
        advise(toys.LitToy)
    with pytest.raises(lt.TransferConfigError, match="adapt='image' is not a function"):
        advise(adapt="image")
    for labels, words in (
        ([3] * 24, "24 images of 1 classes"),
        ([*range(24)], "of 24 classes, the largest of size 1;"),
        ([-1, *[0, 1] * 11, 1], "A label is -1; expected class numbers from 0"),
        ([4, 5] * 12, "Labels run to 5, and the head 'model.fc' gives 5 numbers"),
    ):
        alone = TensorDataset(toys.target_data().tensors[0], torch.tensor(labels))
        with pytest.raises(lt.TransferConfigError, match=words):
            advise(data=DataLoader(alone, batch_size=4))
    with pytest.raises(lt.TransferConfigError, match="There are 7 images of 2 classes.* and 10 images"):
        advise(data=DataLoader(TensorDataset(torch.rand(7, 3, 6, 6), torch.arange(7) % 2), batch_size=4))
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
    with pytest.raises(lt.TransferConfigError, match=r"class number.*also take adapt=lambda batch"):
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


class Grouped(TensorDataset):
    groups = [index // 4 for index in range(40)]  # noqa: RUF012


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
    assert advise(Hidden(), data, head="out", steps=80).measured.tuned > 0.5


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


def test_groups_stay_together_and_stand_for_one():
    single = toys.images(40, toys.TARGET_CLASSES, seed=7)
    found = advise(data=DataLoader(Grouped(*single.tensors), batch_size=8), steps=9)
    alone = advise(data=DataLoader(single, batch_size=8), steps=9)
    assert (found.measured.groups, alone.measured.groups) == (10, None)
    assert found.candidates[0].difference.half > alone.candidates[0].difference.half
    assert "40 labelled images of 10 groups, 5 classes" in str(found)


def test_of_each_part_so_many_are_scored(monkeypatch):
    monkeypatch.setattr(trials, "MOST", 1)
    found = advise(data=DataLoader(Grouped(*toys.images(40, toys.TARGET_CLASSES, seed=5).tensors), batch_size=8))
    assert (found.measured.groups, found.measured.scored) == (10, 5)


def test_two_groups_are_held_out_in_turns():
    class Halves(TensorDataset):
        groups = [index % 2 for index in range(40)]  # noqa: RUF012

    found = advise(data=DataLoader(Halves(*toys.images(40, 5, seed=5).tensors), batch_size=8))
    assert (found.measured.folds, found.measured.scored) == (2, 40)
    assert "of 2 groups" in str(found)


def test_one_logit_is_scored_by_its_sign():
    class Single(toys.LitToy):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model.fc = torch.nn.Linear(toys.WIDTH, 1)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())

    data = toys.images(80, 2, seed=5)
    found = advise(Single(), DataLoader(data, batch_size=8), steps=60).measured
    assert found.tuned > 0.7
    assert found.probe > 0.7
    with pytest.raises(lt.TransferConfigError, match=r"Labels run to 4, and the head 'model.fc' gives 1 numbers"):
        advise(Single(), steps=1)


class Rate(L.Callback):
    """Multiplies the learning rate."""

    def __init__(self, times):
        self.times = times

    def on_train_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= self.times


class Shy(toys.LitToy):
    """With a learning rate that is far too small, and a head that knows nothing."""

    def __init__(self):
        super().__init__()
        torch.nn.init.zeros_(self.model.fc.weight)
        self.model.fc.weight.data[0] = 1e-3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_what_helps_is_found_and_what_harms_is_dropped_early():
    data = DataLoader(toys.images(200, toys.TARGET_CLASSES, seed=6), batch_size=20)
    planted = {"faster": lambda: [Rate(10.0)], "shifted": lambda: [Shifting()], "same": lambda: [Rate(1.0)]}
    found = advise(Shy(), data, candidates=planted, steps=24)
    verdicts = {each.name: (each.verdict, each.folds) for each in found.candidates}
    assert verdicts["faster"] == ("shown better", 5)
    assert verdicts["shifted"] == ("dropped", 2)
    assert verdicts["same"] == ("not shown", 5)
    assert found.measured.falls_short
    assert found.best.name == found.candidates[0].name
    assert all(not each.line for each in found.candidates if each.name in planted)  # which is the user's own
    assert next(each for each in found.candidates if each.name == "same").difference.points == 0


class Shifting(L.Callback):
    """Trains on another's labels."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[1].copy_((batch[1] + 1) % toys.TARGET_CLASSES)

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1


def test_this_packages_methods_are_tried_as_they_come_and_refusals_are_listed():
    found = advise(candidates=None, source=source(), steps=6, head="model.fc")
    lines = {each.name: each.line for each in found.candidates}
    assert lines.pop("linear probe").startswith(
        "callbacks=[lt.ProbeStart(head='model.fc'), lt.FrozenStatistics()], with requires_grad_(False)"
    )
    assert lines == {
        "ProbeStart": "callbacks=[lt.ProbeStart(head='model.fc')]",
        "FrozenStatistics": "callbacks=[lt.FrozenStatistics()]",
        "GatedTransfer": "callbacks=[lt.GatedTransfer(head='model.fc')]",
        "AdaFilter": "callbacks=[lt.AdaFilter()]",
        "SoftFinetuning": "callbacks=[lt.SoftFinetuning(source, head='model.fc')]",
        "SelectiveJointFinetuning": "callbacks=[lt.SelectiveJointFinetuning(source, head='model.fc')]",
    }
    refused = {each.name: each.reason for each in found.candidates if each.verdict == "refused"}
    assert refused["GatedTransfer"] == "ratio=16 does not divide the 8 features"
    assert refused["SelectiveJointFinetuning"].startswith("neighbors=300, the default, exceeds the 20 source images")
    assert "GatedTransfer" in str(found)
    assert "refused: ratio=16 does not divide the 8 features\n" in str(found)
    tried = {each.name for each in found.candidates if each.folds}
    assert tried == {"linear probe", "ProbeStart", "FrozenStatistics", "SoftFinetuning"}
    assert {*lines} - {each.name for each in advise(candidates=None).candidates} == {
        "SoftFinetuning",
        "SelectiveJointFinetuning",
    }


def test_what_the_pretrained_network_knows_is_tried():
    pretrained = toys.toy_net()
    pretrained.fc = toys.source_head()
    found = advise(candidates=None, source=lt.SourceKnowledge(pretrained), steps=6)
    held = next(each for each in found.candidates if each.name == "SoftFinetuning")
    assert held.line == "callbacks=[lt.SoftFinetuning(source)]"
    assert held.folds
    assert "SelectiveJointFinetuning" not in {each.name for each in found.candidates}


def test_a_module_that_says_how_images_run_says_so_to_candidates_too():
    forward = {"forward": lambda module, images: module.model(images)}
    found = advise(OfBatch(), candidates=None, **forward)
    start = next(each for each in found.candidates if each.name == "ProbeStart")
    assert start.line == "callbacks=[lt.ProbeStart(forward=forward)]"
    assert start.folds


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([lt.GatedTransfer], "candidates is a list; expected a mapping of names"),
        ({"a": lt.GatedTransfer()}, r"candidates\['a'\] is a GatedTransfer; expected a function"),
        ({"fine-tuning": list}, "has the name 'fine-tuning'; give each another one"),
        ({1: list}, "has the name 1; give"),
    ],
)
def test_candidates_that_are_none_are_refused(candidates, words):
    with pytest.raises(lt.TransferConfigError, match=words):
        advise(candidates=candidates)


def test_a_candidate_that_makes_no_callbacks_or_the_same_ones_is_listed_as_refused():
    used = L.Callback()
    found = advise(candidates={"single": lambda: L.Callback(), "used": lambda: [used]})
    assert {each.name: each.reason for each in found.candidates if each.verdict == "refused"} == {
        "single": "candidates['single'] makes a Callback; expected a list of callbacks: "
        "lambda: [lt.GatedTransfer(ratio=8)]",
        "used": "candidates['used'] makes the same callback twice, which would bring one training's state into the "
        "next",
    }


def test_a_training_that_ends_early_is_not_scored():
    class Ending(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    found = advise(candidates={"early": lambda: [Ending()]}, steps=20)
    early = next(each for each in found.candidates if each.name == "early")
    assert early.reason.startswith("The training was ended by the module or Ending after 1 of its 20 steps")


def test_minutes_that_not_one_training_fits_into_are_refused_by_what_it_takes():
    with pytest.raises(
        lt.TransferConfigError,
        match=r"One fine-tuning of 5000 steps takes about .* minutes here, .* minutes=0.0001. Pass minutes=\d+ or",
    ):
        advise(steps=5000, minutes=0.0001)
    with pytest.raises(lt.TransferConfigError, match="minutes=-1"):
        advise(minutes=-1)


def seen(**changes):
    known = {"images": 100, "classes": 5, "fewest": 20, "groups": None, "commonest": 0.2, "scored": 100}
    told = {"probe": 0.6, "tuned": 0.6, "is_guessing": False, "falls_short": False}
    return Measured(**{**known, **told, "steps": 50, "passes": 5.0, "parts": 5, "folds": 5, **changes})


GOOD = Compared("<b>mine</b>", "lines <i>", Difference(8.0, 4.0), 5, cost=1.25)
OPEN = Compared("linear probe", "frozen", Difference(1.0, 4.0), 5, cost=0.1)
STATISTICS = replace(OPEN, name="FrozenStatistics", cost=1.0)
DROPPED = Compared("other", "other", Difference(-2.0, 9.0), 1, is_dropped=True, cost=2.0)
REFUSED = Compared("third", "third", None, 0, is_dropped=True, is_refused=True, reason="It is not for it")
LATE = replace(REFUSED, is_refused=False, reason="no time was left for it")


def test_the_page_says_what_was_done_what_came_out_and_what_to_write():
    lines = str(Advice(seen(trainings=12, seconds=31.4), (GOOD, OPEN, DROPPED, REFUSED, LATE))).splitlines()
    assert lines[0] == "100 labelled images, 5 classes, at least 20 of each."
    assert lines[1].startswith("12 trainings of 50 steps (5 passes; fine-tuning took 31 seconds). Each leaves out one")
    assert lines[2] == "Accuracy on 100 images: fine-tuning 60.0%, a linear probe 60.0%."
    assert lines[3] == (
        "3 candidates are compared. The intervals of those scored on all parts hold jointly with 95% confidence. They "
        "include 2.0 points for the difference between seeds."
    )
    grouped = str(Advice(seen(groups=20), (GOOD,))).splitlines()[3]
    assert grouped.endswith(
        "They account for the groups of images, and include 2.0 points for the difference between seeds."
    )
    table = [line.split("  ") for line in lines[6:11]]
    assert [[cell.strip() for cell in row if cell] for row in table] == [
        ["<b>mine</b>", "+8.0 +- 4.0", "1.2", "5", "shown better"],
        ["linear probe", "+1.0 +- 4.0", "0.1", "5", "not shown"],
        ["other", "-2.0 +- 9.0", "2.0", "1", "dropped after 1 part"],
        ["third", "refused: It is not for it"],
        ["third", "not trained: no time was left for it"],
    ]
    assert lines[-2].startswith("Use <b>mine</b>: it is shown to be better than fine-tuning, by +8.0 +- 4.0 points, at")
    assert lines[-1] == "    lines <i>"


def test_the_best_is_not_one_that_was_lucky_in_one_part():
    lucky = replace(GOOD, name="lucky", difference=Difference(20.0, 9.0), folds=1)
    assert Advice(seen(), (replace(lucky, is_dropped=True), OPEN)).best is None
    assert Advice(seen(), (lucky, GOOD)).best is GOOD
    assert replace(lucky, is_dropped=True).row[-1] == "dropped after 1 part"


def test_what_is_shown_in_a_notebook_is_escaped():
    page = Advice(seen(), (GOOD,))._repr_html_()
    assert "<td>&lt;b&gt;mine&lt;/b&gt;</td><td>+8.0 +- 4.0</td>" in page
    assert "lines &lt;i&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 2


@pytest.mark.parametrize(
    ("measured", "candidates", "says", "line"),
    [
        (seen(round_seconds=700), (OPEN, LATE), "Nothing was compared but the probe: no candidate fitted into", None),
        (seen(round_seconds=700), (OPEN, LATE), "Pass minutes=12 or more", None),
        (seen(), (OPEN, REFUSED), "Stay with fine-tuning: nothing else is shown", None),
        (seen(), (), "Stay with fine-tuning: nothing else is shown to be better.", None),
        (seen(), (OPEN, DROPPED), "Stay with fine-tuning: none of 2 is shown to be better. With 100 images", None),
        (seen(), (OPEN, DROPPED), "shown. Not shown to be worse: the linear probe, which costs little.", None),
        (seen(), (OPEN, STATISTICS), "little, and FrozenStatistics, which gained most in", None),
        (seen(), (replace(OPEN, difference=Difference(-9.0, 4.0)),), "less than about 4 points cannot be shown.", None),
        (
            seen(),
            (OPEN, replace(STATISTICS, difference=Difference(-2.0, 7.4))),
            "less than about 4 to 7 points cannot be shown. Not",
            None,
        ),
        (seen(folds=3), (OPEN,), "Pass more minutes=: 3 of 5 parts were scored. Not shown", None),
        (seen(), (replace(OPEN, difference=Difference(9.0, math.inf)),), "better. Not shown to be", None),
        (seen(), (replace(GOOD, line=""), OPEN), "Use <b>mine</b>: it is shown", None),
        (seen(falls_short=True), (GOOD, OPEN), "too few steps. Until then use <b>mine</b>.", "lines <i>"),
        (seen(is_guessing=True), (GOOD, OPEN), "always predicting the most common class (20.0%)", None),
    ],
)
def test_what_to_do_is_one_line(measured, candidates, says, line):
    end = str(Advice(measured, candidates)).split("\n\n")[-1].splitlines()
    assert says in end[0]
    assert end[1:] == ([] if line is None else [f"    {line}"])


@pytest.mark.parametrize(
    "worse", [{"is_dropped": True}, {"difference": Difference(-9.0, 4.0)}, {"difference": None, "is_refused": True}]
)
def test_what_may_be_worse_is_not_named(worse):
    candidates = replace(OPEN, **worse), replace(STATISTICS, **worse)
    assert "Not shown to be worse" not in str(Advice(seen(), candidates))


def test_fine_tuning_that_goes_wrong_is_named():
    class Wild(toys.LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e4)

    data = DataLoader(toys.images(200, toys.TARGET_CLASSES, seed=6), batch_size=20)
    wrong = advise(Wild(), data, steps=30, candidates=None)
    assert wrong.measured.falls_short
    assert {each.name for each in wrong.candidates if each.folds} == {"linear probe", "FrozenStatistics", "ProbeStart"}
    assert "not trained: it builds on fine-tuning, which falls short of the probe" in str(wrong)
    assert "learning rate is too high" in str(wrong)
    assert wrong.best.name == "linear probe"


def test_a_module_without_a_forward_is_told_how_it_was_run():
    class Headless(toys.LitToy):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    assert "were run through 'model'" in str(advise(Headless()))
    assert "without a forward" not in str(advise()).lower()
