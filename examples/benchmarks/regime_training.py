"""Run one training of the regime benchmark and score it."""

import copy
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from regime_data import Photos
from regime_network import Rates, Tuning, accuracy
from regime_rows import BATCH, Row, Setting
from torch import nn
from torch.utils.data import DataLoader

LOOKS = 5  # points of the learning curve; the last is at the end
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Looking(L.Callback):
    """Record validation accuracy during training; waits as long as a file exists."""

    def __init__(self, images: Photos, steps: int, stop: Path | None) -> None:
        self.images, self.stop = images, stop
        self.places = {round(steps * (look + 1) / LOOKS) for look in range(LOOKS)}
        self.curve: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Wait if asked to, and record at the chosen steps."""
        wait(self.stop)
        if trainer.global_step in self.places:
            self.curve.append(accuracy(pl_module.model, self.images))


def wait(stop: Path | None) -> None:
    """Let others measure: do nothing as long as the file exists."""
    while stop is not None and stop.exists():
        time.sleep(2)


def train(
    row: Row, setting: Setting, *, seed: int, rates: Rates | None, is_final: bool, device: str, stop: Path | None
) -> dict[str, Any]:
    """Train once; the seed decides the new head, the order of images and their augmentation, equally for all rows.

    Returns:
        Validation accuracy, its curve, CPU seconds; of a final run also the test accuracy.
    """
    began = time.process_time()
    looks: dict[str, Any] = {}
    if rates is None:
        network = copy.deepcopy(setting.network)
        network.classifier = setting.probe()
    else:
        module, looks = fit(row, setting, seed=seed, rates=rates, device=device, stop=stop)
        network = module.model
    found: dict[str, Any] = {"validation": accuracy(network, setting.draw.validation), **looks}
    found["seconds"] = round(time.process_time() - began, 1)
    if is_final:
        found["test"] = accuracy(network, setting.draw.test)
    return found


def fit(
    row: Row, setting: Setting, *, seed: int, rates: Rates, device: str, stop: Path | None
) -> tuple[Tuning, dict[str, Any]]:
    """Return the trained module, and its accuracy during training."""
    network = with_new_head(setting, seed=seed, from_probe=row.from_probe)
    order, crops = (torch.Generator().manual_seed(number) for number in (seed, 1000 + seed))
    images = Photos(setting.draw.train.pixels, setting.draw.train.targets, augmented=True, random=crops)
    loader = DataLoader(images, BATCH, shuffle=True, generator=order, drop_last=len(images) >= BATCH)
    module, looking = row.module(setting, network, rates), Looking(setting.draw.validation, setting.steps, stop)
    callbacks = [*row.callbacks(setting), looking]
    torch.manual_seed(seed)  # for what a method draws itself
    given: dict[str, Any] = {"max_steps": setting.steps, "max_epochs": -1, "callbacks": callbacks, **QUIET}
    trainer = L.Trainer(accelerator=device, devices=1, **given)
    try:
        trainer.fit(module, loader)
    except FloatingPointError as error:  # a loss is not finite at too high a rate; the module is scored as it is then
        return module, {"curve": looking.curve, "stopped": str(error).partition(":")[0]}
    return module, {"curve": looking.curve}


def with_new_head(setting: Setting, *, seed: int, from_probe: bool) -> nn.Module:
    """Return a copy of the pretrained network whose head is new, or the linear probe."""
    network: Any = copy.deepcopy(setting.network)
    torch.manual_seed(seed)
    network.reset_classifier(setting.draw.num_classes)
    if from_probe:
        network.classifier = setting.probe()
    made: nn.Module = network
    return made
