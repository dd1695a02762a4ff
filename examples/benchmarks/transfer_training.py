"""Run one training of the transfer matrix and score it."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transfer_data import Pictures
from transfer_networks import QUIET, Classifier, accuracy, discrimination, small_resnet
from transfer_rows import BATCH, Row, Setting

LOOKS = 6  # points of the learning curve


class Looking(L.Callback):
    """Record validation accuracy during training."""

    def __init__(self, images: Pictures, every: int) -> None:
        self.images, self.every = images, every
        self.curve: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Record at the chosen steps."""
        if trainer.global_step % self.every == 0:
            self.curve.append(accuracy(pl_module.model, self.images))


class Together(nn.Module):
    """The mean prediction of several networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of their probabilities (B, classes)."""
        return torch.stack([network(images).float().softmax(1) for network in self.networks]).mean(0)


def train(
    row: Row, setting: Setting, *, seed: int, lr: float, is_final: bool, unseen: Pictures | None
) -> dict[str, Any]:
    """Train once, or once for each network; the seed decides new heads, the order of images and their augmentation.

    Returns:
        Validation accuracy, its curve (for several networks the mean of theirs), CPU seconds; of a final run also the
        test accuracy.
    """
    members = [setting, replace(setting, network=setting.second, second=setting.network)][: row.members]
    began = time.process_time()
    runs = [_fit(row, each, seed=seed, lr=lr) for each in members]
    networks = [module.model for module, _, _ in runs]
    network = networks[0] if row.members == 1 else Together(networks)
    found: dict[str, Any] = {
        "validation": accuracy(network, setting.target.validation),
        "curve": np.mean([curve for _, curve, _ in runs], 0).tolist(),
        "seconds": time.process_time() - began,
    }
    if stopped := "; ".join(reason for _, _, reason in runs if reason):
        found["stopped"] = stopped
    if is_final:
        found["test"] = accuracy(network, setting.target.test)
        if unseen is not None:
            found["discrimination"] = discrimination(networks[0], unseen)
    return found


def _fit(row: Row, setting: Setting, *, seed: int, lr: float) -> tuple[Classifier, list[float], str]:
    """Return the trained module, its accuracy during training, and why training stopped early, if it did."""
    torch.manual_seed(seed)
    network: Any = copy.deepcopy(setting.network) if row.pretrained else small_resnet(1)
    torch.manual_seed(seed)
    network.reset_classifier(setting.target.num_classes)
    steps = round(row.length * setting.steps)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(setting.target.train, batch_size=BATCH, shuffle=True, generator=order)
    module, looking = Classifier(network, lr), Looking(setting.target.validation, steps // LOOKS)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, callbacks=[*row.callbacks(setting), looking], **QUIET)
    try:
        trainer.fit(module, loader)
    except FloatingPointError as error:  # a source loss is not finite at too high a rate; scored as it is then
        curve = [*looking.curve, *[0.0] * (LOOKS - len(looking.curve))]
        return module, curve, str(error).partition(":")[0]
    return module, looking.curve, ""
