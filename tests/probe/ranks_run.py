"""What one rank of test_promises.py does."""

import os

import lightning.pytorch as L
import torch
from torch import nn

import lightning_transfer as lt
from tests import toys


class Started(toys.LitToy):
    """Remembers how it starts."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 0:
            self.start = toys.weights(self)


def other():
    network = toys.OtherNet()
    network.bn1 = nn.GroupNorm(2, 6)
    return network


BESIDE = {
    "alone": list,
    "gated": lambda: [lt.GatedTransfer(ratio=2)],
    "several": lambda: [lt.CollaborativeFinetuning([other()])],
    "shares": list,  # each process has a dataset of its own
}


def run(name, num_ranks, *, is_probed=True):
    """The first and last weights; of one process with the first one's data."""
    module = Started()
    module.model.bn = nn.GroupNorm(2, toys.WIDTH)  # BatchNorm's statistics are each rank's own
    options = {"devices": num_ranks, "strategy": "ddp" if num_ranks > 1 else "auto"}
    data = toys.target_data()
    if name == "shares":
        data = torch.utils.data.Subset(data, range(int(os.environ.get("RANK", 0)), len(data), 2))
        options["use_distributed_sampler"] = False
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    toys.fit(module, [*([lt.ProbeStart()] if is_probed else []), *BESIDE[name]()], loader=loader, **options)
    return {"start": module.start, "end": toys.weights(module)}


def results():
    """What every one of two ranks does, by name."""
    L.seed_everything(0, verbose=False)
    return {name: run(name, 2) for name in BESIDE}
