"""Small data, a small network and small LightningModules that the promises are tested on."""

import copy
import random
from functools import cache

import lightning.pytorch as L
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

TARGET_CLASSES = 5
SOURCE_CLASSES = 7
WIDTH = 8


def images(num: int, num_classes: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    pixels = torch.randn(num, 3, 6, 6, generator=generator) + 0.5 * labels[:, None, None, None]
    return TensorDataset(pixels, labels)


class Recorder(Dataset):
    """A dataset that writes down which samples were loaded."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.loaded: list[int] = []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.dataset[index]


class Augmented(Dataset):
    """Random noise from every generator that augmentations use, and the index in place of the label."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return self.dataset[index][0] + noise.float(), index % SOURCE_CLASSES


def target_data() -> TensorDataset:
    return images(24, TARGET_CLASSES, seed=1)


def source_data() -> TensorDataset:
    return images(20, SOURCE_CLASSES, seed=2)


class ToyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, TARGET_CLASSES)

    def features(self, pixels):
        return F.relu(self.bn(self.conv(pixels))).mean((2, 3))

    def forward(self, pixels):
        return self.fc(self.features(pixels))


class OtherNet(nn.Module):
    """Of another make: two convolutions, other widths, other classes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.conv2 = nn.Conv2d(6, 7, 3)
            self.fc = nn.Linear(7, SOURCE_CLASSES)

    def forward(self, pixels):
        features = F.relu(self.conv2(F.relu(self.bn1(self.conv1(pixels)))))
        return self.fc(features.mean((2, 3)))


@cache
def _pretrained() -> tuple[ToyNet, nn.Linear]:
    """A network that knows the source task, and its source head."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net, head = ToyNet(), nn.Linear(WIDTH, SOURCE_CLASSES)
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.05)
        pixels, labels = source_data().tensors
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(head(net.features(pixels)), labels).backward()
            optimizer.step()
        optimizer.zero_grad()
    return net, head


def toy_net() -> ToyNet:
    return copy.deepcopy(_pretrained()[0])


def source_head() -> nn.Linear:
    return copy.deepcopy(_pretrained()[1])


class ToySteps:
    """The steps that both namespaces' modules share."""

    def __init__(self):
        super().__init__()
        self.model = toy_net()
        self.losses = []

    def forward(self, pixels):
        return self.model(pixels)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class LitToy(ToySteps, L.LightningModule):
    pass


class Late(LitToy):
    """A network that is built in `configure_model`."""

    def __init__(self):
        super().__init__()
        self.model = None

    def build(self):
        return toy_net()

    def configure_model(self):
        if self.model is None:
            self.model = self.build()


class PlToy(ToySteps, pl.LightningModule):
    pass


class StatefulLoader:
    """Target batches in order; tells a checkpoint where it is, so that a resume in mid-epoch is exact on this side."""

    batch_size = 4

    def __init__(self):
        self.batches = list(target_loader(self.batch_size))
        self.next = self.start = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.next, self.start = self.start, 0
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"] % len(self.batches)


class SaveEveryStep(L.Callback):
    """Writes a full checkpoint after every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def with_statistics(network: nn.Module) -> nn.Module:
    """Give the BatchNorm layers of a new network statistics as a training leaves them."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def target_loader(batch_size: int = 4) -> DataLoader:
    return DataLoader(target_data(), batch_size=batch_size)


def trainer(callbacks=(), *, namespace=L, **options):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return namespace.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module, callbacks=(), *, ckpt_path=None, loader=None, **options):
    """Fit on the target data and give the Trainer back."""
    runner = trainer(callbacks, **options)
    runner.fit(module, target_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return runner


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Equal to the bit, or within a tolerance."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
