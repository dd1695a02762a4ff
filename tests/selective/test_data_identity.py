"""An image is the same image in whatever numbers it is kept, and a kept selection knows its source."""

import os
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.ranges import Range
from lightning_transfer.source.listing import listed_by
from tests.selective.test_select import found_in, smooth

pytestmark = pytest.mark.filterwarnings("ignore:.* target images are also in the source")
BYTES = (smooth(12, 3) * 255).round()
BYTES[:, 0, 0, 0], BYTES[:, 0, 0, 1] = 0, 255
WORDS = BYTES * 257
SIGNED = BYTES - 100


def forms(numbers, *kinds):
    return {kind: torch.from_numpy(numbers.numpy().astype(kind)) for kind in kinds}


WIDE = ("int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
FORMS = {
    "0 to 127": forms((BYTES / 2).floor(), "int8", "uint8", *WIDE),
    "0 to 255": forms(BYTES, "uint8", "float16", *WIDE),
    "0 to 65535": forms(WORDS, "uint16", "int32", "int64", "float32"),
    "-100 to 155": forms(SIGNED, "int16", "int32", "int64", "float32", "float64"),
    "0 and 1": forms((BYTES > 99).float(), "bool", "int16", "int64", "float32"),
    "0 to 1": forms(BYTES / 255, "float16", "float32", "float64"),
}


@pytest.mark.parametrize("numbers", FORMS)
def test_an_images_own_copy_is_its_nearest_neighbor_in_numbers_of_any_type(numbers):
    """D5: types whose ranges agree; floats of 0 to 1 beside whole numbers of 0 to 255 too."""
    kinds = [*FORMS[numbers].values()]
    pairs = [(target, kinds[(place + step) % len(kinds)]) for step in (1, 4) for place, target in enumerate(kinds)]
    if numbers == "0 to 1":
        bytes_, floats = FORMS["0 to 255"], FORMS["0 to 1"]
        pairs += [(floats["float32"], bytes_[kind]) for kind in ("uint8", "int32", "int64")]
        pairs += [(bytes_["uint8"], floats["float64"]), (FORMS["0 to 65535"]["uint16"], floats["float32"])]
        pairs += [(bytes_["uint8"], FORMS["0 to 65535"]["uint16"])]  # types that say themselves what is white
    for target, source in pairs:
        selection = found_in(target[4:7], source, k=1)
        assert selection.indices[:, 0].tolist() == [4, 5, 6], (target.dtype, source.dtype)


@pytest.mark.parametrize(
    ("numbers", "target", "source"),
    [("0 to 255", "uint8", "int16"), ("0 to 255", "float32", "int64"), ("0 to 127", "int8", "uint8")],
)
def test_copies_of_protected_images_are_found_in_numbers_of_another_type(numbers, target, source):
    kinds = FORMS[numbers]
    selection = found_in(kinds[source][:2], kinds[source][2:], k=2, protect=[kinds[target][7:8]])
    assert selection.dropped.tolist() == [[0, 5]]


BYTE, WORD, FLOAT = FORMS["0 to 255"], FORMS["0 to 65535"], FORMS["0 to 1"]["float32"]


@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        (BYTE["int32"], WORD["int32"], r"int32 from 0 to 255, white at 255.*int32 from 0 to 65535, white at 65535"),
        (BYTE["uint8"], WORD["int64"], r"uint8 from 0 to 255.*int64 from 0 to 65535"),
        (FLOAT, BYTE["float32"], r"float32 from 0 to 1, white at 1.*float32 from 0 to 255, white at 255"),
        (BYTE["float32"] + 0.25, FLOAT, r"float32 from 0.25 to 255.25, white at 65535.*float32 from 0 to 1"),
        (FORMS["0 and 1"]["int64"], BYTE["uint8"], r"int64 from 0 to 1, white at 1.*uint8 from 0 to 255"),
        (FLOAT / 200, FLOAT, r"float32 from 0 to 0.005, white at 1.*float32 from 0 to 1"),
    ],
)
def test_sides_whose_ranges_differ_by_orders_are_refused_with_what_was_found_on_both(target, source, said):
    with pytest.raises(lt.TransferConfigError, match=f"The target pixels are {said}.*their ranges differ.*floats of 0"):
        found_in(target[:3], source)
    with pytest.raises(lt.TransferConfigError, match=f"The protected pixels are {said}.*their ranges differ"):
        found_in(source[:3], source[3:], protect=[target])
    with pytest.raises(lt.TransferConfigError, match="their ranges differ"):
        found_in(source[:3], target)


def test_a_signed_side_beside_one_that_is_not_is_refused():
    with pytest.raises(lt.TransferConfigError, match="one is normalised and the other is not"):
        found_in(FORMS["-100 to 155"]["int16"][:3], BYTE["uint8"])


def test_what_is_white_is_logged():
    said = []
    assert str(Range(torch.float32, -2.0, 2.5, is_whole=False)) == "float32 from -2 to 2.5"  # normalised: not known
    found_in(BYTE["int32"][:3], FLOAT, said=said)
    assert "target: int32 from 0 to 255, white at 255; source: float32 from 0 to 1, white at 1." in said[0]


