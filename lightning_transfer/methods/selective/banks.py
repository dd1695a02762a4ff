"""Describe images by the responses of filter banks (arXiv 1702.08690, section 3.1).

The paper's: a bank has Gabor filters, or the kernels of a pretrained network's first layers, whose maps are taken
before the nonlinearity. Ours: sizes, wavelengths and the grey input of the Gabor bank, because the paper's are not
available.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError, check_count, nearest
from lightning_transfer.methods.selective.descriptors import filter_responses
from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.stamps import digest
from lightning_transfer.tracing import required_size

SIZES = (7, 11, 15, 19)
SIGMA, ASPECT = 0.56, 0.5  # of the wavelength; of the envelope's sides


class FilterBank(nn.Module, ABC):
    """Describes images by the responses of filters; abstract, made by `gabor` and `from_model`.

    Example:
        >>> FilterBank.gabor(sizes=(7, 11), orientations=4).num_filters
        (8, 8)
    """

    num_filters: tuple[int, ...]  # of each layer

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return each layer's responses (n, filters, height, width) to images (n, channels, height, width)."""

    @abstractmethod
    def describe(self) -> str:
        """Return a description of everything that decides the responses; weights as a digest."""

    @property
    def weights(self) -> Tensor:
        """Return the filters' weights (filters,): equal sums for all layers, equal weights in a layer (authors')."""
        shares = [
            torch.full((num,), 1 / (len(self.num_filters) * num), dtype=torch.float64) for num in self.num_filters
        ]
        return torch.cat(shares)

    @staticmethod
    def gabor(*, sizes: Sequence[int] = SIZES, orientations: int = 6, stride: int = 1) -> "FilterBank":
        """Make a bank of Gabor filters on grey images, with separate real and imaginary parts.

        Args:
            sizes: sides of the filters in pixels, odd; the wavelength is half of the side.
            orientations: how many, evenly over half a turn.
            stride: use every stride-th position only.

        Raises:
            TransferConfigError: a size is even, or a count is out of range.

        Example:
            >>> bank = FilterBank.gabor()
            >>> sum(bank.num_filters), [tuple(maps.shape) for maps in bank(torch.rand(1, 3, 24, 24))][0]
            (48, (1, 12, 18, 18))
        """
        if not sizes or len(set(sizes)) < len(sizes):
            raise TransferConfigError(f"sizes={tuple(sizes)}; expected different sizes, such as {SIZES}.")
        for size in sizes:
            check_count("sizes", size, least=3)
            if size % 2 == 0:
                raise TransferConfigError(
                    f"sizes={tuple(sizes)}; the side of a Gabor filter is odd, but {size} is not."
                )
        check_count("orientations", orientations, least=1)
        check_count("stride", stride, least=1)
        return _GaborBank(tuple(sizes), orientations, stride)

    @staticmethod
    def from_model(model: nn.Module, layers: Sequence[str], *, normalize: bool = True) -> "FilterBank":
        """Make a bank of all kernels of a network's named convolutions.

        Args:
            model: any network, from timm or torchvision or your own; it is copied.
            layers: dotted paths of its convolutions, usually the first ones.
            normalize: whether to normalise images in 0..1 as in the network's training, by its timm data config
                (ImageNet's mean and deviation if it has none); False if the dataset does it.

        Raises:
            TransferConfigError: a layer is not a convolution of the model.

        Example:
            >>> import timm
            >>> bank = FilterBank.from_model(timm.create_model("resnet10t"), layers=["conv1.0"])
            >>> bank.num_filters
            (24,)
        """
        return _ModelBank(model, tuple(layers), normalize)


