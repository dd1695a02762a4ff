"""Measure what several networks cost compared with one, and what freezing saves."""

import copy
from dataclasses import replace

import timm
import torch
from fits import TARGET_CLASSES, resnet18
from gating_costs import saved_bytes
from measuring import Row, Run, Settings
from torch import nn

from lightning_transfer import CollaborativeFinetuning
from lightning_transfer.nn import CollaborativeEnsemble

HALF, MOST = 8, 16  # of the 17 convolutions that count


def together(settings: Settings, frozen: int, *, num_sources: int = 1) -> tuple[Run, Run]:
    """Return a fit of ResNet-18s side by side, and one of a single network."""
    plain = resnet18(settings)
    sources = [timm.create_model("resnet18") for _ in range(num_sources)]
    frozen_layers = dict.fromkeys(("own", *(f"source{number + 1}" for number in range(num_sources))), frozen)
    callback = CollaborativeFinetuning(sources, frozen_layers=frozen_layers)
    return replace(plain, callbacks=lambda num_steps: [copy.deepcopy(callback)]), plain


@Row("ResNet-18, two together / one plain step", bar=2.05, most=9)
def two(settings: Settings) -> tuple[Run, Run]:
    """Compare two networks, nothing frozen, with one."""
    return together(settings, 0)


@Row("ResNet-18, two together, half of each frozen / one plain step", bar=1.50, most=9, is_slow=True)
def two_half_frozen(settings: Settings) -> tuple[Run, Run]:
    """Compare two networks, each with eight of seventeen convolutions frozen, with one."""
    return together(settings, HALF)


@Row("ResNet-18 alone, half of it frozen / plain step", most=5, is_slow=True)
def half_frozen(settings: Settings) -> tuple[Run, Run]:
    """Freeze eight of seventeen convolutions of one network."""
    return together(settings, HALF, num_sources=0)


@Row("ResNet-18 alone, all but one frozen / plain step", most=5, is_slow=True)
def almost_frozen(settings: Settings) -> tuple[Run, Run]:
    """Freeze sixteen of seventeen convolutions of one network."""
    return together(settings, MOST, num_sources=0)


def saved(settings: Settings, frozen: int) -> tuple[Run, Run]:
    """Return what a partly frozen network keeps for its backward, and what the plain network keeps."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=TARGET_CLASSES)
    ensemble = CollaborativeEnsemble({"own": copy.deepcopy(plain)})
    ensemble.freeze({"own": frozen})
    images = torch.rand(settings.batch_size, 3, 64, 64)

    def kept(network: nn.Module) -> Run:
        return lambda: saved_bytes(network, images)

    return kept(ensemble), kept(plain)


@Row("ResNet-18 alone, half of it frozen / plain, saved for backward", most=1)
def half_saved(settings: Settings) -> tuple[Run, Run]:
    """Compare the bytes of a pass."""
    return saved(settings, HALF)


@Row("ResNet-18 alone, all but one frozen / plain, saved for backward", most=1)
def almost_saved(settings: Settings) -> tuple[Run, Run]:
    """Compare the bytes of a pass."""
    return saved(settings, MOST)
