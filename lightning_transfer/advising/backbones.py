"""Compute the features that pretrained networks give the same images, each with its own preprocessing (ours)."""

import copy
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from lightning_transfer.advising.features import Features
from lightning_transfer.compiling import uncompiled
from lightning_transfer.datasets import load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.image_sizes import check_takes, resized
from lightning_transfer.methods.collaborative.members import make_of
from lightning_transfer.methods.selective.pictures import Pictures, spread
from lightning_transfer.naming import a_class, nesting
from lightning_transfer.networks import check_timm_name, loaded, timm_name
from lightning_transfer.progress import Step
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import apart, in_order
from lightning_transfer.stamps import checksum, stamped, unstamped
from lightning_transfer.tracing import required_size

Networks: TypeAlias = Mapping[str, nn.Module | str] | Sequence[nn.Module | str]
GIVE = "Give the dataset itself, without Normalize and augmentation: torchvision's with transform=None, say."
CONFIG = '.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, 224, 224)}'
LOOK = 8  # images by which is decided whether a network gives logits, and whether kept features are its own


def by_name(networks: Networks, image_size: int | None = None) -> dict[str, nn.Module | str]:
    """Return networks by name; one of a list is called as timm calls it, or as its class.

    Raises:
        TransferConfigError: there are none, two share a name, one is something else, timm has no model of a name, or
            a module does not say how its pictures are normalised, or does not take `image_size`.
    """
    if isinstance(networks, Mapping):
        pairs = list(networks.items())
    else:
        each = networks if isinstance(networks, Sequence) and not isinstance(networks, str) else [networks]
        pairs = [(one if isinstance(one, str) else timm_name(one) or type(one).__name__, one) for one in each]
    found = dict(pairs)
    if shared := [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]:
        raise TransferConfigError(
            f"Networks share the name {shared[0]!r}. Name each: rank_networks({{'mine': network, ...}}, dataset)."
        )
    are_named = all(isinstance(name, str) and isinstance(one, str | nn.Module) for name, one in pairs)
    if not pairs or not are_named:
        shown = ", ".join(f"{name!r}, {a_class(one)}" for name, one in pairs) or "none"
        raise TransferConfigError(
            f"Networks: {shown}; expected names of timm models, or modules by name, a string: "
            'rank_networks({"theirs": "resnet50.a1_in1k", "mine": module}, dataset).'
        )
    for name, one in pairs:
        if isinstance(one, str):
            check_timm_name(one)
        else:  # timm's say it
            _check_configuration(name, one)
            _check_size(name, one, image_size)
    return found


def _check_size(name: str, network: nn.Module, image_size: int | None) -> None:
    if image_size is not None:
        fix = f"Leave {name} out, or leave image_size out: each network then gets the size of its pretraining."
        check_takes(uncompiled(network), (image_size, image_size), name=name, fix=fix)


def _check_configuration(name: str, network: nn.Module) -> None:
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not {"mean", "std", "input_size"} <= config.keys():
        raise TransferConfigError(
            f"{name}, {a_class(network)}, does not say how its images are sized and normalised. Write what it "
            f"was pretrained with; for most networks this is: network{CONFIG}"
        )
    size = config["input_size"]
    are_numbers = isinstance(size, Sequence) and all(isinstance(side, int) and side > 0 for side in size)
    if not are_numbers or len(size) != 3 or size[0] not in (1, 3):
        raise TransferConfigError(
            f'{name}: pretrained_cfg["input_size"] is {size!r}; expected channels, 3, or 1 for grey images, then '
            "height and width: (3, 224, 224). Networks of other channels cannot be ranked."
        )


