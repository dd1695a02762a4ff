"""Selection that is broken off, in whatever way, goes on where it was; damaged work is done again."""

import errno
import os
import pathlib
import shutil
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_transfer as lt
from lightning_transfer.methods.selective import pictures, store
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import select_neighbors
from lightning_transfer.methods.selective.selection import TENSORS, Selection
from lightning_transfer.progress import no_progress
from tests import processes, toys
from tests.selective.select_run import (
    BLOCK,
    NUM_SOURCE,
    NUM_TARGET,
    READ,
    READ_BEFORE,
    UNREADABLE,
    Faulty,
    K,
    in_processes,
    killed,
    made_selection,
    quick_bank,
    resumed,
    selected,
    small,
    source_data,
    target_data,
    values,
)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK", BLOCK)
    monkeypatch.setattr(pictures, "READ", READ)


def assert_equal(found, expected):
    for name in TENSORS:
        assert torch.equal(found[name], expected[name]), name


def described(loaded):
    """The images of a run that were described, in rising order: behind those that tell a source, before thumbnails."""
    rest = loaded[READ_BEFORE:]
    return rest[: next((place for place in range(1, len(rest)) if rest[place] <= rest[place - 1]), len(rest))]


def block(number):
    return list(range(number * BLOCK, min((number + 1) * BLOCK, NUM_SOURCE)))


def test_what_is_read_before_the_first_description(small_blocks, tmp_path):
    """On this the counts of the other tests stand."""
    first, again = source_data(), source_data()
    selected(first, protect=[], cache=tmp_path / "chosen")
    selected(again, protect=[], cache=tmp_path / "chosen")
    assert again.loaded[:READ_BEFORE] == first.loaded[:READ_BEFORE]
    assert tuple(again.loaded[READ_BEFORE:]) == UNREADABLE  # which are tried again
    assert described(first.loaded) == list(range(NUM_SOURCE))


def interrupted(folder, number=signal.SIGTERM):
    """A Trainer with the callback is told to stop while its third block is described."""

    class Lit(toys.LitToy):
        def on_train_batch_end(self, *args):
            (folder / "trained").touch()

    images = source_data().dataset
    source = Faulty(images, bad=UNREADABLE, signal_after=READ_BEFORE + 2 * BLOCK + 3, number=number)
    task = lt.SourceTask(images, num_classes=11, unaugmented=source, batch_size=2)
    neighbors = lt.Neighbors(k=K, bank=quick_bank(), rounds=0)
    given = {"target": target_data(), "protect": [small(4, 3)], "cache": folder / "chosen"}
    callback = lt.SelectiveJointFinetuning(task, neighbors=neighbors, weight=lt.Schedule(1.0, 1.0), **given)
    toys.fit(Lit(), [callback], loader=DataLoader(target_data(), batch_size=2), max_epochs=1)


def interrupted_by_hand(folder):
    interrupted(folder, number=signal.SIGINT)


@pytest.mark.parametrize(
    ("how", "code", "finished"), [(killed, -9, 1), (interrupted, 1, 3), (interrupted_by_hand, 1, 2)]
)
def test_a_run_behind_kill_nine_sigterm_or_ctrl_c_describes_only_what_is_missing(
    small_blocks, tmp_path, how, code, finished
):
    """Told to terminate, it finishes the block that it is at; Ctrl-C and kill -9 lose that one."""
    ends = [*in_processes(how, tmp_path), *in_processes(resumed, tmp_path)]
    assert [end.code for end in ends] == [code, 0]
    after = ends[1].found
    assert after["blocks"] == list(range(finished))
    looked_at = 10 * (4 + NUM_TARGET)  # nearest to protected and target images, mirrored or not
    missing = [image for number in range(finished, 5) for image in block(number)]
    assert after["loaded"][READ_BEFORE:][: len(missing)] == missing
    assert len(after["loaded"]) <= READ_BEFORE + len(missing) + looked_at
    assert_equal(after, values(selected()))
    assert after["left"] == ["chosen"]


@pytest.mark.parametrize(("how", "error"), [(interrupted, "SIGTERMException"), (interrupted_by_hand, "SystemExit")])
def test_a_trainer_that_is_told_to_stop_while_selecting_stops_cleanly(tmp_path, how, error):
    (end,) = in_processes(how, tmp_path)
    assert end.found["error"] == error
    assert not (tmp_path / "trained").exists()


