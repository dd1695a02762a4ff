"""Samples of any kind as pictures, against what they were made of."""

import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective.pictures import Picture, Pictures, for_display

COLOUR = np.random.default_rng(0).integers(0, 256, (7, 6, 4), dtype=np.uint8)
GREY, RGB = COLOUR[..., 0], COLOUR[..., :3]
GREY_16 = np.random.default_rng(1).integers(0, 65536, (7, 6), dtype=np.uint16)
FLOATS = np.random.default_rng(2).normal(size=(3, 7, 6)).astype(np.float32)


def channels_first(array, white):
    """(channels, height, width) in 0..1, by loops."""
    array = array[:, :, None] if array.ndim == 2 else array
    height, width, channels = array.shape
    found = np.zeros((channels, height, width))
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                found[channel, row, column] = float(array[row, column, channel]) / white
    return found


def picture_of(image, **options):
    return Pictures([image], "source", **options)[0]


def palette():
    image = Image.fromarray(GREY // 64)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return image


PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])[GREY // 64]

KINDS = {
    "PIL L": (Image.fromarray(GREY), channels_first(GREY, 255)),
    "PIL RGB": (Image.fromarray(RGB), channels_first(RGB, 255)),
    "PIL RGBA": (Image.fromarray(COLOUR), channels_first(RGB, 255)),
    "PIL LA": (Image.fromarray(COLOUR[..., :2]), channels_first(GREY, 255)),
    "PIL P": (palette(), channels_first(PALETTE, 255)),
    "PIL PA": (palette().convert("PA"), channels_first(PALETTE, 255)),
    "PIL 1": (Image.fromarray(GREY > 99), channels_first(GREY > 99, 1)),
    "PIL I;16": (Image.fromarray(GREY_16), channels_first(GREY_16, 65535)),
    "PIL I": (Image.fromarray(GREY_16.astype(np.int32)), channels_first(GREY_16, 65535)),
    "PIL F": (Image.fromarray(FLOATS[0]), FLOATS[:1]),
    "array (h, w)": (GREY, channels_first(GREY, 255)),
    "array (h, w, 1)": (GREY[:, :, None], channels_first(GREY, 255)),
    "array (h, w, 2)": (COLOUR[..., :2], channels_first(GREY, 255)),
    "array (h, w, 3)": (RGB, channels_first(RGB, 255)),
    "array (h, w, 4)": (COLOUR, channels_first(RGB, 255)),
    "array of three rows": (RGB[:3], channels_first(RGB[:3], 255)),
    "array (3, h, w)": (RGB.transpose(2, 0, 1), channels_first(RGB, 255)),
    "array uint16": (GREY_16, channels_first(GREY_16, 65535)),
    "array backwards": (RGB[::-1, ::-1], channels_first(RGB[::-1, ::-1], 255)),
    "array float64": (FLOATS.astype(np.float64), FLOATS),
    "array bool": (GREY > 99, channels_first(GREY > 99, 1)),
    "tensor uint8": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), channels_first(RGB, 255)),
    "tensor (h, w)": (torch.from_numpy(GREY.copy()), channels_first(GREY, 255)),
    "tensor (h, w, 3)": (torch.from_numpy(RGB.copy()), channels_first(RGB, 255)),
    "tensor (4, h, w)": (torch.from_numpy(COLOUR.transpose(2, 0, 1).copy()), channels_first(RGB, 255)),
    "tensor (2, h, w)": (torch.from_numpy(COLOUR.transpose(2, 0, 1)[:2].copy()), channels_first(GREY, 255)),
    "tensor uint16": (torch.from_numpy(GREY_16.copy()), channels_first(GREY_16, 65535)),
    "tensor int32": (torch.from_numpy(GREY_16.astype(np.int32)), channels_first(GREY_16, 65535)),
    "tensor bool": (torch.from_numpy(GREY > 99), channels_first(GREY > 99, 1)),
    "tensor float": (torch.from_numpy(FLOATS), FLOATS),
    "tensor float64": (torch.from_numpy(FLOATS).double(), FLOATS),
    "tensor half": (torch.from_numpy(FLOATS).half(), FLOATS.astype(np.float16)),
    "tensor that is a view": (torch.from_numpy(FLOATS).permute(0, 2, 1), FLOATS.transpose(0, 2, 1)),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_any_kind_is_a_picture(name):
    """Without transparency; whole numbers in 0..1, floats as they are."""
    image, expected = KINDS[name]
    for sample in (image, (image, 3), [image, 3]):
        pixels = picture_of(sample).pixels
        assert isinstance(pixels, torch.Tensor), pixels
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
        assert pixels.numpy() == pytest.approx(expected, abs=1e-6)


