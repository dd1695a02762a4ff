"""An ordinary project, as small as can be: a classifier, generated pictures and LightningCLI.

Nothing in it knows of lightning_transfer: the callback is in the file. A few seconds on a CPU, no download:

    python examples/yaml/project.py fit --config examples/yaml/soft.yaml
"""

from typing import Any

import lightning.pytorch as L
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def pretrained(name: str = "resnet10t") -> nn.Module:
    """Return a network that stands for your pretrained one: the same weights, and six source classes, in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, num_classes=6)
        network(torch.rand(8, 3, 32, 32))  # BatchNorm has seen images, as in pretraining
    return network


class Pictures(TensorDataset):
    """Noisy pictures, 32 by 32 pixels; each class has a pattern of its own."""

    def __init__(self, num: int = 24, classes: int = 6, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        patterns = torch.rand(classes, 3, 4, 4, generator=random)
        labels = torch.arange(num) % classes
        images = F.interpolate(patterns[labels], size=32) + 0.2 * torch.rand(num, 3, 32, 32, generator=random)
        super().__init__(images, labels)


class FewPictures(L.LightningDataModule):
    """The target: three classes, a few pictures of each."""

    def __init__(self, batch_size: int = 6) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the pictures to train on."""
        return DataLoader(Pictures(18, classes=3, seed=1), self.batch_size, shuffle=True)


class LitClassifier(L.LightningModule):
    """An ordinary image classifier: the pretrained network with a new head."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.model = pretrained()
        self.model.reset_classifier(3)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(args: list[str] | None = None) -> LightningCLI:
    """Run what the command line says, by default in four epochs on a CPU."""
    defaults = {"accelerator": "cpu", "max_epochs": 4, "log_every_n_steps": 1, "enable_checkpointing": False}
    return LightningCLI(LitClassifier, FewPictures, args=args, seed_everything_default=0, trainer_defaults=defaults)


if __name__ == "__main__":
    main()
