"""A dataset that opens its file with the first sample is not opened before workers are forked: they would share it."""

import multiprocessing
import os
import time

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_transfer as lt
from lightning_transfer import reading
from lightning_transfer.methods.collaborative.search.candidates import _seen
from lightning_transfer.progress import no_progress
from lightning_transfer.reading import apart
from tests import toys
from tests.toys import LitToy, fit

WORKERS = 1


class InOneFile(Dataset):
    """Images in one file, which is opened with the first sample; it knows which process opened it."""

    def __init__(self, path, num_classes):
        self.path, self.num_classes, self.file, self.opener = path, num_classes, None, None

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.file is None:
            self.file, self.opener = open(self.path, "rb"), os.getpid()  # noqa: SIM115
        assert self.opener == os.getpid(), "two processes share a file"
        self.file.seek(index * 3 * 400 * 4)
        pixels = np.frombuffer(self.file.read(3 * 400 * 4), np.float32).reshape(3, 20, 20)
        return torch.from_numpy(pixels.copy()), index % self.num_classes

    def __del__(self):
        if self.file is not None:
            self.file.close()


class Unnamed(LitToy):
    """Its head is found by running an image."""

    def __init__(self):
        super().__init__()
        self.model.answer, self.model.fc = self.model.fc, nn.Identity()
        self.model.other = nn.Linear(3, 3)

    def forward(self, pixels):
        return self.model.answer(self.model.features(pixels))


@pytest.fixture
def data(tmp_path):
    def made(num_classes):
        pixels = torch.rand(24, 3, 20, 20, generator=torch.Generator().manual_seed(num_classes)).numpy()
        pixels.tofile(tmp_path / f"images{num_classes}")
        return InOneFile(tmp_path / f"images{num_classes}", num_classes)

    return made


def soft(source):
    return lt.SoftFinetuning(source, weight=lt.Schedule(1.0, 1.0))


def near(source):
    return lt.SoftFinetuning(source)


def selective(source):
    return lt.SelectiveJointFinetuning(source, neighbors=lt.Neighbors(k=3, rounds=1))


@pytest.mark.parametrize("make", [soft, near, selective])
@pytest.mark.parametrize("module", [LitToy, Unnamed])
def test_no_worker_shares_a_file_with_another(make, module, data):
    source, target = data(toys.SOURCE_CLASSES), data(toys.TARGET_CLASSES)
    task = lt.SourceTask(source, num_classes=toys.SOURCE_CLASSES)
    fit(module(), [make(task)], loader=DataLoader(target, batch_size=4, num_workers=WORKERS), max_epochs=2)
    assert (source.file, target.file) == (None, None)  # nor would workers of a later fit
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_target_with_workers_is_read_in_one_for_a_source_without(rounds, data):
    source, target = data(toys.SOURCE_CLASSES), data(toys.TARGET_CLASSES)
    task = lt.SourceTask(source, num_classes=toys.SOURCE_CLASSES, num_workers=0)
    callback = lt.SelectiveJointFinetuning(task, neighbors=lt.Neighbors(k=3, rounds=rounds))
    fit(LitToy(), [callback], loader=DataLoader(target, batch_size=4, num_workers=WORKERS), max_epochs=2)
    assert (source.opener, target.file) == (os.getpid(), None)  # the source gets no workers


def advised(loader):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    lt.advise(Unnamed(), loader, candidates={"plain": list}, steps=1, trainer=quiet)


def searched(loader):
    using = lt.CollaborativeFinetuning([toys.OtherNet()])
    lt.LayerSearch(particles=1, iterations=0, proxy_epochs=1, validation=0.4).run(LitToy(), loader, using)


def ranked(loader):
    lt.rank_networks([timm.create_model("resnet10t", num_classes=0)], loader, num_workers=WORKERS)


def diagnosed(loader):
    lt.doctor(LitToy(), loader)


def selected(loader):
    scan = lt.Scan(num_workers=WORKERS, progress=no_progress, say=list)
    return lt.select_neighbors(loader.dataset, loader.dataset, k=1, scan=scan)


def reported(loader):
    selected(loader).report(loader.dataset.path.with_suffix(".png"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("look", [advised, searched, ranked, diagnosed, reported])
def test_what_looks_at_images_does_not_open_their_file_here(look, data):
    target = data(toys.TARGET_CLASSES)
    look(DataLoader(target, batch_size=4, num_workers=WORKERS))
    assert target.file is None


class Slow(InOneFile):
    """All its images take longer to read than a process may be silent."""

    def __getitem__(self, index):
        time.sleep(0.1)
        return super().__getitem__(index)


def test_a_process_that_reads_for_long_is_not_taken_to_hang(data, monkeypatch):
    monkeypatch.setattr(reading, "PATIENCE", 2)
    slow = Slow(data(toys.TARGET_CLASSES).path, toys.TARGET_CLASSES)
    assert reading.labels_of(slow, num_workers=WORKERS) == [index % toys.TARGET_CLASSES for index in range(24)]
    assert slow.file is None


def test_a_search_knows_augmented_images_whoever_reads_them():
    once, again = (apart(lambda: _seen([toys.Augmented(toys.target_data())], 0), workers) for workers in (0, WORKERS))
    assert once == again


def test_what_no_process_of_its_own_can_return_is_read_here():
    def fails_there():
        if multiprocessing.parent_process() is not None:
            error = RuntimeError("no GPU")
            error.add_note("This happened while loading an image.")
            raise error
        return os.getpid()

    assert apart(os.getpid, 0) == os.getpid() != apart(os.getpid, WORKERS)
    with pytest.warns(UserWarning, match=r"another one could not \(.*no GPU.*share that file"):
        assert apart(fails_there, None) == os.getpid()
    assert apart(lambda: apart(os.getpid, WORKERS), WORKERS) != os.getpid()  # a worker reads itself, without a warning
    with pytest.raises(KeyError, match="there is none"):
        apart(lambda: {}["there is none"], WORKERS)
