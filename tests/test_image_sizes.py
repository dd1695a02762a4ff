"""An exported network gets images as it was validated on, and another size or normalisation is warned of."""

import json
import re
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import lightning_transfer as lt
from tests import test_exporting, toys

VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 64, "depth": 1}


def network_of(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(**{"model_name": "test_resnet", "num_classes": 3, **options}).eval()


def pictures(number=24, seed=0):
    """Rectangles of noise, wide and high, of several scales."""
    generator = np.random.default_rng(seed)
    for index in range(number):
        pixels = generator.integers(0, 255, (5 + index % 3, 4 + index % 4, 3)).astype(np.uint8)
        yield Image.fromarray(pixels).resize((70 + 10 * (index % 5), 60 + 20 * (index % 3)))


def transform_of(folder):
    """The network and the transform that the card's code makes, in which nothing of this package is used."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert "lightning_transfer" not in code
    exec(code.replace("FOLDER", str(folder)), made := {})
    return made["network"], made["transform"]


@pytest.mark.parametrize("options", [{}, {"in_chans": 1}, VIT], ids=["timm's", "grey", "of one size"])
@pytest.mark.parametrize(("image_size", "size"), [(64, (64, 64)), ((48, 80), (48, 80)), ([64, 64], (64, 64))])
def test_the_cards_transform_resizes_to_exactly_this_size(tmp_path, options, image_size, size):
    if options is VIT and size != (64, 64):
        options = {**VIT, "img_size": size}
    network = network_of(**options)
    network.pretrained_cfg |= {"test_input_size": (3, 288, 288), "test_crop_pct": 0.9, "pool_size": (7, 7)}
    known = dict(network.pretrained_cfg)
    folder = lt.export(network, tmp_path / "mine", image_size=image_size)
    assert network.pretrained_cfg == known
    again, transform = transform_of(folder)
    saved = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    channels = options.get("in_chans", 3)
    expected = {"input_size": [channels, *size], "crop_pct": 1.0, "crop_mode": "squash"}
    card = (folder / "README.md").read_text()
    for key, value in expected.items():
        assert saved[key] == value
        assert f"| {key} | {value} |" in card
    assert not [key for key in saved if key.startswith("test_")]  # timm may prefer these
    assert saved["pool_size"] is None
    for picture in pictures(4):
        picture = picture.convert("L" if channels == 1 else "RGB")
        small = picture.resize(size[::-1], getattr(Image.Resampling, known["interpolation"].upper()))
        pixels = np.asarray(small, float).reshape(*size, channels) / 255
        mean, std = (np.array(known[key])[:channels] for key in ("mean", "std"))
        given = transform(picture)
        np.testing.assert_allclose(given.permute(1, 2, 0), (pixels - mean) / std, atol=1e-5)
        torch.testing.assert_close(again(given[None]), network(given[None]))


def test_the_accuracy_by_the_card_is_that_of_the_users_own_transform(tmp_path):
    network = network_of()
    mean, std = (network.pretrained_cfg[key] for key in ("mean", "std"))
    resize = v2.Resize((64, 64), v2.InterpolationMode(network.pretrained_cfg["interpolation"]))
    mine = v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images = [*pictures()]
    logits = network(torch.stack([mine(image) for image in images]))
    with torch.no_grad():
        network.fc.bias -= logits.mean(0)  # so that all classes occur
    labels = network(torch.stack([mine(image) for image in images])).argmax(1)
    assert len({*labels.tolist()}) == 3

    def accuracy(folder):
        again, transform = transform_of(folder)
        return float((again(torch.stack([transform(image) for image in images])).argmax(1) == labels).float().mean())

    assert accuracy(lt.export(network, tmp_path / "mine", image_size=64)) == 1
    assert accuracy(lt.export(network, tmp_path / "pretraining")) < 0.8


@pytest.mark.parametrize(
    ("options", "image_size", "message"),
    [
        (
            VIT,
            32,
            "image_size is 32 x 32, and .*, a VisionTransformer, takes only images of 64 x 64",
        ),
        ({**VIT, "dynamic_img_size": True}, (64, 33), "image_size is 64 x 33, .* does not run on them. Pass the size"),
        ({}, 0, "image_size=0; it takes a whole number"),
        ({}, (64, 0), "image_size=0; it takes a whole number"),
        ({}, 64.0, "image_size=64.0; it takes a whole number"),
        ({}, True, "image_size=True; it takes a whole number"),
        ({}, "64", "image_size='64'; it takes a whole number"),
        ({}, (3, 64, 64), r"image_size=\(3, 64, 64\); it takes a number of pixels, or height and width"),
    ],
)
def test_a_size_that_the_network_does_not_take_is_refused_by_name(tmp_path, options, image_size, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.export(network_of(**options), tmp_path / "mine", image_size=image_size)
    assert [*tmp_path.iterdir()] == []


def test_the_card_of_another_network_says_the_size(tmp_path):
    network = toys.ToyNet()
    sentence = "\n## Images\n\nThe network was validated on images of 64 x 48 pixels.\n"
    assert sentence in (lt.export(network, tmp_path / "mine", image_size=(64, 48)) / "README.md").read_text()
    assert "## Images" not in (lt.export(network, tmp_path / "unsaid") / "README.md").read_text()


class Lit(test_exporting.Lit):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])


class Resizes(Lit):
    """Resizes images in its forward."""

    def __init__(self, network, size):
        super().__init__(network)
        self.size = size

    def forward(self, images):
        return self.network(F.interpolate(images, (self.size, self.size)))


class Hooks(Lit):
    """Resizes batches after they are moved."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return F.interpolate(batch[0], (160, 160)), batch[1]


class Noise(Dataset):
    def __init__(self, *size):
        self.size, self.is_broken = size, False

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.is_broken:
            raise OSError("the disk is gone")
        return torch.from_numpy(np.random.normal(0, 0.5, (3, *self.size))).float(), index % 3


def loader(*size, **options):
    return DataLoader(Noise(*size), batch_size=3, **options)


def trained(module, train, val=None):
    trainer = toys.trainer(max_epochs=1)
    trainer.fit(module, train, val)
    return trainer


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (loader(48, 48), loader(64, 64), "64 x 64 pixels, and config.json says 160 x 160: .* pass image_size=64;"),
        (loader(48, 64), None, r"48 x 64 pixels, and config.json says 160 x 160: .* pass image_size=\(48, 64\);"),
        (loader(160, 160), [loader(64, 64), loader(48, 48)], "64 x 64 pixels, .* pass image_size=64;"),
        (loader(48, 48), loader(64, 64, num_workers=1), "64 x 64 pixels, .* pass image_size=64;"),
    ],
    ids=["val", "train", "several", "workers"],
)
def test_another_size_than_that_of_the_validation_is_warned_of_once(tmp_path, train, val, said):
    module = Lit(network_of())
    trainer = trained(module, train, val)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.warns(UserWarning, match=f"{said} otherwise set the pretrained_cfg of the network.$") as caught:
        lt.export(module, tmp_path / "mine", trainer=trainer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    fix = eval(re.search(r"image_size=(.*);", str(caught[0].message))[1])
    lt.export(module, tmp_path / "fixed", trainer=trainer, image_size=fix)  # warnings are errors
    lt.export(module, tmp_path / "asked", trainer=trainer, image_size=96)  # what is asked for is not compared


@pytest.mark.parametrize("module", [Hooks, lambda network: Lit(network)], ids=["hooks", "the same size"])
def test_no_size_is_warned_of_if_it_is_the_written_one_or_images_are_changed_later(tmp_path, module):
    module = module(network_of())
    size = 64 if isinstance(module, Hooks) else 160
    lt.export(module, tmp_path / "mine", trainer=trained(module, loader(size, size), loader(size, size)))


@pytest.mark.parametrize("size", [160, 64, 224])
def test_a_module_that_resizes_is_warned_of_but_no_size_is_proposed(tmp_path, size):
    module = Resizes(network_of(), size)
    trainer = trained(module, loader(96, 96))
    with pytest.warns(UserWarning, match="changes images before its ResNet takes them") as caught:
        lt.export(module, tmp_path / "mine", trainer=trainer)
    assert len(caught) == 1


def test_of_a_network_of_one_size_nothing_is_said(tmp_path):
    module = Lit(network_of(**VIT))
    lt.export(module, tmp_path / "mine", trainer=trained(module, loader(64, 64)))


def test_images_that_cannot_be_read_again_do_not_stop_an_export(tmp_path):
    module = Lit(network_of())
    trainer = trained(module, train := loader(48, 48), val := loader(64, 64))
    val.dataset.is_broken = True
    with pytest.warns(UserWarning, match="images are 48 x 48 pixels"):  # those of the training
        lt.export(module, tmp_path / "one", trainer=trainer)
    train.dataset.is_broken = True
    lt.export(module, tmp_path / "none", trainer=trainer)
    untrained = toys.trainer()
    lt.export(module, tmp_path / "untrained", trainer=untrained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lt.export(module, tmp_path / "alone").is_dir()


class Pixels(Dataset):
    """Random pixels from 0 to 1, changed by a function."""

    def __init__(self, change):
        self.change = change

    def __len__(self):
        return 6

    def __getitem__(self, index):
        pixels = torch.rand(3, 160, 160, generator=torch.Generator().manual_seed(index))
        return self.change(pixels.round(decimals=2)), index % 3


def images_of(change):
    return DataLoader(Pixels(change), batch_size=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda image: image, "from 0 to 1, .* makes them from -1 to 1"),
        (lambda image: image * 255, "from 0 to 255, .* makes them from -1 to 1"),
        (lambda image: image * 10 - 5, "from -5 to 5, .* makes them from -1 to 1"),
    ],
    ids=["from 0 to 1", "bytes", "otherwise"],
)
def test_other_pixels_than_timms_transform_makes_are_warned_of_and_the_fix_makes_them(tmp_path, change, said):
    module = Lit(network_of())
    trainer = trained(module, images_of(change))
    with pytest.warns(UserWarning, match=f"Pixels of the Trainer's images run {said}") as caught:
        lt.export(module, tmp_path / "mine", trainer=trainer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    fix = re.search(r"network\.(pretrained_cfg.update\(.*\)) before the export", str(caught[0].message))[1]
    if "..." in fix:
        fix = "pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))"
    eval(f"module.network.{fix}")
    _, transform = transform_of(lt.export(module, tmp_path / "fixed", trainer=trainer))  # warnings are errors
    for grey in (0, 255):  # all alike, so that no resizing matters
        given, pixels = transform(Image.new("RGB", (160, 160), (grey,) * 3)), torch.full((3, 160, 160), grey / 255)
        torch.testing.assert_close(given, change(pixels), rtol=1e-4, atol=1e-4)


class Normalises(Lit):
    def forward(self, images):
        return self.network((images - 0.45) / 0.22)


def test_images_that_the_forward_normalises_are_warned_of_once(tmp_path):
    module = Normalises(network_of())
    trainer = trained(module, images_of(lambda image: image))
    with pytest.warns(UserWarning, match="changes images before its ResNet takes them") as caught:
        lt.export(module, tmp_path / "mine", trainer=trainer)
    assert len(caught) == 1
