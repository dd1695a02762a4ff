"""Trainings of a paired trial: against hand-written loops, with the same batches for all, and within their time."""

import copy

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.advising import trials
from lightning_transfer.advising.advise import compare
from lightning_transfer.advising.candidates import PROBE, Candidate
from lightning_transfer.advising.reading import Reading
from lightning_transfer.advising.trials import OutOfTimeError, PairedTrials
from lightning_transfer.glue.trials import trials_of
from lightning_transfer.probing import fit_probe
from lightning_transfer.progress import no_progress
from lightning_transfer.splitting import folds
from tests import toys

QUIET = {"accelerator": "cpu"}
PLAIN = Candidate("fine-tuning", "", list)


class Clock:
    """Goes on by a second whenever a step is trained."""

    now = 0.0

    def __call__(self):
        return self.now


def paired(module, data, *, steps, clock=Clock(), deadline=1e9):  # noqa: B008
    given = trials_of(module, data, QUIET, unaugmented=None)
    found = PairedTrials(module, given, Reading(), clock=clock, deadline=deadline)
    found.steps = steps
    return found


class Freezing(L.Callback):
    """Trains the head alone."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.model.conv.requires_grad_(False)
        pl_module.model.bn.requires_grad_(False)


def test_what_is_right_is_what_plain_trainers_find():
    data, module = toys.images(40, toys.TARGET_CLASSES, seed=5), toys.LitToy()
    pixels, labels = data.tensors
    found = paired(module, DataLoader(data, batch_size=8), steps=20)
    parts = folds(labels.tolist(), None, num_folds=5)
    assert sorted(index for out in parts for index in out) == list(range(40))
    for fold in (0, 3):
        out, kept = parts[fold], [index for index in range(40) if index not in parts[fold]]
        seen = {}
        for candidate in (PLAIN, Candidate("frozen", "", lambda: [Freezing()])):
            seen |= {name: scored.right for name, scored in found.train(candidate, fold).items()}
        for name, callbacks in (("fine-tuning", []), ("frozen", [Freezing()])):
            twin = copy.deepcopy(module)
            loader = DataLoader(TensorDataset(pixels[kept], labels[kept]), batch_size=8)
            toys.trainer(callbacks, max_epochs=-1, max_steps=20).fit(twin, loader)
            with torch.no_grad():
                assert torch.equal(seen[name], twin.eval()(pixels[out]).argmax(1) == labels[out])
        with torch.no_grad():
            features = module.model.eval().features(pixels)
        says = fit_probe(features[kept], labels[kept], num_classes=5)
        assert torch.equal(seen["linear probe"], says(features[out]).argmax(1) == labels[out])


class Noisy(Dataset):
    """Augments with every generator."""

    targets = toys.target_data().tensors[1]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return toys.target_data()[index][0] + torch.rand(1) + np.random.rand(), self.targets[index]


class Drawing(L.Callback):
    """Draws random numbers wherever it can."""

    def setup(self, trainer, pl_module, stage):
        torch.rand(3)

    def on_train_start(self, trainer, pl_module):
        torch.rand(5)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(7), np.random.rand(2)


def test_candidates_have_the_same_network_batches_and_augmentation_and_folds_have_not():
    seen = []

    class Recording(toys.LitToy):
        def configure_model(self):
            if not hasattr(self, "made"):
                self.made = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            seen[-1] += [batch[0].clone(), self.made.weight.detach().clone()]
            return super().training_step(batch, batch_idx)

    found = paired(Recording(), DataLoader(Noisy(), batch_size=4, shuffle=True), steps=12)
    for candidate, fold in ((PLAIN, 0), (Candidate("drawing", "", lambda: [Drawing()]), 0), (PLAIN, 1)):
        seen.append([])
        found.train(candidate, fold)
    plain, drawing, other = seen
    assert len(plain) == 24
    assert all(map(torch.equal, plain, drawing))
    assert not torch.equal(plain[0], plain[10])
    assert not torch.equal(plain[1], other[1])


class Answering(L.Callback):
    """Notes what the module says in the end, by its own forward."""

    says = None

    def on_train_end(self, trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            Answering.says = pl_module(toys.images(60, 5, seed=5).tensors[0]).argmax(1)
        pl_module.train()


@pytest.mark.parametrize(
    "make", [lambda: lt.CollaborativeFinetuning([toys.OtherNet()]), lambda: lt.GatedTransfer(ratio=4)]
)
def test_what_took_the_heads_place_is_scored_as_a_whole(make):
    torch.manual_seed(0)
    data = toys.images(60, 5, seed=5)
    module = toys.LitToy()
    torch.nn.init.zeros_(module.model.fc.weight)  # another network beside it decides
    found = paired(module, DataLoader(data, batch_size=8), steps=1)
    found.train(PLAIN, 0)
    right = found.train(Candidate("changed", "", lambda: [make(), Answering()]), 0)["changed"].right
    out = found.scored(0)
    assert torch.equal(right, Answering.says[out] == data.tensors[1][out])


class Ticking(toys.LitToy):
    """Takes some seconds a step."""

    clock, seconds = Clock(), 1.0

    def training_step(self, batch, batch_idx):
        self.clock.now += self.seconds
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("deadline", "stopped_at"), [(100.0, None), (79.0, 11), (8.0, 9)])
def test_a_training_that_does_not_fit_is_stopped_when_that_is_known(deadline, stopped_at):
    Ticking.clock = clock = Clock()
    found = paired(Ticking(), toys.target_loader(), steps=80, clock=clock, deadline=deadline)
    if stopped_at is None:
        assert found.train(PLAIN, 0)["fine-tuning"].seconds == 80.0
        return
    with pytest.raises(OutOfTimeError) as caught:
        found.train(PLAIN, 0)
    assert clock.now == stopped_at
    assert caught.value.args[0] == 80.0


class Several(Ticking):
    """Takes three optimizer steps a batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for _ in range(3):
            self.optimizers().step()