class _GaborBank(FilterBank):
    """Applies Gabor filters; those of one size form a layer, and all have the same weight."""

    def __init__(self, sizes: tuple[int, ...], orientations: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_filters = (2 * orientations,) * len(sizes)
        for size in sizes:
            self.register_buffer(f"filters_{size}", _gabor_filters(size, orientations))

    def forward(self, images: Tensor) -> list[Tensor]:
        least, (height, width) = max(filters.shape[-1] for filters in self.buffers()), images.shape[-2:]
        if min(height, width) < least:
            raise TransferConfigError(
                f"Found images of {height} x {width} pixels; the largest Gabor filter has {least} x {least}. Make "
                f"target and source images larger, for example by Resize({2 * least}), or pass "
                "bank=FilterBank.from_model(model, layers=['conv1'])."
            )
        grey = images.mean(1, keepdim=True)
        return [filter_responses(grey, filters, stride=self.stride) for filters in self.buffers()]

    def describe(self) -> str:
        return f"gabor {digest(self.state_dict())} stride {self.stride}"


def _gabor_filters(size: int, orientations: int) -> Tensor:
    """Return (2 * orientations, 1, size, size), each of zero mean and unit length."""
    reach, wavelength = size // 2, size / 2
    sigma = SIGMA * wavelength
    y, x = torch.meshgrid(*[torch.arange(-reach, reach + 1, dtype=torch.float64)] * 2, indexing="ij")
    filters = []
    for number in range(orientations):
        angle = math.pi * number / orientations
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-(along**2 + ASPECT**2 * across**2) / (2 * sigma**2))
        phase = 2 * math.pi * along / wavelength
        filters += [envelope * torch.cos(phase), envelope * torch.sin(phase)]
    kernels = torch.stack(filters)[:, None]
    kernels -= kernels.mean((2, 3), keepdim=True)
    unit: Tensor = kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return unit.float()


class _EnoughError(Exception):
    """Ends a pass when the last layer that is needed has run."""


class _ModelBank(FilterBank):
    """Applies convolutions of a pretrained network, before the nonlinearity."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], normalize: bool) -> None:
        super().__init__()
        convolutions = {name: child for name, child in model.named_modules() if isinstance(child, nn.Conv2d)}
        for name in layers:
            if name not in convolutions:
                raise TransferConfigError(
                    f"{name!r} is not a convolution of {type(model).__name__}. {nearest(name, convolutions)}"
                )
        if not layers:
            raise TransferConfigError(f"layers is empty; write layers={list(convolutions)[:2]}.")
        self.layers = layers
        self.num_filters = tuple(convolutions[name].out_channels for name in layers)
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.normalize = normalize
        self.channels = next(iter(convolutions.values())).in_channels
        scale = _statistics(model, self.channels) if normalize else (torch.zeros(1), torch.ones(1))
        mean, deviation = (part.float() for part in scale)  # whatever type new tensors have
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("deviation", deviation.view(-1, 1, 1))

    def train(self, mode: bool = True) -> "_ModelBank":
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.normalize and bool(((images < 0) | (images > 1)).any()):
            raise TransferConfigError(
                f"Found pixels {Extent().see(images)}, so images are already normalised, and the bank would do it "
                "again. Write FilterBank.from_model(..., normalize=False)."
            )
        if images.shape[1] == 1 != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks, suppress(_EnoughError):
            for name in self.layers:
                hooks.enter_context(self._keep(name, found))
            self.model((images - self.mean) / self.deviation)
        missing = [name for name in self.layers if name not in found]
        if missing:
            raise TransferConfigError(f"{type(self.model).__name__}.forward does not reach {missing}; leave it out.")
        return [found[name] for name in self.layers]

    def _keep(self, name: str, found: dict[str, Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output.clone()  # an in-place nonlinearity may follow
            if len(found) == len(self.layers):
                raise _EnoughError

        return self.model.get_submodule(name).register_forward_hook(hook)

    def _ran(self) -> set[nn.Module]:
        """Return the modules that run before the responses are there; all of them if a blank image does not run."""
        ran: set[nn.Module] = set()
        blank = torch.zeros(1, self.channels, *(required_size(self.model) or (64, 64)), device=self.mean.device)
        try:
            with ExitStack() as hooks:
                for child in self.model.modules():
                    hooks.enter_context(child.register_forward_pre_hook(lambda child, _: ran.add(child)))
                self(blank)
        except Exception:
            return {*self.model.modules()}
        return ran

    def describe(self) -> str:
        ran, layers = self._ran(), []  # later layers do not matter
        for name, child in self.model.named_modules():
            is_leaf = not any(child.children())
            own = {key: value for key, value in child.state_dict().items() if "." not in key}
            if child in ran and (own or is_leaf):
                layers.append((name, str(child) if is_leaf else child.extra_repr(), own))
        found = digest(layers)
        scale = digest(dict(self.named_buffers(recurse=False))) if self.normalize else "raw"
        return f"{', '.join(self.layers)} {found} {scale}"


def _statistics(model: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, deviation = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return (mean, deviation) if len(mean) == channels else (mean.mean()[None], deviation.mean()[None])
