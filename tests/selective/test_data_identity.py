"""An image is the same image in whatever numbers it is kept, and a kept selection knows its source's labels."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective.pictures import Pictures
from tests.selective.test_select import found_in, smooth

BYTES = (smooth(12, 3) * 255).round()
FORMS = {
    "uint8": BYTES.to(torch.uint8),
    "int16": BYTES.to(torch.int16),
    "uint16": torch.from_numpy(BYTES.numpy().astype(np.uint16)),
    "int32": BYTES.to(torch.int32),
    "int64": BYTES.to(torch.int64),
    "float": BYTES / 255,
}


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", ["uint8", "int32", "float"])
def test_an_images_own_copy_is_its_nearest_neighbor_in_numbers_of_any_type(target, source):
    said = []
    with pytest.warns(UserWarning, match="3 target images are in the source too"):
        selection = found_in(FORMS[target][4:7], FORMS[source], k=1, said=said)
    assert selection.indices[:, 0].tolist() == [4, 5, 6]
    assert any("white is 255 in the" in line for line in said) == bool({target, source} - {"uint8", "float"})


@pytest.mark.parametrize("kind", ["int16", "int64"])
def test_copies_of_protected_images_are_found_in_numbers_of_another_type(kind):
    selection = found_in(smooth(2, 9), FORMS[kind], k=2, protect=[FORMS["uint8"][7:8]])
    assert selection.dropped.tolist() == [[0, 7]]


def test_a_dark_image_among_others_of_16_bits_is_not_taken_for_one_of_8():
    images = (BYTES * 257).to(torch.int64)
    images[5] //= 257
    expected = images.double() / 65535
    pictures = Pictures(images, "source")
    assert torch.equal(pictures[5].pixels, (images[5].float() / 65535))
    assert float((pictures[0].pixels - expected[0]).abs().max()) < 1e-6


def test_an_image_beyond_the_range_of_those_that_were_probed_says_so():
    images = torch.full((200, 1, 4, 4), 9)
    images[1] = 300  # not among the 64 that are probed
    pictures = Pictures(images, "source")
    assert "its pixels run to 300, those of the images that were probed to 255 at most" in pictures[1].pixels


def test_whole_numbers_of_two_ranges_are_refused():
    with pytest.raises(lt.TransferConfigError, match="white is 255 in the target, 65535 in the source"):
        found_in(FORMS["int32"][:3], (BYTES * 257).to(torch.int32))


def test_a_kept_selection_is_refused_where_a_listed_label_changed_that_no_probe_sees(tmp_path):
    target, labels, said = smooth(3, 1, side=16), torch.arange(150), []
    source = smooth(150, 2, side=16)
    found_in(target, TensorDataset(source, labels), cache=tmp_path / "kept.safetensors")
    found_in(target, TensorDataset(source, labels), cache=tmp_path / "kept.safetensors", said=said)
    assert "Compared were 64 of 150 source images and all listed labels." in said[-1]
    other = labels.clone()
    other[1] = 7  # not among the 64
    with pytest.raises(lt.TransferConfigError, match="keeps another selection: source: 150 images"):
        found_in(target, TensorDataset(source, other), cache=tmp_path / "kept.safetensors")