@pytest.mark.parametrize(("module", "options"), [(Ticking(), {"accumulate_grad_batches": 3}), (Several(), {})])
def test_a_bar_counts_optimizer_steps(module, options):
    given = trials_of(module, toys.target_loader(), {**QUIET, **options}, unaugmented=None)
    found, seen = PairedTrials(module, given, Reading(), clock=Clock(), deadline=1e9), []
    found.steps, found.step = 9, lambda more, note: seen.append(more)
    found.train(PLAIN, 0)
    assert sum(seen) == 9


def test_a_training_with_several_steps_a_batch_is_stopped_when_it_is_known_not_to_fit():
    Several.clock = clock = Clock()
    found = paired(Several(), toys.target_loader(), steps=90, clock=clock, deadline=29.0)  # 30 batches
    with pytest.raises(OutOfTimeError):
        found.train(PLAIN, 0)
    assert clock.now == 5.0  # 3 steps, and 12 more


@pytest.mark.parametrize("minutes", [1.5, 4, 7, 30])
def test_trials_stay_within_the_minutes_given(minutes):
    Ticking.clock = clock = Clock()
    module, data = Ticking(), toys.target_loader()
    module.seconds = 4.0
    given = trials_of(module, data, QUIET, unaugmented=None)
    rivals = [Candidate(PROBE, "", list, cost=0.0), *(Candidate(name, name, lambda: [L.Callback()]) for name in "ab")]
    options = {"lengths": {}, "progress": no_progress, "clock": clock, "minutes": minutes}
    found = compare(module, given, rivals, Reading(), steps=15, **options)
    assert clock.now <= 60 * minutes
    assert found.measured.trainings == clock.now / 60 >= min(int(minutes) - 1, 15)
    assert found.measured.seconds == 60.0
    assert {each.difference.points for each in found.candidates if each.difference and each.name in "ab"} <= {0.0}


def test_no_batch_of_one_image_is_trained_on():
    sizes = []

    class Sized(toys.LitToy):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    found = paired(Sized(), DataLoader(toys.images(26, 2, seed=1), batch_size=5), steps=8)  # now and then 21 train
    for fold in range(5):
        found.train(PLAIN, fold)
    assert {len(found.kept(fold)) for fold in range(5)} == {20, 21}
    assert 1 not in sizes


def test_images_to_score_are_drawn_from_all_classes(monkeypatch):
    monkeypatch.setattr(trials, "MOST", 10)
    pixels, labels = toys.images(400, toys.TARGET_CLASSES, seed=5).tensors
    order = labels.argsort()
    found = paired(toys.LitToy(), DataLoader(TensorDataset(pixels[order], labels[order]), batch_size=16), steps=1)
    scored = found.scored(0)
    assert len(scored) == len(found.train(PLAIN, 0)["fine-tuning"].right) == 10
    assert len({int(labels[order][index]) for index in scored}) == 5


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
    with pytest.warns(UserWarning, match="WithTrainer draws random numbers in setup"):
        found = lt.advise(module, data, candidates={}, steps=3, trainer=QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert data.trainer is None
    assert data.moved[True] == found.measured.folds * 3
    assert data.moved[False] > 0
    pixels, labels = toys.target_data().tensors
    doubled = DataLoader(TensorDataset(2 * pixels, labels), batch_size=6)
    assert found == lt.advise(module, doubled, candidates={}, steps=3, trainer=QUIET)


def test_a_schedule_over_epochs_has_them():
    lengths, steps = [], []

    class Cosine(toys.LitToy):
        def configure_optimizers(self):
            lengths.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            return super().configure_optimizers()

        def on_train_end(self):
            steps.append(self.trainer.global_step)

    lt.advise(Cosine(), toys.target_loader(), candidates={}, steps=12, trainer=QUIET)  # of about 19 images in fours
    assert all(epochs in (2, 3) and number == 12 for epochs, number in lengths)
    more = {**QUIET, "accumulate_grad_batches": 2, "limit_train_batches": 1}
    lt.advise(Cosine(), toys.target_loader(), candidates={}, steps=7, trainer=more)
    assert (steps[:5], {*steps[5:]}) == ([12] * 5, {7})


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"trainer": QUIET}, 25 * 2),
        ({"trainer": {**QUIET, "accumulate_grad_batches": 2}}, 25),
        ({"trainer": {**QUIET, "max_epochs": 2}}, 2 * 2),
        ({"trainer": {**QUIET, "max_epochs": 2, "max_steps": -1}}, 2 * 2),
        ({"trainer": {**QUIET, "max_epochs": 9, "max_steps": 7}}, 7),
        ({"trainer": {**QUIET, "max_epochs": 2}, "steps": 3}, 3),
    ],
)
def test_trials_are_as_long_as_the_users_training(options, steps):
    found = lt.advise(toys.LitToy(), toys.target_loader(12), candidates={}, **options).measured
    assert found.steps == steps
    assert found.passes == steps / (1 if "accumulate_grad_batches" in options["trainer"] else 2)


