"""Measure what gated layers cost compared with plain fine-tuning: a step, and the memory kept for its backward."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import timm
import torch
import torch.nn.functional as F
from fits import TARGET_CLASSES, Fit, resnet18
from measuring import Row, Run, Settings
from torch import Tensor, nn

from lightning_transfer import AdaFilter, GatedTransfer
from lightning_transfer.functional import apply_adafilter
from lightning_transfer.nn import TransferModule

PASSES = 50  # of a module that takes next to no time


def gated(plain: Fit) -> tuple[Run, Run]:
    """Return a fit with gated filters, and the same without."""
    return replace(plain, callbacks=lambda num_steps: [AdaFilter()]), plain


def resnet50(settings: Settings) -> Fit:
    """Return plain training of a ResNet-50."""
    return replace(resnet18(settings), network=partial(timm.create_model, "resnet50", num_classes=TARGET_CLASSES))


@Row("ResNet-18, gated filters / plain step", bar=1.75, most=9)
def gated_small(settings: Settings) -> tuple[Run, Run]:
    """Measure every convolution twice, and the gate."""
    return gated(resnet18(settings))


@Row("ResNet-50, gated filters / plain step", bar=1.85, most=5, is_slow=True)
def gated_large(settings: Settings) -> tuple[Run, Run]:
    """Measure every convolution twice, and the gate."""
    return gated(resnet50(settings))


def saved_bytes(network: nn.Module, images: Tensor) -> float:
    """Return the bytes that a training pass keeps for its backward, without the network's own weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(network.train()(images), torch.zeros(len(images), dtype=torch.int64))
    assert loss.requires_grad  # holds what was kept, so that no address is used twice
    return float(sum(kept.values()))


def saving(settings: Settings, make: Callable[[], nn.Module]) -> tuple[Run, Run]:
    """Return the bytes of a gated network, and those of the plain one."""
    images = torch.rand(settings.batch_size, 3, 64, 64)
    plain, changed = make(), make()
    apply_adafilter(changed)
    return partial(saved_bytes, changed, images), partial(saved_bytes, plain, images)


@Row("ResNet-18, gated filters / plain, saved for backward", bar=1.50, most=1)
def saved_small(settings: Settings) -> tuple[Run, Run]:
    """Compare the bytes of a pass."""
    return saving(settings, partial(timm.create_model, "resnet18", num_classes=TARGET_CLASSES))


@Row("ResNet-50, gated filters / plain, saved for backward", bar=1.55, most=1)
def saved_large(settings: Settings) -> tuple[Run, Run]:
    """Compare the bytes of a pass."""
    return saving(settings, partial(timm.create_model, "resnet50", num_classes=TARGET_CLASSES))


@Row("ResNet-18, transfer module / step", bar=0.3, unit="%", most=5)
def transfer_module(settings: Settings) -> tuple[Run, Run]:
    """Compare the module alone, forwards and backwards, with a plain step."""
    plain = resnet18(settings)
    module = TransferModule(512).train()

    def alone() -> float:
        features = torch.rand(settings.batch_size, 512, requires_grad=True)
        start = time.process_time()
        for _ in range(PASSES):
            module(features).sum().backward()
        return (time.process_time() - start) / PASSES

    return alone, plain


@Row("ResNet-18, gated transfer with auxiliary classifier / plain step", most=5, is_slow=True)
def gated_transfer(settings: Settings) -> tuple[Run, Run]:
    """Measure the whole callback."""
    plain = resnet18(settings)
    return replace(plain, callbacks=lambda num_steps: [GatedTransfer(aux_weight=0.2)]), plain
