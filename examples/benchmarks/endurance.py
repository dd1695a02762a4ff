"""Check that many fits leave nothing over, and that a run that is killed again and again equals one that is not.

python examples/benchmarks/endurance.py fits --number 100
python examples/benchmarks/endurance.py kills --steps 20000 --every 300
"""

import argparse
import gc
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt

EPOCH = 20  # steps
WARM = 10  # fits until the program's own memory is constant


class Network(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        features = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images))))))
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores


class Lit(L.LightningModule):
    """A classifier as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = seeded_network(5)

    def forward(self, images: Tensor) -> Any:
        """Return logits."""
        return self.model(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by the step, since Lightning does not keep the random state in checkpoints."""
        torch.manual_seed(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def seeded_network(num_classes: int) -> Network:
    """Return a network that is the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(num_classes)
        return Network(num_classes)


def images(number: int, num_classes: int) -> TensorDataset:
    """Return noise of 12 pixels whose mean depends on the class."""
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.arange(number) % num_classes
    return TensorDataset(
        torch.randn(number, 3, 12, 12, generator=generator) + 0.3 * labels[:, None, None, None], labels
    )


def source(**options: Any) -> lt.SourceTask:
    """Return a second task of seven classes."""
    return lt.SourceTask(images(70, 7), num_classes=7, **options)


def bank() -> lt.FilterBank:
    """Return filters for images of 12 pixels, which are too small for Gabor filters."""
    return lt.FilterBank.from_model(seeded_network(5), layers=["conv1"], normalize=False)


METHODS: dict[str, Callable[[], list[Callback]]] = {
    "soft": lambda: [lt.SoftFinetuning(source(num_workers=1), weight=lt.Schedule())],
    "selective": lambda: [
        lt.SelectiveJointFinetuning(source(), neighbors=lt.Neighbors(k=5, bank=bank(), every=30), weight=1.0)
    ],
    "AdaFilter": lambda: [lt.AdaFilter(gate_width=8)],
    "gated transfer": lambda: [lt.GatedTransfer(ratio=4, tap="model.bn1", aux_weight=0.2)],
    "two networks": lambda: [lt.CollaborativeFinetuning([seeded_network(9)])],
    "probe start": lambda: [lt.ProbeStart(), lt.FrozenStatistics()],
    "together": lambda: [
        lt.SoftFinetuning(source(), weight=lt.Schedule()),
        lt.AdaFilter(gate_width=8),
        lt.GatedTransfer(),
    ],
}


def fit(callbacks: list[Callback], epochs: int, *, ckpt_path: str | None = None) -> Lit:
    """Train on 160 images and return the module."""
    module = Lit()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(images(8 * EPOCH, 5), batch_size=8), ckpt_path=ckpt_path)
    return module


def resident() -> float:
    """Return the megabytes of memory that the program holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def held() -> dict[str, int]:
    """Count what a fit might not have cleaned up."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": len(children),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def many_fits(number: int) -> None:
    """Fit with every method in turn, and print how memory grows and what is not cleaned up."""
    memory: list[float] = []
    first: dict[str, int] = {}
    names = list(METHODS)
    for place in range(number):
        module = fit(METHODS[names[place % len(names)]](), 2)
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
        del module
        memory.append(resident())
        now = {**held(), "hooks": hooks}
        first = now if place == WARM else first
        print(f"{place + 1:4} {names[place % len(names)]:15} {memory[-1]:8.1f} MB {now}", flush=True)
    later = np.array(memory[WARM:])
    slope = np.polyfit(np.arange(len(later)), later, 1)[0]
    print(f"memory: {1000 * slope:+.1f} kB a fit over the last {len(later)}; not cleaned up: {first} then, {now} now")


class Killed(Callback):
    """Kill the program after some steps, as a power cut would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_batch_end(self, *_: Any) -> None:
        """Count down."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(folder: str) -> ModelCheckpoint:
    """Return a callback that saves a checkpoint every fifth epoch."""
    return ModelCheckpoint(folder, save_last=True, every_n_epochs=5)


def in_a_process(act: Callable[[], object]) -> int:
    """Run a function in a fork of this program and return its exit status."""
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def many_kills(make: Callable[[], list[Callback]], steps: int, every: int) -> str:
    """Train for many steps, killed every few hundred, and compare the result with an uninterrupted run."""
    random.seed(0)
    epochs = steps // EPOCH
    with tempfile.TemporaryDirectory() as place:
        end, last = Path(place, "end.pt"), Path(place, "last.ckpt")

        def run(after: int) -> None:
            ckpt_path = str(last) if last.exists() else None
            module = fit([*make(), saving(place), Killed(after)], epochs, ckpt_path=ckpt_path)
            torch.save(module.state_dict(), end)

        kills = 0
        while code := in_a_process(partial(run, random.randint(every // 2, every * 3 // 2))):
            if code != -signal.SIGKILL:
                raise SystemExit(f"A process ended with {code}.")
            kills += 1
        killed = torch.load(end, weights_only=True)
    with tempfile.TemporaryDirectory() as place:
        whole = fit([*make(), saving(place)], epochs).state_dict()
    same = killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole)
    return f"{steps} steps, {kills} kills: {'equal to the bit' if same else 'DIFFERENT'}"


def main() -> None:
    """Read the command line."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=sys.modules[__name__].__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fits")
    one.add_argument("--number", type=int, default=100)
    one = commands.add_parser("kills")
    one.add_argument("--method", choices=METHODS, default="together")
    one.add_argument("--steps", type=int, default=20_000)
    one.add_argument("--every", type=int, default=300)
    options = parser.parse_args()
    if options.command == "fits":
        many_fits(options.number)
    else:
        print(f"{options.method}: {many_kills(METHODS[options.method], options.steps, options.every)}")


if __name__ == "__main__":
    main()