def pictures_of(data: Any, num_workers: int) -> Pictures:
    """Return the images of a dataset, or of the train dataset of a loader or a DataModule, as 0 to 1.

    Args:
        data: of the images.
        num_workers: processes that will read them.

    Raises:
        TransferConfigError: samples are not (image, class number), images are normalised or augmented, what is white
            in them is not known, or the loader has a collate_fn.
    """
    if isinstance(data, str | Path):
        raise TransferConfigError(f"The dataset is a path; load it: ImageFolder({str(data)!r}) of torchvision.")
    if hasattr(data, "train_dataloader"):
        from lightning_transfer.glue.loaders import loader_of
        from lightning_transfer.glue.trainer import trainer_class

        data = loader_of(data, trainer_class(data), {"accelerator": "cpu", "devices": 1})
    if isinstance(data, DataLoader):
        from lightning_transfer.glue.loaders import served

        if data.collate_fn not in (default_collate, default_convert):
            raise TransferConfigError(
                f"The loader has a collate_fn, {data.collate_fn!r}, and images are read one at a time without it. Give "
                "the dataset itself; if collate_fn changes images or labels, let its __getitem__ do that."
            )
        data = served(data)
    pictures = Pictures(data, "dataset", num_workers=num_workers)
    with seeded(0, 0):  # reading may draw
        sample = apart(lambda: load(data, 0, of="dataset"), num_workers)
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TransferConfigError(
            f"A sample of the {type(data).__name__} is {nesting(sample)}; expected (image, class number). Give such "
            "a dataset, or a list: [(sample['image'], sample['label']) for sample in dataset]."
        )
    extent = pictures.glance.extent
    if extent is not None and not 0 <= extent.least <= extent.largest <= 1:
        raise TransferConfigError(
            f"The images' pixels run from {extent.least:.3g} to {extent.largest:.3g}, as if they were normalised; "
            "expected PIL images, uint8, or floats from 0 to 1, because they are normalised for each network. "
            f"{GIVE}"
        )
    if dim := [one for one in pictures.glance.ranges.values() if one.is_far_below_white]:
        raise TransferConfigError(
            f"The images' pixels are {dim[0]}, but no pixel is near white; expected PIL images of 8 bits, uint8, or "
            "floats from 0 to 1. Divide the pixels in the dataset by the number that is white: "
            f"numpy.asarray(image) / {dim[0].largest:g}, if white is {dim[0].largest:g}."
        )
    pictures.check_always_the_same(GIVE)
    return pictures


