"""Fit small projects for a few steps, with and without callbacks, and time a step."""

import gc
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from measuring import Settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WARMUP = 3  # steps of a fit that do not count: first allocations, the first source batch, until the weight is 0
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
TARGET_CLASSES = 10


class Classifier(lightning.LightningModule):
    """An ordinary project without this package."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD on every parameter."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(lightning.Callback):
    """Record the end of every step; between two records is a whole step: loading, hooks, passes, optimizer."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Record the CPU time of this process, or an event on the GPU."""
        if pl_module.device.type == "cpu":
            self.marks.append(time.process_time())
        else:
            event = torch.cuda.Event(enable_timing=True)
            self.marks.append(torch.cuda.current_stream().record_event(event))

    def seconds(self) -> float:
        """Return the median over the steps after the warm-up."""
        marks = self.marks[WARMUP - 1 :]
        if not isinstance(marks[0], float):
            torch.cuda.synchronize()
            marks = [marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        return float(median(after - before for before, after in pairwise(marks)))


@dataclass(frozen=True)
class Fit:
    """A short `Trainer.fit`, new at each call.

    Whole fits take turns, not the steps of two fits, so each step is exactly the user's, in a loop that is not
    modified. They are short, so both fits of a pair see the same state of the machine.
    """

    network: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch_size: int
    steps: int
    accelerator: str = "cpu"
    callbacks: Callable[[int], list[lightning.Callback]] = lambda num_steps: []  # of a fit so long

    def __call__(self) -> float:
        """Return the seconds of a step."""
        gc.collect()  # what the previous run left
        torch.manual_seed(0)
        num_steps, clock = WARMUP + self.steps, Clock()
        images = pictures(num_steps * self.batch_size, self.image, TARGET_CLASSES)
        loader = DataLoader(images, batch_size=self.batch_size, shuffle=True)
        options: Any = {"accelerator": self.accelerator, "devices": 1, **dict.fromkeys(SILENT, False)}
        lightning.Trainer(max_epochs=1, callbacks=[*self.callbacks(num_steps), clock], **options).fit(
            Classifier(self.network()), loader
        )
        return clock.seconds()


def pictures(number: int, shape: tuple[int, ...], num_classes: int) -> TensorDataset:
    """Return noise with random labels."""
    return TensorDataset(torch.rand(number, *shape), torch.randint(num_classes, (number,)))


def resnet18(settings: Settings) -> Fit:
    """Return plain training of a ResNet-18, on the GPU if there is one."""
    network = partial(timm.create_model, "resnet18", num_classes=TARGET_CLASSES)
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    return Fit(network, (3, 64, 64), settings.batch_size, settings.steps, accelerator)


def empty_network(settings: Settings) -> Fit:
    """Return plain training with almost nothing to compute, so a step is all Trainer; on the CPU, as all hooks."""
    network = lambda: nn.Sequential(OrderedDict(body=nn.Linear(4, 4), fc=nn.Linear(4, TARGET_CLASSES)))  # noqa: E731
    return Fit(network, (4,), settings.batch_size, settings.empty_steps)