def test_a_schedule_that_the_trial_is_too_short_for_is_said_to_be_in_a_trial():
    class OneCycle(toys.LitToy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            rates = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.1, total_steps=99, pct_start=5 / self.trainer.max_epochs
            )
            return [optimizer], [{"scheduler": rates, "interval": "step"}]

    with pytest.raises(ValueError, match=r"(?s)pct_start.*in a trial of [23] epochs; .*more steps="):
        lt.advise(OneCycle(), toys.target_loader(), candidates={}, steps=12, trainer=QUIET)
    lt.advise(OneCycle(), toys.target_loader(), candidates={}, steps=60, trainer=QUIET)


class Changing(toys.LitToy):
    """Its step changes images or labels first."""

    def __init__(self, images=lambda images: images, labels=lambda labels: labels):
        super().__init__()
        self.images, self.labels = images, labels

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self(self.images(images)), self.labels(labels))


def positive(labels=lambda labels: labels):
    images, numbers = toys.target_data().tensors
    return DataLoader(TensorDataset(images.sigmoid(), labels(numbers)), batch_size=8)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Changing(lambda images: (images - 0.45) / 0.225), "training_step changes images .*advise.*forward="),
        (Changing(labels=lambda labels: (labels + 1) % 5), r"trains on the labels \[\d.*, and the batch has \[\d"),
        (Changing(labels=lambda labels: labels // 3), "trains on the labels"),
    ],
)
def test_a_step_that_trains_on_what_is_not_scored_is_refused(module, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        paired(module, positive(), steps=2).train(PLAIN, 0)


def test_what_is_said_of_it_is_scored():
    """By hand: images and labels that are changed in the dataset give the same."""

    def normalized(images):
        return (images - 0.45) / 0.225

    def forward(module, images):
        return module(normalized(images))

    def adapt(batch):
        return batch[0], (batch[1] + 1) % 5

    module, data = Changing(normalized, lambda labels: (labels + 1) % 5), positive()
    given = trials_of(module, data, QUIET, unaugmented=None, adapt=adapt)
    said = PairedTrials(module, given, Reading(adapt=adapt, forward=forward), clock=Clock(), deadline=1e9)
    said.steps = 12
    images, labels = data.dataset.tensors
    done = paired(toys.LitToy(), DataLoader(TensorDataset(normalized(images), (labels + 1) % 5), 8), steps=12)
    for name, scored in said.train(PLAIN, 0).items():
        assert torch.equal(scored.right, done.train(PLAIN, 0)[name].right)


FEW = [0, 0, 0, 0, 1, 2, 3, 4]


class Beside(Changing):
    """Has a main loss of its own beside one of torch's on other labels."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        main = -logits.log_softmax(1).gather(1, labels[:, None]).mean()
        return main + torch.nn.functional.cross_entropy(logits[:, :2] * 0.5, (labels > 2).long())


class NormFirst(toys.LitToy):
    """Normalises images by their batch, in the network."""

    def __init__(self):
        super().__init__()
        self.model.conv = torch.nn.Sequential(torch.nn.BatchNorm2d(3), self.model.conv)


@pytest.mark.parametrize("module", [Beside(), NormFirst()])
def test_what_the_network_does_and_losses_beside_the_main_one_are_not_refused(module):
    assert set(paired(module, positive(), steps=2).train(PLAIN, 0)) == {PROBE, "fine-tuning"}


@pytest.mark.parametrize(
    "module",
    [
        Changing(lambda images: 0.5 * images + 0.5 * images.roll(1, 0)),
        Changing(labels=lambda labels: labels.roll(1)),  # of a MixUp whose share is 0
        Changing(labels=lambda labels: torch.nn.functional.one_hot(labels, 5).float() * 0.9 + 0.02),
        Changing(labels=lambda labels: torch.where(torch.arange(len(labels)) == 0, -100, labels)),
        Changing(lambda images: images[FEW], lambda labels: labels[FEW]),
        Changing(lambda images: images.rot90(1, (2, 3)), lambda labels: torch.arange(len(labels)) % 4),
        Changing(lambda images: torch.where(torch.rand(images.shape) < 0.15, 3.0, images)),
    ],
    ids=["mixed", "partners", "smoothed", "ignored", "drawn again", "turned", "noisy"],
)
def test_augmentation_in_the_step_is_not_refused(module):
    assert set(paired(module, positive(), steps=2).train(PLAIN, 0)) == {PROBE, "fine-tuning"}