def write_or_read(path):
    """One process reads a selection, again and again, that the others write."""
    rank = int(os.environ["RANK"])
    if rank:
        for _ in range(60):
            made_selection(rank).save(path)
        return None
    while not path.exists():
        time.sleep(0.001)
    return [Selection.load(path).indices.tolist() for _ in range(60)]


def test_processes_that_save_at_once_never_leave_a_mixed_file(tmp_path):
    """A reader beside two writers sees one selection or the other, every time."""
    ends = processes.run(write_or_read, tmp_path / "chosen", num_ranks=3)
    assert [end.code for end in ends] == [0, 0, 0]
    written = [made_selection(rank).indices.tolist() for rank in (1, 2)]
    assert all(read in written for read in ends[0].found)
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]


class BrokenOffError(BaseException):
    """What no reader of images forgives."""


class Stops(Faulty):
    """Ends the program at a reading."""

    def __getitem__(self, index):
        if len(self.loaded) == self.fails_after:
            raise BrokenOffError
        return super().__getitem__(index)


def break_off(cache, *, finished=2, **options):
    source = Stops(source_data().dataset, bad=UNREADABLE, fails_after=READ_BEFORE + finished * BLOCK + 9)
    with pytest.raises(BrokenOffError):
        selected(source, cache=cache, **options)


def work(cache, name="source"):
    return next(cache.parent.rglob(f"chosen.work/*/{name}"))


def test_an_exception_keeps_finished_blocks(small_blocks, tmp_path):
    cache = tmp_path / "chosen"
    break_off(cache, protect=[])
    again = source_data()
    found = selected(again, protect=[], cache=cache)
    assert described(again.loaded) == [image for number in (2, 3, 4) for image in block(number)]
    assert_equal(values(found), values(selected(protect=[])))
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]


def test_broken_off_twice(small_blocks, tmp_path):
    cache = tmp_path / "chosen"
    break_off(cache, finished=1, protect=[])
    break_off(cache, finished=2, protect=[])  # of those that are left: three are finished now
    again = source_data()
    found = selected(again, protect=[], cache=cache)
    assert described(again.loaded) == [image for number in (3, 4) for image in block(number)]
    assert_equal(values(found), values(selected(protect=[])))


@pytest.mark.parametrize(
    "damage", ["counts", "label", "checksum", "short mark", "short counts", "no counts", "no mark"]
)
def test_a_damaged_block_is_described_again(small_blocks, tmp_path, damage):
    cache = tmp_path / "chosen"
    break_off(cache, protect=[])
    counts, mark = work(cache) / "counts", work(cache) / "block000001"
    row = 4 * 6 * 2  # bytes of an image: filters, bins, 16 bits
    data, marked = bytearray(counts.read_bytes()), bytearray(mark.read_bytes())
    expected = [1, 2, 3, 4]
    if damage == "counts":
        data[BLOCK * row + 5 * row + 2] ^= 4
    elif damage == "short counts":
        del data[2 * BLOCK * row - 1 :]
    elif damage == "label":
        marked[4 + 8 * 5] ^= 1
    elif damage == "checksum":
        marked[0] ^= 128
    elif damage == "short mark":
        del marked[-1]
    counts.write_bytes(data)
    mark.write_bytes(marked)
    if damage == "no counts":
        counts.unlink()
        expected = [0, 1, 2, 3, 4]
    elif damage == "no mark":
        mark.unlink()
    again = source_data()
    found = selected(again, protect=[], cache=cache)
    assert described(again.loaded) == [image for number in expected for image in block(number)]
    assert_equal(values(found), values(selected(protect=[])))


def others(**changed):
    """The selection's arguments, some of them other ones."""
    given = {"target": target_data(), "source": source_data(), "protect": [small(4, 3)], "k": 7, "bank": quick_bank()}
    return {**given, **changed}


def select_as(arguments, cache):
    return select_neighbors(**arguments, scan=Scan(cache=cache, progress=no_progress))


def reversed_order(data):
    return torch.utils.data.Subset(data, range(len(data) - 1, -1, -1))


