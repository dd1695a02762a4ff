"""The file that keeps a selection: read again as it was written, or refused by name."""

import dataclasses
import errno
import os
import pathlib
import sys

import pytest
import torch
from safetensors.torch import save_file

import lightning_transfer as lt
from lightning_transfer.methods.selective import selection as module
from lightning_transfer.methods.selective.selection import TENSORS, Selection
from tests.selective import select_run
from tests.selective.select_run import made_selection

FACTS = {"source": "9 images abc", "bank": "gabor"}


def test_a_round_trip_is_equal_to_the_bit(tmp_path):
    made = made_selection()
    made.save(tmp_path / "new/folder/chosen")
    found = Selection.load(tmp_path / "new/folder/chosen")
    for name in TENSORS:
        one, other = getattr(made, name), getattr(found, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert found.fingerprint == made.fingerprint == FACTS
    assert (found.target, found.source) == (None, None)
    assert repr(found) == repr(made) == "Selection(4 target images, 3 neighbors each, 8 source images)"
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["chosen"]


def test_saving_again_replaces_it(tmp_path):
    made_selection(1).save(tmp_path / "chosen")
    made_selection(2).save(tmp_path / "chosen")
    assert torch.equal(Selection.load(tmp_path / "chosen").indices, made_selection(2).indices)


@pytest.fixture
def kept(tmp_path):
    made_selection().save(tmp_path / "kept")
    return (tmp_path / "kept").read_bytes()


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_is_seen(kept, tmp_path, bit):
    """In the length, in names and shapes, in the fingerprint, in the checksum, in every number."""
    file = tmp_path / "damaged"
    for place in range(bit % 7, len(kept), 7):
        data = bytearray(kept)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        with pytest.raises(lt.TransferConfigError, match="damaged|not a selection of this version"):
            Selection.load(file)


def test_a_truncated_file_is_refused(kept, tmp_path):
    for length in [0, 1, 8, 9, *range(10, len(kept), 97), len(kept) - 1]:
        (tmp_path / "damaged").write_bytes(kept[:length])
        with pytest.raises(lt.TransferConfigError, match="damaged.*Delete it and select again"):
            Selection.load(tmp_path / "damaged")


def tensors():
    return {name: getattr(made_selection(), name).contiguous() for name in TENSORS}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, "format None, this one reads 2"),
        ({"format": "1"}, "format 1, this one reads 2"),
        (
            {"format": "3", "fingerprint": "{}", "checksum": ""},
            "format 3, this one reads 2. Delete it and select again",
        ),
        ({"format": "2"}, "its checksum is wrong"),
        ({"format": "2", "fingerprint": "{}"}, "its checksum is wrong"),
        ({"format": "2", "fingerprint": "{}", "checksum": "0" * 64}, "its checksum is wrong"),
    ],
)
def test_a_file_of_another_version_or_kind_is_refused(tmp_path, facts, message):
    save_file(tensors(), tmp_path / "other", metadata=facts)
    with pytest.raises(lt.TransferConfigError, match=message):
        Selection.load(tmp_path / "other")


def test_missing_and_additional_tensors_are_refused(tmp_path):
    for change in ({"indices": None}, {"more": torch.zeros(2)}):
        given = {name: value for name, value in {**tensors(), **change}.items() if value is not None}
        save_file(given, tmp_path / "other", metadata={"format": "2", "fingerprint": "{}", "checksum": "0"})
        with pytest.raises(lt.TransferConfigError, match="its checksum is wrong"):
            Selection.load(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"no selection at all", b"PK\x03\x04" + bytes(99), bytes(4096)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(lt.TransferConfigError, match="notes.txt is not a selection, or it is damaged"):
        Selection.load(tmp_path / "notes.txt")


def test_a_checkpoint_of_pickles_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"indices": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(lt.TransferConfigError, match="not a selection"):
        Selection.load(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, name):
    with pytest.raises(lt.TransferConfigError, match="There is no selection|is a folder, not a selection"):
        Selection.load(tmp_path / name)


@pytest.mark.parametrize("path", ["file/chosen", "file/folder/chosen"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(lt.TransferConfigError, match="Cannot write the selection to .* Pass another path"):
        made_selection().save(tmp_path / path)


class FullDisk:
    """A file on it."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: self.room])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("written", [0, 700])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, written):
    made_selection(1).save(tmp_path / "chosen")
    opened = pathlib.Path.open
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", lambda self, mode: FullDisk(opened(self, mode), written))
        with pytest.raises(lt.TransferConfigError, match="Cannot write the selection to .*No space left on device"):
            made_selection(2).save(tmp_path / "chosen")
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]
    assert torch.equal(Selection.load(tmp_path / "chosen").indices, made_selection(1).indices)


class Listed(list):
    """A list with attributes."""


def pixels(num, seed=0):
    return torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_report_of_a_selection_with_its_images_and_of_a_loaded_one(tmp_path):
    made = made_selection()
    made.save(tmp_path / "chosen")
    loaded = Selection.load(tmp_path / "chosen")
    with pytest.raises(lt.TransferConfigError, match=r"no images: report\(path, target=\.\.\., source=\.\.\.\)"):
        loaded.report(tmp_path / "none.png")
    with pytest.raises(lt.TransferConfigError, match="no images"):
        loaded.report(tmp_path / "none.png", target=pixels(4))
    loaded.report(tmp_path / "loaded.png", target=pixels(4), source=pixels(9, 1))
    at_hand = Selection(
        **{name: getattr(made, name) for name in TENSORS}, fingerprint={}, target=pixels(4), source=pixels(9, 1)
    )
    at_hand.report(tmp_path / "at_hand.png")
    assert (tmp_path / "loaded.png").read_bytes() == (tmp_path / "at_hand.png").read_bytes()
    assert (tmp_path / "loaded.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("target", "source", "name"), [(3, 9, "target has 3 images; it had 4"), (4, 10, "source has 10 images; it had 9")]
)
def test_a_report_with_other_data_is_refused(tmp_path, target, source, name):
    with pytest.raises(lt.TransferConfigError, match=f"The {name} when the selection was made. Pass those"):
        made_selection().report(tmp_path / "page.png", target=pixels(target), source=pixels(source))


def test_a_report_names_an_image_that_cannot_be_shown(tmp_path):
    source = select_run.Faulty(pixels(9, 1), bad=range(9))
    with pytest.raises(lt.TransferConfigError, match=r"source image \d cannot be shown: OSError: truncated file"):
        made_selection().report(tmp_path / "page.png", target=pixels(4), source=source)


def test_a_report_names_the_classes_of_its_datasets(tmp_path):
    target, source = ([(image, 0) for image in pixels(num, seed)] for num, seed in ((4, 0), (9, 1)))
    made, named = made_selection(), Listed(target)
    named.classes = ["ant", "bee"]
    made = dataclasses.replace(made, target_labels=torch.zeros(4, dtype=torch.int64), target=named, source=source)
    rows = made.report(tmp_path / "page.png").axes[0]
    assert rows.texts[0].get_text() == "ant\nimage 0"
    rows = made.report(tmp_path / "page.png", target_names=["wasp"]).axes[0]
    assert rows.texts[0].get_text() == "wasp\nimage 0"


def test_a_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lt.TransferConfigError, match=r"lightning_transfer\[report\]"):
        made_selection().report(tmp_path / "page.png", target=pixels(4), source=pixels(9, 1))


def test_the_format_is_told_in_the_file(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", "3")
    with pytest.raises(lt.TransferConfigError, match="format 2, this one reads 3"):
        Selection.load(tmp_path / "kept")
