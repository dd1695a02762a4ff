"""What one rank of test_ranks.py does."""

import os

import lightning.pytorch as L
import torch
from torch import nn

import lightning_transfer as lt
from tests import toys
from tests.methods import METHODS, one


class Followed(toys.LitToy):
    """Without BatchNorm, whose statistics are each rank's own; remembers its weights after every step."""

    def __init__(self):
        super().__init__()
        self.model.bn = nn.GroupNorm(2, toys.WIDTH)
        self.history = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append(toys.weights(self.model))


def run(*callbacks, **options):
    """Weights after every step, on this rank's share of the target in a fixed order."""
    module = Followed()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = torch.utils.data.Subset(toys.target_data(), range(rank, len(toys.target_data()), num_ranks))
    loader = torch.utils.data.DataLoader(share, batch_size=8 // num_ranks)
    strategy = "ddp" if num_ranks > 1 else "auto"
    toys.fit(
        module, callbacks, loader=loader, devices=num_ranks, strategy=strategy, use_distributed_sampler=False, **options
    )
    return module.history


def results(num_ranks, folder):
    """Everything that must not depend on the number of ranks; a rank's batch is its share of 8."""
    L.seed_everything(0, verbose=False)
    size = 8 // num_ranks
    found = {}
    for method in METHODS:
        saving = toys.SaveEveryStep(folder / f"{method}-{num_ranks}")
        found[f"{method}"] = run(method.callback(batch_size=size), saving)
        found[f"{method} off"] = run(method.off())
        found[f"{method} bf16"] = run(method.callback(batch_size=size), precision="bf16-true")
    for name, pair in pairs(size).items():
        found[name] = run(*pair)
    search = lt.LayerSearch(particles=3, iterations=1, proxy_epochs=1)  # by the first rank, which the others wait for
    other = toys.OtherNet()
    other.bn1 = nn.GroupNorm(2, 6)
    searching = lt.CollaborativeFinetuning([other], search=search)
    found["a search"] = run(searching)
    found["a search's plan"] = [{name: torch.tensor(number) for name, number in searching.plan.frozen.items()}]
    metric = lt.metrics.GeneralDiscrimination(k=3)
    features, labels = class_features()
    rank = int(os.environ["RANK"])
    for start in range(0, len(labels), 6):  # unequal shares: the last batch is left to rank 0
        if (start // 6) % num_ranks == rank:
            metric.update(features[start : start + 6], labels[start : start + 6])
    found["general discrimination"] = metric.compute()
    return found


def pairs(size):
    """Methods of different seams together, and what only several steps or ranks bring to light."""
    names = ("soft-separate-add", "selective-separate", "adafilter", "gated")
    soft, selective, adafilter, gated = (one(name=name) for name in names)
    return {
        "selective and adafilter": [selective.callback(batch_size=size), adafilter.callback()],
        "soft and gated": [soft.callback(batch_size=size), gated.callback()],
        "a warm-up": [lt.GatedTransfer(tap="model.bn", ratio=2, gate_dropout=0, dropout=0, warmup_epochs=1)],
        "gates shut everywhere": [lt.AdaFilter(gated="model.conv", gate_width=4, gate_bias=-50.0)],
        "all": [adafilter.callback(), gated.callback(), selective.callback(batch_size=size)],
    }


def class_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (45,), generator=generator)
    return torch.randn(45, 6, generator=generator) + labels[:, None] * torch.randn(6, generator=generator), labels
