"""Provide the pretrained networks of the regime benchmark, the module that tunes them, and their outputs."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import timm
import torch
import torch.nn.functional as F
from regime_data import Photos, centre
from torch import Tensor, nn

from lightning_transfer.tracing import evaluating

MOMENTUM, DECAY, WARM_UP = 0.9, 5e-4, 0.05  # of SGD; warm-up as a share of training
HEAD = "classifier"


class Rates(NamedTuple):
    """Learning rates: that of the backbone, and by how much the new head's is multiplied."""

    body: float
    times: float


def pretrained(name: str, weights: Path | None) -> nn.Module:
    """Load a timm network with its classifier, from a file or as timm does."""
    given: dict[str, Any] = {"pretrained": True} if weights is None else {"checkpoint_path": str(weights)}
    network: nn.Module = timm.create_model(name, **given).to(memory_format=torch.channels_last)
    return network


class Fading(torch.optim.lr_scheduler.LRScheduler):
    """A short linear warm-up, then a cosine to zero; parameter groups that a callback adds later are not changed."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.steps, self.warm_up = steps, max(1, round(WARM_UP * steps))
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rate of each group at this step."""
        done = self.last_epoch
        share = min(1.0, (done + 1) / self.warm_up) * (1 + math.cos(math.pi * done / self.steps)) / 2
        return [
            group["initial_lr"] * share if "initial_lr" in group else group["lr"]
            for group in self.optimizer.param_groups
        ]


class Tuning(L.LightningModule):
    """An ordinary project: SGD with momentum, one rate for the backbone and one for the new head.

    Args:
        network: pretrained, with a new head.
        rates: of the backbone and the head.
        depth_decay: rate of a stage of the network, as a share of the rate of the one after it.
    """

    def __init__(self, network: Any, rates: Rates, *, depth_decay: float = 1.0) -> None:
        super().__init__()
        self.model = network
        self.rates = rates
        self.depth_decay = depth_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Give every trained parameter the rate of its layer."""
        groups: dict[float, list[nn.Parameter]] = {self.rates.body: []}  # callbacks add theirs to the first group
        for name, param in self.named_parameters():
            if param.requires_grad:
                groups.setdefault(self.rate_of(name.split(".")), []).append(param)
        filled = [{"params": params, "lr": rate} for rate, params in groups.items() if params]
        optimizer = self.optimizer_of(filled)
        fading = Fading(optimizer, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fading, "interval": "step"}}

    def optimizer_of(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups."""
        return torch.optim.SGD(groups, lr=self.rates.body, momentum=MOMENTUM, weight_decay=DECAY)

    def rate_of(self, path: list[str]) -> float:
        """Return the learning rate of a parameter."""
        if HEAD in path:
            return self.rates.body * self.rates.times
        if self.depth_decay == 1:
            return self.rates.body
        stages = len(self.model.blocks)
        if "blocks" in path:
            depth = stages - int(path[path.index("blocks") + 1])
        else:
            depth = stages + 1 if path[-2] in ("conv_stem", "bn1") else 0
        return self.rates.body * self.depth_decay**depth

    @property
    def backbone(self) -> nn.Module:
        """Return all but the head, for Lightning's own callback."""
        return nn.ModuleList(child for name, child in self.model.named_children() if name != HEAD)


class ByAdam(Tuning):
    """The same project with AdamW, at a tenth of the rates."""

    def optimizer_of(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups, with torch's weight decay."""
        return torch.optim.AdamW([{**group, "lr": group["lr"] / 10} for group in groups], lr=self.rates.body / 10)


def body(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters before the head."""
    return [param for name, param in network.named_parameters() if HEAD not in name.split(".")]


def answers(network: nn.Module, images: Photos) -> Tensor:
    """Return the logits (n, classes) of images' centres."""
    device = next(network.parameters()).device
    with evaluating(network):
        return torch.cat([network(centre(pixels.to(device))).float().cpu() for pixels in images.pixels.split(100)])


def accuracy(network: nn.Module, images: Photos) -> float:
    """Return the share of images that are right."""
    return int((answers(network, images).argmax(1) == images.targets).sum()) / len(images)


def features(network: Any, images: Photos) -> Tensor:
    """Return the inputs of the network's head, (n, width), on images' centres."""
    return pooled(network, map(centre, images.pixels.split(100)))


def pooled(network: Any, batches: Iterable[Tensor]) -> Tensor:
    """Return the inputs of the network's head, (n, width), on batches of its own inputs."""
    device = next(network.parameters()).device
    with evaluating(network):
        some = (network.forward_features(images.to(device)) for images in batches)
        return torch.cat([network.forward_head(each, pre_logits=True) for each in some]).float().cpu()
