"""Small pictures and datasets with faults, and what processes of test_faults.py and test_ranks.py do with them."""

import os
import signal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lightning_transfer as lt


def quick_bank(seed=5):
    """Four filters that are exact in float32 on pixels of a few bits."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    generator = torch.Generator().manual_seed(seed)
    network[0].weight.data = torch.randint(-2, 3, (4, 3, 3, 3), generator=generator).float() / 2
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


class Faulty(Dataset):
    """Some of its files cannot be read; after so many readings none can, or a signal comes."""

    def __init__(self, dataset, *, bad=(), fails_after=None, signal_after=None, number=signal.SIGTERM):
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
