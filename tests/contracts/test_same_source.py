"""A resumed run goes on with the source that it began with, or says which samples are others."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.source.redrawing import READINGS, redrawn
from lightning_transfer.source.stream import permutation
from tests import toys
from tests.toys import LitToy, Recorder, SaveEveryStep, fit

NUM = 20
pytestmark = pytest.mark.filterwarnings("ignore:The kept source head")  # which knows no noise


def soft(data, weight=1.0, **options):
    return lt.SoftFinetuning(lt.SourceTask(data, head=toys.source_head(), batch_size=4, **options), weight=weight)


class Noisy(Recorder):
    """Augmented by a generator of its own, which no seed reaches; labels are not listed."""

    random = np.random.default_rng()

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + self.random.random(), label


def relabelled(indices):
    images, labels = toys.source_data().tensors
    labels = labels.clone()
    labels[indices] = (labels[indices] + 1) % toys.SOURCE_CLASSES
    return TensorDataset(images, labels)


def begun(data, tmp_path, **options):
    """The checkpoint of a run with a source whose labels are not listed."""
    fit(LitToy(), [soft(data, **options), SaveEveryStep(tmp_path)], max_epochs=1)
    return tmp_path / "step=3.ckpt"


FIRST = permutation(NUM, 0, 0)[:4].tolist()  # by the stream's own rule
CHANGES = {
    "reversed": (Recorder(Subset(toys.source_data(), range(NUM)[::-1])), FIRST),
    "of two that change places": (Recorder(Subset(toys.source_data(), [*range(NUM)])), FIRST[1:3]),
    "with another label": (Recorder(relabelled(FIRST[2])), FIRST[2:3]),
}
CHANGES["of two that change places"][0].dataset.indices[FIRST[1]] = FIRST[2]
CHANGES["of two that change places"][0].dataset.indices[FIRST[2]] = FIRST[1]


@pytest.mark.parametrize("name", CHANGES)
def test_another_source_is_refused_with_the_samples_that_are_others(name, tmp_path):
    """D11: labels are not listed, so nothing but the samples tells."""
    path = begun(Recorder(toys.source_data()), tmp_path)
    data, others = CHANGES[name]
    with pytest.raises(lt.TransferConfigError, match="is in another order: samples .* differ now") as caught:
        fit(LitToy(), [soft(data)], ckpt_path=path)
    assert str(others) in str(caught.value)
    assert "To begin a new run from its weights" in str(caught.value)


def test_augmentation_by_the_programs_generators_is_repeated_and_a_change_behind_it_seen(tmp_path):
    path = begun(toys.Augmented(toys.source_data()), tmp_path)
    fit(LitToy(), [soft(toys.Augmented(toys.source_data()))], ckpt_path=path)
    with pytest.raises(lt.TransferConfigError, match="differ now"):
        fit(LitToy(), [soft(toys.Augmented(CHANGES["reversed"][0]))], ckpt_path=path)


def test_samples_that_are_never_the_same_are_said_not_to_be_checked(tmp_path, caplog):
    path = begun(Noisy(toys.source_data()), tmp_path)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(LitToy(), [soft(Noisy(toys.source_data()))], ckpt_path=path)
    assert "it cannot be checked whether the source is the one that this run began with" in caplog.text


@pytest.mark.parametrize(
    ("weight", "num_read"),
    [(0.0, 0), (lt.Schedule(until_steps=2), 0), (lt.Schedule(until_steps=5), 4 * READINGS + 2 * 4)],
    ids=["never", "no more", "still"],
)
def test_nothing_is_read_to_check_a_source_that_is_not_drawn_from(weight, num_read, tmp_path):
    path = begun(Recorder(toys.source_data()), tmp_path, weight=weight)
    data = Recorder(toys.source_data())
    fit(LitToy(), [soft(data, weight=weight)], ckpt_path=path)
    assert len(data.loaded) == num_read


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


class Mappings(Dataset):
    """Samples that are numbers in a mapping, with texts among them."""

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        return {"path": str(random.random()), "image": torch.rand(3) + index, "label": index}


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_again_leaves_the_programs_random_state_as_it_was(workers):
    task, workers = lt.SourceTask(Mappings(), num_classes=NUM), {"num_workers": workers}
    before = random_states()
    found = redrawn(task, 6, workers)
    assert random_states() == before
    assert len({*found}) == 6
    assert redrawn(task, 3, workers) == found[:3]
