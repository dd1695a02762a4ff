"""Features that pretrained networks make of the same images, each given them as it knows pictures (ours)."""

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.datasets import load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.methods.collaborative.members import architecture, loaded, make_of
from lightning_transfer.methods.selective.identity import identity
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.naming import structure
from lightning_transfer.progress import Step
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import in_order
from lightning_transfer.roles import find_head, linear_layers
from lightning_transfer.stamps import checksum, stamped, unstamped
from lightning_transfer.tracing import evaluating

Networks: TypeAlias = Mapping[str, nn.Module | str] | Sequence[nn.Module | str]
GIVE = "Give the dataset itself, without Normalize and augmentation: torchvision's with transform=None, say."
CONFIG = '.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, 224, 224)}'


def named(networks: Networks) -> dict[str, nn.Module | str]:
    """Return networks by name; one of a list is called as timm calls it, or as its class.

    Raises:
        TransferConfigError: there are none, two share a name, or one is something else.
    """
    if isinstance(networks, Mapping):
        pairs = list(networks.items())
    else:
        each = networks if isinstance(networks, Sequence) and not isinstance(networks, str) else [networks]
        pairs = [(one if isinstance(one, str) else architecture(one) or type(one).__name__, one) for one in each]
    found = dict(pairs)
    if not pairs or len(found) < len(pairs) or not all(isinstance(one, str | nn.Module) for one in found.values()):
        shown = ", ".join(f"{name!r}, a {type(one).__name__}" for name, one in pairs) or "none"
        raise TransferConfigError(
            f"Networks: {shown}; expected names of timm's and modules, each under a name of its own: "
            'rank_networks({"theirs": "resnet50.a1_in1k", "mine": module}, dataset).'
        )
    return found


def pictures_of(data: Any) -> Pictures:
    """Return the images of a dataset, or of the train dataset of a loader or a DataModule, as 0 to 1.

    Raises:
        TransferConfigError: samples are not (image, class number), or images are normalised or augmented.
    """
    if hasattr(data, "train_dataloader"):
        from lightning_transfer.glue.proxy import loader_of, trainer_class

        data = loader_of(data, trainer_class(data), {"accelerator": "cpu"})
    if isinstance(data, DataLoader):
        from lightning_transfer.glue.trainer import served

        data = served(data)
    pictures = Pictures(data, "target")
    with seeded(0, 0):  # reading may draw
        sample = load(data, 0, of="target")
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TransferConfigError(
            f"A sample of the {type(data).__name__} is {structure(sample)}; expected (image, class number). Give such "
            "a dataset, or a list: [(sample['image'], sample['label']) for sample in dataset]."
        )
    extent = pictures.glance.extent
    if extent is not None and not 0 <= extent.least <= extent.largest <= 1:
        raise TransferConfigError(
            f"The images' pixels run from {extent.least:.3g} to {extent.largest:.3g}, as if they were normalised; "
            "expected PIL images, uint8, or floats from 0 to 1, since each network is given them normalised as it "
            f"knows them. {GIVE}"
        )
    pictures.check_always_the_same(GIVE)
    return pictures


class _Prepared(Dataset[Tensor | str]):
    """Pictures as a network knows them, or why one cannot be read.

    All go through timm's own transform as 8-bit PIL images: it resizes tensors otherwise, and pads floats wrongly.
    """

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, index: int) -> Tensor | str:
        from PIL import Image

        pixels = self.pictures[index].pixels
        if isinstance(pixels, str):
            return pixels
        levels = (pixels * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
        return self.transform(Image.fromarray(levels.numpy()))


class _Features:
    """Runs a network, and returns what its head takes, or what the network gives if it ends without a head.

    Args:
        network: a copy, which is changed.
        name: of it, for messages.
    """

    def __init__(self, network: Any, name: str) -> None:
        self.network, self.name = network, name
        self.head: nn.Module | None = None
        self.heard: list[tuple[nn.Module, Tensor, Tensor]] = []
        if architecture(network) and hasattr(network, "reset_classifier"):
            network.reset_classifier(0)  # timm's own way to features
            return
        try:
            heads = [find_head(network).module]
        except TransferConfigError:  # none or several: the head is what gives the scores that the network gives
            heads = [layer for _, layer in linear_layers(network) if isinstance(layer, nn.Linear)]
        for head in heads:
            head.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, layer: nn.Module, args: Any, kwargs: Any, given: Tensor) -> None:
        self.heard.append((layer, args[0] if args else next(iter(kwargs.values())), given))

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, D) features of (B, C, H, W) images."""
        self.heard.clear()
        found = self.network(images)
        leaves = tree_leaves(found)
        for head, taken, scores in reversed(self.heard):
            if any(_ranks_alike(scores.flatten(1), leaf) for leaf in leaves):
                self.head, found = head, taken
                break
        if not isinstance(found, Tensor) or found.ndim not in (2, 4):
            raise TransferConfigError(
                f"{self.name} gives {structure(found)}; expected (B, D) features or (B, classes) logits of a batch."
            )
        return found.mean((2, 3)) if found.ndim == 4 else found

    @property
    def num_parameters(self) -> int:
        """Of the network without its head."""
        head = set() if self.head is None else {*self.head.parameters()}
        return sum(each.numel() for each in self.network.parameters() if each not in head)


def _ranks_alike(scores: Tensor, given: Any) -> bool:
    """Return whether a network gives the scores of its head, or shares made of them."""
    is_one = isinstance(given, Tensor) and given.shape == scores.shape
    return is_one and bool((given.argmax(1) == scores.argmax(1)).all())


class Seen(NamedTuple):
    """What a network made of all images: (n, D) features, the milliseconds an image takes, and the network's size."""

    features: Tensor
    milliseconds: float
    parameters: int


