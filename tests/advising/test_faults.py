"""What advice does where a split is drawn, an option shortens a training, or a training crashes or gives NaN."""

import lightning.pytorch as L
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_transfer as lt
from lightning_transfer.advising.backbones import pictures_of
from tests import toys

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def images():
    pixels, labels = toys.images(40, toys.TARGET_CLASSES, seed=1).tensors
    return TensorDataset(pixels.sigmoid(), labels)


def advise(module=None, data=None, **options):
    given = {"steps": 2, "candidates": {}, "trainer": QUIET, **options}
    return lt.advise(module or toys.LitToy(), data or DataLoader(images(), batch_size=8), **given)


def refused(found):
    return {each.name: each.reason for each in found.candidates if each.verdict == "refused"}


class Split(L.LightningDataModule):
    """Splits at random, as most do."""

    options = {}  # noqa: RUF012

    def setup(self, stage):
        self.train, self.val = random_split(images(), [32, 8], **self.options)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)


class Partner(lt.CollaborativeFinetuning):
    """Beside a small network."""

    def __init__(self):
        super().__init__([toys.OtherNet()])


def searched(data):
    lt.LayerSearch(particles=1, iterations=1, proxy_epochs=1).run(toys.LitToy(), data, Partner(), trainer=QUIET)


@pytest.mark.parametrize("look", [lambda data: advise(data=data), searched, lambda data: pictures_of(data, 0)])
def test_the_next_fit_splits_as_what_was_looked_at(look):
    L.seed_everything(7)
    data = Split()
    with pytest.warns(UserWarning, match=r"Split draws random numbers in setup.*L.seed_everything\(0\).*a generator"):
        look(data)
    seen = {*data.train.indices}
    toys.trainer().fit(toys.LitToy(), datamodule=data)
    assert not seen & {*data.val.indices}


class Generated(Split):
    @property
    def options(self):
        return {"generator": torch.Generator().manual_seed(0)}


class Seeding(Split):
    def setup(self, stage):
        torch.manual_seed(3)
        super().setup(stage)


@pytest.mark.parametrize("make", [Generated, Seeding])
def test_a_split_that_is_always_the_same_is_not_warned_of(make):
    assert advise(data=make()).measured.images == 32


def test_limit_train_batches_counts_in_the_length_and_in_the_epochs():
    batches = []

    class Seen(toys.LitToy):
        def training_step(self, batch, batch_idx):
            batches.append((self.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    for limit in (2, 0.5):  # of 4 batches
        batches.clear()
        found = advise(Seen(), steps=None, trainer={**QUIET, "max_epochs": 3, "limit_train_batches": limit})
        assert batches == [(epoch, index) for epoch in range(3) for index in range(2)] * found.measured.folds
        assert (found.measured.steps, found.measured.passes) == (6, 1.5)


class Rate(L.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = float("inf")


class Crashing(L.Callback):
    """Raises at a step, when those that are left to it are done."""

    def __init__(self, error, left=()):
        self.error, self.left = error, iter(left)

    def on_train_batch_start(self, *_):
        if next(self.left, None) is None:
            raise self.error


def test_what_is_not_a_number_is_named():
    found = advise(candidates={"wild": lambda: [Rate()], "same": lambda: [L.Callback()]})
    assert refused(found) == {"wild": "After 2 steps its outputs are not a number (NaN) for 8 of 8 images"}
    assert {each.name for each in found.candidates if each.folds == 5} == {"linear probe", "same"}

    class Wild(toys.LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=float("inf"))

    with pytest.raises(FloatingPointError, match=r"(?s)2 steps its outputs are not a number.*in plain fine-tuning"):
        advise(Wild())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_whose_features_are_not_finite_are_named(value):
    """Without this they would count as wrong, or the probe's fit would fail and the error would not name the images."""
    pixels, labels = images().tensors
    pixels[[3, 17]] = value
    with pytest.raises(lt.TransferConfigError, match=r"features of images \[3, 17\] are not finite"):
        advise(data=DataLoader(TensorDataset(pixels, labels), batch_size=8))


@pytest.mark.parametrize("minutes", [0, 1e-9])
def test_no_minutes_are_refused_by_what_it_takes(minutes):
    with pytest.raises(lt.TransferConfigError, match=rf"One fine-tuning of 2 steps takes .* minutes={minutes:g}"):
        advise(minutes=minutes)


def test_a_candidate_that_crashes_is_listed_and_the_others_go_on():
    left = iter([1] * 6)
    candidates = {
        "late": lambda: [Crashing(KeyError("weight"), left)],  # in the second part
        "lines": lambda: [Crashing(RuntimeError("Out of memory: lost.\nMore"))],
        "early": lambda: [EarlyStopping("val_loss")],
        "files": lambda: [ModelCheckpoint()],
        "timer": lambda: [Timer({"seconds": 0})],
        "unmade": lambda: [missing],  # noqa: F821
        "same": lambda: [L.Callback()],
    }
    found = advise(candidates=candidates, steps=6)
    reasons = refused(found)
    assert reasons.pop("early").startswith("RuntimeError: Early stopping conditioned on metric `val_loss`")
    assert reasons.pop("files").startswith("No Trainer can be made of trainer= and the callbacks: Trainer was conf")
    assert reasons.pop("timer").startswith("The training was ended by the module or Timer after ")
    assert reasons == {
        "late": "KeyError: 'weight'",
        "lines": "RuntimeError: Out of memory: lost",
        "unmade": "NameError: name 'missing' is not defined",
    }
    assert "refused: KeyError: 'weight'" in str(found)
    assert {each.name: each.difference for each in found.candidates}["same"].points == 0


def test_an_error_of_fine_tuning_itself_is_raised_and_said_to_be():
    frozen = toys.LitToy().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"(?s)does not require grad.*in plain fine-tuning") as caught:
        advise(frozen, candidates={"same": lambda: [L.Callback()]})
    assert len(caught.value.__notes__) == 1


def test_an_interrupt_of_a_candidate_ends_the_race():
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        advise(candidates={"stopped": lambda: [Crashing(KeyboardInterrupt())]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"foo": 3}, "No Trainer can be made of trainer=.*'foo'"),
        ({"fast_dev_run": True}, "trainer= has fast_dev_run"),
        ({"overfit_batches": 1}, "trainer= has overfit_batches"),
        ({"strategy": "ddp"}, "trainer= makes a DDPStrategy: trials run on one device, in one process"),
        ({"num_nodes": 2}, "trainer= makes a DDPStrategy"),
    ],
)
@pytest.mark.parametrize("make", [toys.LitToy, toys.PlToy])
def test_options_that_trials_cannot_run_with_are_refused_by_name(options, words, make, monkeypatch):
    fits = []
    for namespace in (L, pl):
        monkeypatch.setattr(namespace.Trainer, "fit", lambda *_: fits.append(1))
    with pytest.raises(lt.TransferConfigError, match=words):
        advise(make(), trainer={**QUIET, **options})
    assert not fits
    assert not torch.distributed.is_initialized()


def test_options_that_are_off_are_taken_and_validation_is_never_run():
    class Careful(toys.LitToy):
        def validation_step(self, batch, batch_idx):
            raise AssertionError("validation was run")

    off = {"fast_dev_run": False, "overfit_batches": 0.0, "strategy": "auto", "limit_train_batches": None}
    found = advise(Careful(), Generated(), steps=8, trainer={**QUIET, **off, "limit_val_batches": 1})
    assert found.measured.images == 32
