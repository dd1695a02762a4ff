"""Provide the networks of the transfer matrix, the module that trains them, and their scores."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from transfer_data import Pictures, normalised

import lightning_transfer as lt
from lightning_transfer.tracing import evaluating

# if a processor only emulates bfloat16, a step in it takes ten times as long as one in full precision
PRECISION = "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"
QUIET: dict[str, Any] = {  # options of a Trainer
    "accelerator": "cpu",
    "precision": PRECISION,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def small_resnet(num_classes: int) -> ResNet:
    """Return a timm ResNet for images of 32 pixels, .32 million parameters."""
    block: Any = BasicBlock  # timm asks for a class and is typed as for an instance
    network = ResNet(block, (1, 1, 1, 1), channels=(16, 32, 64, 128), stem_type="deep", stem_width=8)
    stem = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16), "maxpool": nn.Identity()}
    for name, layer in stem.items():
        setattr(network, name, layer)
    network.reset_classifier(num_classes)
    return network


class Classifier(L.LightningModule):
    """An ordinary project: SGD with momentum, whose rate falls to zero along a cosine."""

    gate_lr: float | None = None  # of AdaFilter's gates, if it differs from that of the filters

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.model = network
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return SGD on all trained parameters, and its schedule."""
        params = {name: param for name, param in self.named_parameters() if param.requires_grad}
        gates = [params.pop(name) for name in [*params] if "adafilter." in name and self.gate_lr is not None]
        groups: list[dict[str, Any]] = [{"params": params.values()}]
        if gates:
            groups.append({"params": gates, "lr": self.gate_lr})
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    @property
    def backbone(self) -> nn.Module:
        """Return all but the head, for Lightning's own callback."""
        return nn.ModuleList(child for name, child in self.model.named_children() if name != "fc")


def accuracy(network: nn.Module, images: Pictures) -> float:
    """Return the share of images that are right."""
    right = 0
    with evaluating(network), torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISION != "32-true"):
        for pixels, labels in zip(images.pixels.split(500), images.targets.split(500), strict=True):
            right += int((network(normalised(pixels)).argmax(1) == labels).sum())
    torch.clear_autocast_cache()
    return right / len(images)


def features(network: Any, images: Pictures) -> Tensor:
    """Return the inputs (n, 128) of the network's head."""
    with evaluating(network):  # restores the mode: Lightning's Trainer would keep the network in eval mode
        some = [network.forward_features(normalised(pixels)) for pixels in images.pixels.split(500)]
        return torch.cat([network.forward_head(each, pre_logits=True) for each in some])


def discrimination(network: nn.Module, images: Pictures) -> float:
    """Return how well features separate classes that neither task has shown."""
    metric = lt.metrics.GeneralDiscrimination()
    metric.update(features(network, images), images.targets)
    return float(metric.compute())
