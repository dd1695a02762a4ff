"""Copies of target images in the source: which are found, and which are none."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_transfer.methods.selective.duplicates import near_duplicates, near_duplicates_of_few
from lightning_transfer.methods.selective.pictures import Pictures


def photos(num, seed, side=48):
    """Smooth in places and sharp in others, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(num, 3, side, side)
    for cells, share in ((3, 0.5), (8, 0.3), (side, 0.2)):
        noise = torch.rand(num, 3, cells, cells, generator=generator)
        found += share * F.interpolate(noise, (side, side), mode="bilinear")
    return found


def jpeg(image, quality=40):
    file = io.BytesIO()
    Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


COPIES = {
    "exact": lambda image: image,
    "mirrored": lambda image: image.flip(2),
    "recompressed": jpeg,
    "mirrored and recompressed": lambda image: jpeg(image.flip(2)),
    "darker": lambda image: image * 0.6,
    "brighter and of less contrast": lambda image: 0.4 + 0.5 * image,
    "normalised": lambda image: (image - 0.45) / 0.22,
    "smaller": lambda image: F.interpolate(image[None], (32, 32), mode="area")[0],
    "grey": lambda image: image.mean(0, keepdim=True),
}


def found(target, source, indices=None, steps=None):
    """The pairs, where every source image is near to every target image."""
    indices = torch.arange(len(source)).expand(len(target), -1) if indices is None else indices
    step = (lambda _: None) if steps is None else steps.append
    pairs = near_duplicates(indices, Pictures(target, "target"), Pictures(source, "source"), step)
    assert pairs.shape == (len(pairs), 2)
    return pairs.tolist()


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(kind):
    target, source = photos(4, 0), list(photos(5, 1))
    source[3] = COPIES[kind](target[2])
    assert found(target, source) == [[2, 3]]


def test_different_images_are_no_copies():
    assert found(photos(40, 0), photos(5, 1)) == []
    noise = torch.rand(40, 3, 20, 20)
    assert found(noise[:20], noise[20:25]) == []


def test_upside_down_and_negative_images_are_no_copies():
    target = photos(3, 0)
    assert found(target, [*target.flip(2), 1 - target[0]]) == []


def signs(*colours):
    """One shape, in the colours (background, shape) each."""
    shape = (torch.arange(32) - 15).abs() < 7
    shape = shape[:, None] & shape
    return [torch.where(shape, *(torch.tensor(rgb)[:, None, None] for rgb in pair)) for pair in colours]


def test_one_shape_in_other_colours_is_no_copy():
    target = signs(([1.0, 0.0, 0.0], [0.0, 0.0, 0.0]), ([1.0, 1.0, 1.0], [0.5, 0.0, 0.0]))
    source = signs(([0.0, 1.0, 0.0], [0.0, 0.0, 0.0]), ([1.0, 0.75, 0.8], [0.0, 0.4, 0.0]))
    assert found(target, [*source, target[1]]) == [[1, 2]]
    assert near_duplicates_of_few(Pictures(target, "target"), Pictures(source, "source")).tolist() == []


def test_flat_images_are_nobodys_likeness():
    flat = torch.stack([torch.full((3, 20, 20), value) for value in (0.0, 0.3, 1.0)])
    almost = flat[1] + 1e-6 * torch.rand(3, 20, 20)
    assert found(flat, list(flat)) == []
    assert found([almost, flat[0]], [almost, flat[0], photos(1, 0)[0]]) == []


def test_every_candidate_is_looked_at_and_several_may_be_found():
    target, source = photos(2, 0), photos(12, 1)
    source[[4, 9]] = target[0]
    source[11] = target[1]
    indices = torch.tensor([[9, 0, 4, 1, 2, 11], [0, 1, 2, 3, 4, 11]])
    assert found(target, source, indices) == [[0, 4], [0, 9], [1, 11]]
    assert found(target, source, indices.flip(1)) == [[0, 4], [0, 9], [1, 11]]
    assert found(target, source, indices[:, :1]) == [[0, 9]]


def test_every_picture_that_is_read_is_told():
    steps = []
    found(photos(3, 0), photos(9, 1), torch.tensor([[0, 5], [5, 8], [8, 0]]), steps)
    assert sum(steps) == 3 + 3


def test_an_unreadable_image_is_no_copy():
    target = photos(2, 0)
    assert found(target, [torch.full((3, 5, 5), torch.nan), target[1]]) == [[1, 1]]