def test_ink_is_turned_into_light():
    cyan, paper = np.zeros((5, 5, 4), dtype=np.uint8), np.zeros((5, 5, 4), dtype=np.uint8)
    cyan[..., 0] = 255
    cyan, paper = (picture_of(Image.fromarray(ink, mode="CMYK")).pixels for ink in (cyan, paper))
    assert cyan.shape == (3, 5, 5)
    assert cyan[:, 0, 0].tolist() == [0, 1, 1]
    assert (paper == 1).all()


def test_reading_a_picture_does_not_change_the_sample():
    tensor = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
    before = tensor.clone()
    picture_of(tensor).pixels.zero_()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (3, 3),
        (np.int64(4), 4),
        (torch.tensor(2), 2),
        (-1, -1),
        (-2, -1),
        (torch.tensor(-100), -1),
        (torch.tensor(2, dtype=torch.uint8), 2),
        (None, -1),
        (2.0, -1),
        ("cat", -1),
        (torch.tensor(2.0), -1),
        (torch.tensor([0, 1, 0]), -1),
        (np.array([0, 1]), -1),
    ],
)
def test_a_label_is_a_whole_number_or_there_is_none(label, expected):
    assert picture_of((GREY, label)).label == expected


def test_where_nothing_but_an_image_is_given_there_is_no_label():
    assert picture_of(GREY).label == -1
    assert Pictures(torch.rand(4, 3, 5, 5), "source")[2].label == -1
    data = Pictures(TensorDataset(torch.rand(4, 3, 5, 5), torch.arange(4)), "source")
    assert [data[i].label for i in range(len(data))] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.tensor([[[0.1, torch.nan]]]), "NaN or infinite pixels"),
        (torch.tensor([[[0.1, -torch.inf]]]), "NaN or infinite pixels"),
        (np.full((4, 4), np.nan), "NaN or infinite pixels"),
        (torch.rand(5, 7, 6), r"expected an image \(channels, height, width\) or a PIL image, found .*5, 7, 6"),
        (torch.rand(8), "expected an image"),
        (torch.rand(2, 3, 7, 6), "expected an image"),
        ({"image": GREY}, "found .'image': ndarray"),
        ("image.png", "expected an image"),
        (None, "expected an image"),
        ((GREY, 1, 2), "expected an image|ValueError"),
    ],
)
def test_what_is_no_picture_says_why(image, reason):
    picture = picture_of(image)
    assert isinstance(picture.pixels, str)
    assert picture.label == -1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(picture.pixels)