def test_a_dark_image_among_others_of_16_bits_is_not_taken_for_one_of_8():
    images = WORDS.to(torch.int64)
    images[5] //= 257
    pictures = Pictures(images, "source")
    for index in (0, 5):
        assert pictures[index].pixels.numpy() == pytest.approx(images[index].numpy() / 65535, abs=1e-7)


def test_black_images_agree_with_any():
    for black in (torch.zeros(3, 3, 24, 24), torch.zeros(3, 3, 24, 24, dtype=torch.int32)):
        with torch.no_grad():
            assert Pictures(black, "t").glance.agrees(Pictures(BYTE["uint8"], "s").glance)


@pytest.mark.parametrize("pixel", [300, -1])
def test_an_image_beyond_the_range_of_those_that_were_probed_says_so(pixel):
    images = torch.full((200, 1, 4, 4), 9)
    images[1, 0, 0, 0] = pixel  # not among the 64 that are probed
    said = Pictures(images, "source")[1].pixels
    assert f"{pixel}" in said
    assert "those of the images that were probed are int64 from 9 to 9, white at 255; expected one range" in said


class Files(Dataset):
    """Images in files of which it keeps a list, as torchvision's folders do."""

    def __init__(self, folder, pixels):
        folder.mkdir()
        self.samples = []
        for index, image in enumerate(pixels):
            np.savez_compressed(folder / f"{index}.npz", image.numpy())
            self.samples.append((str(folder / f"{index}.npz"), 0))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return np.load(path)["arr_0"], label


NUM = 150
SOURCE = smooth(NUM, 2, side=16)


def listed(**changes):
    """Images in memory; some places, not among the 64 that are probed, are given other pixels or labels."""
    pixels, labels = SOURCE.clone(), torch.arange(NUM)
    for name, place in changes.items():
        {"pixels": pixels, "labels": labels}[name][place] = 0
    return pixels, labels


class InMemory(Dataset):
    """As torchvision's CIFAR10."""

    def __init__(self, pixels, labels):
        self.data, self.targets = pixels.numpy(), labels.tolist()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index], self.targets[index]


class Wrapped(Dataset):
    """With a transform, as many projects have it."""

    def __init__(self, *given):
        self.dataset = InMemory(*given)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return torch.from_numpy(image).flip(-1), label


class Unlisted(Dataset):
    def __init__(self, pixels, labels):
        self.held = pixels, labels

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        return self.held[0][index], self.held[1][index]


@pytest.mark.parametrize(
    "make", [TensorDataset, InMemory, Wrapped, lambda *given: Subset(InMemory(*given), range(NUM))]
)
def test_a_kept_selection_is_refused_where_what_is_listed_changed_that_no_probe_sees(make, tmp_path):
    """D10."""
    target, kept, said = smooth(3, 1, side=16), tmp_path / "kept.safetensors", []
    found_in(target, make(*listed()), cache=kept)
    found_in(target, make(*listed()), cache=kept, said=said)
    assert f"It compared 64 of {NUM} source images, all listed labels, all images in memory." in said[-1]
    for changed in ({"pixels": 1}, {"labels": 1}):
        with pytest.raises(lt.TransferConfigError, match=rf"holds another selection: source: {NUM} images"):
            found_in(target, make(*listed(**changed)), cache=kept)


@pytest.mark.parametrize("data", [np.array(["a", "b", "c"]), np.float64(3), torch.tensor(2.0), [1, 2, 3], "abc", None])
def test_attributes_of_the_same_name_that_are_something_else_are_passed_over(data):
    class Odd(list):
        samples = imgs = data

    odd = Odd([1, 2, 3])
    odd.data = data
    assert listed_by(odd) == {}


def test_where_nothing_is_listed_it_says_that_only_some_images_were_compared(tmp_path):
    target, kept, said = smooth(3, 1, side=16), tmp_path / "kept.safetensors", []
    found_in(target, Unlisted(*listed()), cache=kept)
    found_in(target, Unlisted(*listed(pixels=1)), cache=kept, said=said)
    assert said[-1].endswith(f"It compared 64 of {NUM} source images.")


def test_a_kept_selection_is_refused_where_files_were_changed_or_renamed_and_not_where_they_were_moved(tmp_path):
    target, kept, said = smooth(3, 1, side=16), tmp_path / "kept.safetensors", []
    found_in(target, data := Files(tmp_path / "images", SOURCE), cache=kept)
    (tmp_path / "else").mkdir()
    os.rename(tmp_path / "images", tmp_path / "else" / "images")
    data.samples = [(path.replace("images", "else/images"), label) for path, label in data.samples]
    os.utime(data.samples[1][0], (time.time() + 9, time.time() + 9))
    found_in(target, data, cache=kept, said=said)
    assert f"It compared 64 of {NUM} source images, all file names, sizes of {NUM} files." in said[-1]
    before = data.samples[1]
    np.savez_compressed(before[0], SOURCE[1].numpy() * 0)
    with pytest.raises(lt.TransferConfigError, match="holds another selection: source"):
        found_in(target, data, cache=kept)
    np.savez_compressed(before[0], SOURCE[1].numpy())
    found_in(target, data, cache=kept)
    data.samples[1] = (str(tmp_path / "other.npz"), 0)
    os.rename(before[0], data.samples[1][0])
    with pytest.raises(lt.TransferConfigError, match="holds another selection: source"):
        found_in(target, data, cache=kept)