@pytest.mark.parametrize(
    "changed",
    [
        {"source": Faulty(torch.utils.data.TensorDataset(small(300, 9), torch.arange(300)))},
        {"source": reversed_order(source_data())},
        {"target": reversed_order(target_data())},
        {"target": torch.utils.data.TensorDataset(small(6, 8), torch.arange(6))},
        {"protect": [small(5, 2)]},
        {"bank": quick_bank(9)},
        {"bins": 4},
    ],
    ids=["source", "order of source", "order of target", "target", "protect", "bank", "bins"],
)
def test_work_of_another_selection_is_never_used(small_blocks, tmp_path, changed):
    """What an earlier run left there is of other images or filters: another selection than theirs is found."""
    cache = tmp_path / "chosen"

    def unsaved(selection, path):
        raise BrokenOffError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "save", unsaved)
        with pytest.raises(BrokenOffError):
            select_as(others(), cache)
    assert len(list(work(cache).glob("block*"))) == 5
    found = select_as(others(**changed), cache)
    assert_equal(values(found), values(select_as(others(**changed), None)))


def test_two_jobs_with_one_cache_do_not_disturb_each_other(small_blocks, tmp_path):
    """The second is done, and has tidied up, while the first is at its third block."""
    cache = tmp_path / "chosen"

    class Slow(Faulty):
        def __getitem__(self, index):
            if len(self.loaded) == READ_BEFORE + 2 * BLOCK + 9:
                self.loaded.append(index)
                self.other = selected(protect=[], cache=cache)
                assert not (tmp_path / "chosen.work").exists()
            return super().__getitem__(index)

    slow = Slow(source_data().dataset, bad=UNREADABLE)
    found = selected(slow, protect=[], cache=cache)
    assert_equal(values(found), values(slow.other))
    assert_equal(values(found), values(selected(protect=[])))
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]


def test_a_damaged_cache_is_refused_and_stays(small_blocks, tmp_path):
    cache = tmp_path / "chosen"
    selected(cache=cache)
    data = bytearray(cache.read_bytes())
    data[-9] ^= 1
    cache.write_bytes(data)
    with pytest.raises(
        lt.TransferConfigError, match="chosen is damaged: its checksum is wrong. Delete it and select again"
    ):
        selected(cache=cache)
    assert cache.read_bytes() == data


def test_a_disk_that_is_too_small_is_told_before_the_work(small_blocks, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=100))
    source = source_data()
    with pytest.raises(lt.TransferConfigError, match=r"take .* GB; .* has .* GB left\. Pass cache= on a larger disk"):
        selected(source, cache=tmp_path / "chosen")
    assert len(source.loaded) == READ_BEFORE


def test_a_cache_below_a_file_is_refused_before_the_work(small_blocks, tmp_path):
    (tmp_path / "file").write_text("")
    source = source_data()
    with pytest.raises(lt.TransferConfigError, match="Cannot write .*file/chosen.*Pass another"):
        selected(source, cache=tmp_path / "file/chosen")
    assert len(source.loaded) <= READ_BEFORE


class FullDisk:
    """A file on it."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["counts", "mark"])
def test_a_disk_that_fills_up_is_told_and_finished_blocks_are_used_again(small_blocks, tmp_path, monkeypatch, what):
    cache = tmp_path / "chosen"
    write, opened, calls = store.Store.write, pathlib.Path.open, []

    def filling(self, number, counts, labels):
        calls.append(number)
        if len(calls) == 4 and what == "counts":  # one of the target, two of the source before
            self._file = FullDisk(self._file)
        write(self, number, counts, labels)

    def opening(self, mode, **options):
        file = opened(self, mode, **options)
        return FullDisk(file) if len(calls) == 4 and what == "mark" else file

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write", filling)
        patch.setattr(pathlib.Path, "open", opening)
        with pytest.raises(lt.TransferConfigError, match="No space left on device.*cache="):
            selected(protect=[], cache=cache)
    again = source_data()
    selected(again, protect=[], cache=cache)
    assert described(again.loaded) == [image for number in (2, 3, 4) for image in block(number)]


def test_without_a_cache_nothing_is_left(small_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    selected()
    with pytest.raises(BrokenOffError):
        selected(Stops(source_data().dataset, fails_after=READ_BEFORE + 99))
    assert list(tmp_path.iterdir()) == []
