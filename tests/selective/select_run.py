"""Small pictures and datasets with faults, and the selection that is made of them in one process or several."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective import pictures, store
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import select_neighbors
from lightning_transfer.methods.selective.selection import TENSORS, Selection
from lightning_transfer.progress import no_progress
from tests import processes

NUM_TARGET, NUM_SOURCE = 6, 300
BLOCK, READ = 64, 16  # images: five blocks, four batches each
K = 7
UNREADABLE, PLANTED = (130, 291), (40, 203)


def quick_bank(seed=5):
    """Four filters that are exact in float32 on pixels of a few bits."""
    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    generator = torch.Generator().manual_seed(seed)
    network[0].weight.data = torch.randint(-2, 3, (4, 3, 3, 3), generator=generator).float() / 2
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


def small(num, seed):
    """Pictures of 8 pixels."""
    coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (8, 8), mode="bilinear") * 64).round() / 64


def made_selection(seed=0):
    """A selection of four target images among nine source images, by hand."""
    generator = torch.Generator().manual_seed(seed)
    return Selection(
        indices=torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(4)]),
        distances=torch.rand(4, 3, generator=generator, dtype=torch.float64).sort(1).values,
        fingerprint={"source": "9 images abc", "bank": "gabor"},
        target_labels=torch.tensor([0, 1, -1, 1]),
        source_labels=torch.arange(9) % 3,
        duplicates=torch.tensor([[1, 4]]),
        dropped=torch.empty(0, 2, dtype=torch.int64),
        unreadable=torch.tensor([7]),
    )


class Faulty(Dataset):
    """Some of its files cannot be read; after so many readings none can, or a signal comes."""

    def __init__(self, dataset, *, bad=(), fails_after=None, signal_after=None, number=signal.SIGKILL):
        self.dataset, self.bad = dataset, bad
        self.fails_after, self.signal_after, self.number = fails_after, signal_after, number
        self.loaded: list[int] = []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.loaded.append(index)
        if len(self.loaded) == self.signal_after:
            os.kill(os.getpid(), self.number)
        if index in self.bad or (self.fails_after is not None and len(self.loaded) > self.fails_after):
            raise OSError("truncated file")
        return self.dataset[index]


def source_data(**faults):
    images = small(NUM_SOURCE, 2)
    images[list(PLANTED)] = small(4, 3)[[0, 3]]  # test images
    return Faulty(TensorDataset(images, torch.arange(NUM_SOURCE) % 11), bad=UNREADABLE, **faults)


def target_data():
    return TensorDataset(small(NUM_TARGET, 1), torch.arange(NUM_TARGET))


def selected(source=None, *, target=None, protect=None, cache=None, shown=no_progress, say=lambda line: None):
    """The selection that everything here makes, in small blocks."""
    return select_neighbors(
        target or target_data(),
        source or source_data(),
        k=K,
        bank=quick_bank(),
        protect=[small(4, 3)] if protect is None else protect,
        scan=Scan(cache=cache, progress=shown, say=say),
    )


def values(selection):
    return {name: getattr(selection, name) for name in TENSORS}


# what several tests do in processes of their own


def in_processes(act, *arguments, num_ranks=1):
    """Run a function in so many processes, which take small blocks."""
    return processes.run(_in_small_blocks, act, *arguments, num_ranks=num_ranks)


def _in_small_blocks(act, *arguments):
    store.BLOCK, pictures.READ = BLOCK, READ
    num_ranks = int(os.environ["WORLD_SIZE"])
    if num_ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    return act(*arguments)


# how often a source image is read before the first is described: what some say of all, and whether they stay the same
READ_BEFORE = 64 + 3 * 8


def killed(folder):
    """Killed with this process' second block half described."""
    selected(source_data(signal_after=READ_BEFORE + BLOCK + BLOCK // 2), cache=folder / "chosen")


def resumed(folder):
    """The rest of it, and which images were described."""
    source = source_data()
    blocks = sorted(int(path.name.removeprefix("block")) for path in folder.rglob("source/block*"))
    if dist.is_initialized():
        dist.barrier()
    found = selected(source, cache=folder / "chosen")
    left = sorted(path.name for path in folder.iterdir())
    return {**values(found), "loaded": source.loaded, "blocks": blocks, "left": left}