@dataclass(frozen=True)
class Run:
    """All images, and how networks are run on them.

    Attributes:
        pictures: the images.
        step: advances the bar.
        device: where networks run.
        batch_size: images that run together.
        num_workers: processes that read images.
        cache: folder of features; None for none.
    """

    pictures: Pictures
    step: Step
    device: str | torch.device
    batch_size: int
    num_workers: int
    cache: str | os.PathLike[str] | None

    def look(self, name: str, given: nn.Module | str) -> tuple[Seen, tuple[int, int]]:
        """Return what a network makes of all images, by a copy of it or from the cache, and the size of its pictures.

        Raises:
            TransferConfigError: it does not say how its pictures are normalised, or what it gives is not features.
        """
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        plain = getattr(given, "_orig_mod", given)
        network: Any = loaded(plain) if isinstance(plain, str) else copy.deepcopy(plain)
        if not {"mean", "std", "input_size"} <= {*(getattr(network, "pretrained_cfg", None) or {})}:
            raise TransferConfigError(
                f"{name}, a {type(network).__name__}, does not say how its pictures are sized and normalised. Write "
                f"what it was pretrained with; for most networks that is: network{CONFIG}"
            )
        options = resolve_model_data_config(network)
        prepared = _Prepared(self.pictures, create_transform(**options, is_training=False))
        features = _Features(network.to(self.device).requires_grad_(False), name)
        return self._kept(features, prepared), options["input_size"][1:]

    def _kept(self, features: _Features, prepared: _Prepared) -> Seen:
        if self.cache is None:
            return self._computed(features, prepared)
        network, transform = features.network, prepared.transform
        made_of = [identity(self.pictures), make_of(network), repr(transform), network.state_dict()]
        path = Path(self.cache) / f"{checksum(made_of)}.pt"
        with suppress(TransferConfigError), reading(path, what="file of features", fix=""):  # else it is made anew
            found = Seen(**unstamped(torch.load(path, map_location="cpu", weights_only=True)))
            self.step(len(self.pictures), features.name)
            return found
        found = self._computed(features, prepared)
        content = stamped(found._asdict())
        write_atomically(path, lambda file: torch.save(content, file), what="features", fix="Pass another cache=.")
        return found

    def _computed(self, features: _Features, prepared: _Prepared) -> Seen:
        parts: list[Tensor] = []
        times: list[float] = []
        dtype = next((each.dtype for each in features.network.parameters()), torch.float32)
        workers = {"num_workers": self.num_workers}
        for batch in in_order(prepared, range(len(self.pictures)), size=self.batch_size, workers=workers):
            for index, image in enumerate(batch, sum(map(len, parts))):
                if isinstance(image, str):
                    raise TransferConfigError(f"Target sample {index} cannot be read: {image}. Leave it out.")
            images, begin = torch.stack(batch).to(self.device, dtype), time.perf_counter()
            try:
                with seeded(0, 0), torch.inference_mode(), evaluating(features.network):
                    parts.append(features(images).float().cpu())
            except Exception as error:
                error.add_note(f"This happened while {features.name} ran on images {tuple(images.shape)}.")
                raise
            times.append((time.perf_counter() - begin) * 1000 / len(batch))
            self.step(len(batch), features.name)
        found = torch.cat(parts)
        if len(broken := (~found.isfinite()).any(1).nonzero()):
            raise TransferConfigError(f"{features.name} gives NaN or infinite features of image {int(broken[0])}.")
        return Seen(found, statistics.median(times[1:] or times), features.num_parameters)