class _Prepared(Dataset[Tensor | str]):
    """Prepares pictures as a network expects them; gives the reason if one cannot be read.

    All go through timm's own transform as 8-bit PIL images: it resizes tensors otherwise, and pads floats wrongly.
    """

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Tensor], mode: str) -> None:
        self.pictures, self.transform, self.mode = pictures, transform, mode

    def __getitem__(self, index: int) -> Tensor | str:
        from PIL import Image

        pixels = self.pictures[index].pixels
        if isinstance(pixels, str):
            return pixels
        levels = (pixels * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
        return self.transform(Image.fromarray(levels.numpy()).convert(self.mode))


class Seen(NamedTuple):
    """Holds the features that a network gave all images, and what they cost.

    Attributes:
        features: (n, D).
        milliseconds: that an image takes in the fastest batch.
        parameters: of the network without its head.
        look: features of some images, computed separately, to check that kept features are the network's.
    """

    features: Tensor
    milliseconds: float
    parameters: int
    look: Tensor


@dataclass(frozen=True)
class Run:
    """Runs networks on all images.

    Attributes:
        pictures: the images.
        step: advances the bar.
        device: where networks run.
        batch_size: images that run together.
        num_workers: processes that read images.
        cache: folder of features; None for none.
        image_size: height and width of all pictures; None for those of each network's pretraining.
    """

    pictures: Pictures
    step: Step
    device: str | torch.device
    batch_size: int
    num_workers: int
    cache: str | os.PathLike[str] | None
    image_size: int | None

    def look(self, name: str, given: nn.Module | str) -> tuple[Seen, tuple[int, int]]:
        """Return the features that a copy of a network gives all images, or those in the cache, and its image size.

        Raises:
            TransferConfigError: it does not say how its pictures are normalised, it does not take their size, or what
                it gives is not features.
        """
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        network: Any = loaded(given) if isinstance(given, str) else _copied(uncompiled(given), name)
        _check_configuration(name, network)
        _check_size(name, network, self.image_size)
        options = resolve_model_data_config(network)
        if self.image_size is not None:
            options = resized(options, (self.image_size, self.image_size))
        elif size := required_size(network):
            options["input_size"] = (options["input_size"][0], *size)
        if is_grey := options["input_size"][0] == 1:
            options |= {key: (statistics.fmean(options[key]),) for key in ("mean", "std")}
        transform = create_transform(**options, is_training=False)
        features = Features(network.to(self.device).requires_grad_(False), name)
        prepared = _Prepared(self.pictures, transform, "L" if is_grey else "RGB")
        return self._kept(features, prepared), options["input_size"][1:]

    def _kept(self, features: Features, prepared: _Prepared) -> Seen:
        indices = spread(len(prepared.pictures), LOOK)
        first = apart(lambda: [prepared[index] for index in indices], self.num_workers)
        batches = self._stacked(features, indices, first).split(self.batch_size)
        features.settle(batches)
        look = torch.cat([features(images) for images in batches])
        if self.cache is None:
            return self._computed(features, prepared, look)
        network, transform = features.network, prepared.transform
        where = str(self.device), self.batch_size  # which decide how long it takes
        made_of = [self.pictures.identity, make_of(network), repr(transform), *where, network.state_dict()]
        path = Path(self.cache) / f"{checksum(made_of)}.pt"
        with suppress(TransferConfigError), reading(path, what="file of features", fix=""):  # else it is made anew
            found = Seen(**unstamped(torch.load(path, map_location="cpu", weights_only=True)))
            if _are_alike(found.look, look):
                self.step(len(self.pictures), features.name)
                return found
        found = self._computed(features, prepared, look)
        content = stamped(found._asdict())
        write_atomically(path, lambda file: torch.save(content, file), what="features", fix="Pass another cache=.")
        return found

    def _computed(self, features: Features, prepared: _Prepared, look: Tensor) -> Seen:
        parts: list[Tensor] = []
        times: list[float] = []
        workers = {"num_workers": self.num_workers}
        for batch in in_order(prepared, range(len(self.pictures)), size=self.batch_size, workers=workers):
            done = sum(map(len, parts))
            images, begin = self._stacked(features, range(done, done + len(batch)), batch), time.perf_counter()
            parts.append(features(images))
            times.append((time.perf_counter() - begin) * 1000 / len(batch))
            self.step(len(batch), features.name)
        found = torch.cat(parts)
        if len(broken := (~found.isfinite()).any(1).nonzero()):
            raise TransferConfigError(f"{features.name} gives NaN or infinite features of image {int(broken[0])}.")
        return Seen(found, min(times), features.num_parameters, look)

    def _stacked(self, features: Features, indices: Sequence[int], batch: list[Any]) -> Tensor:
        for index, image in zip(indices, batch, strict=True):
            if isinstance(image, str):
                raise TransferConfigError(f"Image {index} cannot be read: {image}. Leave it out.")
        dtype = next((each.dtype for each in features.network.parameters()), torch.float32)
        return torch.stack(batch).to(self.device, dtype)


def _copied(network: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise TransferConfigError(
            f"{name}, {a_class(network)}, cannot be copied ({type(error).__name__}: {error}). A copy is run, "
            "so that yours does not change. Remove what cannot be copied, such as a lock or an open file."
        ) from error


def _are_alike(kept: Tensor, found: Tensor) -> bool:
    """Return whether features are the same but for rounding, which other numbers of threads change."""
    return kept.shape == found.shape and bool(((kept - found).abs() <= 1e-5 * found.abs().amax(0)).all())