class Files(Dataset):
    """Images of which some cannot be read."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index in self.bad:
            torch.rand(1), np.random.rand(), random.random()
            raise self.bad[index]
        return torch.full((3, 5, 5), index / 10), index


def test_a_sample_that_cannot_be_read_says_why_and_the_others_are_read():
    data = Pictures(Files({2: OSError("truncated"), 7: KeyError("missing")}), "source")
    found = [data[i] for i in range(9)]
    assert found[2] == Picture("OSError: truncated")
    assert found[7].pixels == "KeyError: 'missing'"
    assert [picture.label for picture in found] == [0, 1, -1, 3, 4, 5, 6, -1, 8]


def test_a_file_that_is_torn_says_why(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save("whole.png")
    torn = tmp_path / "torn.png"
    torn.write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "empty.png").touch()

    class Opened(Dataset):
        names = ("whole.png", "torn.png", "empty.png")

        def __len__(self):
            return 3

        def __getitem__(self, index):
            with Image.open(tmp_path / self.names[index]) as image:
                return image.convert("RGB")

    found = [Pictures(Opened(), "source")[i].pixels for i in range(3)]
    assert found[0].shape == (3, 40, 40)
    assert "truncated" in found[1]
    assert "cannot identify" in found[2]


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (SystemExit, lt.TransferConfigError)]
)
def test_an_interruption_is_no_unreadable_picture(error, seen):
    with pytest.raises(seen):
        Pictures(Files({2: error()}), "source")[2]


def test_samples_of_another_form_are_adapted():
    samples = [{"pixels": torch.full((3, 5, 5), i / 10), "meta": {"class": i + 4}} for i in range(3)]
    data = Pictures(samples, "source", adapt=lambda batch: (batch["pixels"], batch["meta"]["class"]))
    for i in range(3):
        assert torch.equal(data[i].pixels, samples[i]["pixels"])
        assert data[i].label == i + 4
    assert isinstance(Pictures(samples, "source", adapt=lambda batch: batch["images"])[0].pixels, str)


class Transformed(Dataset):
    def __init__(self, transform, num=12):
        self.images = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


RANDOM = {
    "torch noise": lambda image: image + torch.rand(()),
    "numpy noise": lambda image: image + np.float32(np.random.rand()),
    "a flip by torch": lambda image: image.flip(2) if torch.rand(()) < 0.5 else image,
    "a flip by random": lambda image: image.flip(2) if random.random() < 0.5 else image,
    "a crop": lambda image: image[:, : int(torch.randint(5, 9, ()))],
    "sometimes none at all": lambda image: image if torch.rand(()) < 0.5 else None,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_transforms_are_found_out(name):
    data = Pictures(Transformed(RANDOM[name]), "target")
    with pytest.raises(
        lt.TransferConfigError, match=r"The target's transform is random: target sample \d+ .*Do this\."
    ):
        data.check_always_the_same("Do this.")


@pytest.mark.parametrize(
    "dataset",
    [
        Transformed(lambda image: image.flip(2)),
        Transformed(lambda image: image, num=1),
        Files({}),
        Files({i: OSError("torn") for i in range(9)}),
    ],
)
def test_what_is_always_the_same_is_not_called_random(dataset):
    Pictures(dataset, "target").check_always_the_same("Do this.")


def test_a_random_transform_gives_each_sample_the_same_pixels_each_time():
    data = Pictures(Transformed(RANDOM["torch noise"]), "target")
    first = [data[i].pixels for i in range(12)]
    assert all(torch.equal(data[i].pixels, first[i]) for i in reversed(range(12)))
    added = {round(float((first[i] - data.dataset.images[i]).mean()), 5) for i in range(12)}
    assert len(added) == 12


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class StreamOfKnownLength(Stream):
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), r"The source, a Stream, has no length and random access.*list\(stream\)"),
        (StreamOfKnownLength(), "The source, a StreamOfKnownLength, has no length"),
        (iter([]), "has no length and random access"),
        ([], "The source dataset list is empty"),
        (TensorDataset(torch.empty(0, 3, 5, 5)), "The source dataset TensorDataset is empty"),
    ],
)
def test_what_has_no_samples_by_index_is_refused(dataset, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        Pictures(dataset, "source")


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_programs_random_state_as_it_was(workers):
    noisy = Transformed(lambda image: image + torch.rand(()) + np.random.rand() + random.random())
    data = Pictures(noisy, "source", num_workers=workers)
    broken = Pictures(Files({3: OSError("torn")}), "source")
    before = random_states()
    assert len([picture for _, batch in data.batches(range(12)) for picture in batch]) == 12
    assert len([data[i] for i in range(12)] + [broken[i] for i in range(9)]) == 21
    with pytest.raises(lt.TransferConfigError, match="random"):
        data.check_always_the_same("")
    assert random_states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_that_is_asked_for(workers):
    images = torch.arange(200.0).view(200, 1, 1, 1).expand(-1, 1, 2, 2)
    data = Pictures(TensorDataset(images, torch.arange(200)), "t", num_workers=workers)
    order = torch.randperm(200).tolist()[:150]
    asked, labels, values = [], [], []
    for indices, batch in data.batches(order):
        assert len(indices) == len(batch) <= 64
        asked += indices
        labels += [picture.label for picture in batch]
        values += [round(picture.pixels[0, 0, 0].item() * 255) for picture in batch]
    assert asked == labels == values == order


def test_no_warning_comes_of_reading_pictures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_only = RGB.copy()
        read_only.flags.writeable = False
        assert picture_of(read_only).pixels.shape == (3, 7, 6)
        assert picture_of(np.asarray(Image.fromarray(RGB))).pixels.shape == (3, 7, 6)


def test_pictures_are_displayed_in_colour_from_0_to_1():
    colour = torch.rand(3, 4, 5)
    assert for_display(colour) == pytest.approx(colour.permute(1, 2, 0).numpy())
    grey = for_display(torch.rand(1, 4, 5))
    assert grey.shape == (4, 5, 3)
    assert (grey[..., 0] == grey[..., 2]).all()
    shown = for_display(torch.randn(3, 4, 5) * 3)
    assert (shown.min(), shown.max()) == (0, 1)
    assert np.isfinite(for_display(torch.full((1, 4, 5), -2.0))).all()
