"""What one GPU of several does."""

import os

import lightning.pytorch as L
from torch import nn
from torch.utils.data import DataLoader, Subset

from tests import toys
from tests.methods import METHODS


def run(method, num_ranks):
    """The last weights; all ranks together take eight images a step."""
    module = toys.LitToy()
    module.model.bn = nn.GroupNorm(2, toys.WIDTH)  # BatchNorm's statistics are each rank's own
    options = {"accelerator": "gpu", "devices": num_ranks, "strategy": "ddp" if num_ranks > 1 else "auto"}
    share = Subset(toys.target_data(), range(int(os.environ["RANK"]), len(toys.target_data()), num_ranks))
    options |= {"use_distributed_sampler": False, "precision": "64-true"}
    loader = DataLoader(share, batch_size=8 // num_ranks)
    toys.fit(module, [method.callback(batch_size=8 // num_ranks)], loader=loader, **options)
    return {name: value.cpu() for name, value in toys.weights(module).items()}


def results(num_ranks):
    """The last weights of every method."""
    L.seed_everything(0, verbose=False)
    return {str(method): run(method, num_ranks) for method in METHODS}
