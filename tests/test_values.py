"""Two functions are the same option only if they compute the same."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_transfer as lt
from lightning_transfer.values import value_of
from tests import toys
from tests.toys import SaveEveryStep, fit

ROOT = Path(__file__).parents[1]


def scaled(factor, **more):
    return lambda logits, labels: factor * F.cross_entropy(logits, labels, **more)


class Focal(nn.Module):
    def __init__(self, gamma, weight=None):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", weight)

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, self.weight, reduction="none")
        return (losses * (1 - (-losses).exp()) ** self.gamma).mean()


class Callable:
    def __init__(self, share):
        self.share = share

    def __call__(self, logits, labels):
        return self.share * F.cross_entropy(logits, labels)

    def half(self, logits, labels):
        return self(logits, labels) / 2


MAKERS = {
    "function": lambda: F.cross_entropy,
    "partial": lambda: partial(F.cross_entropy, label_smoothing=0.1),
    "partial of another": lambda: partial(F.cross_entropy, label_smoothing=0.2),
    "partial of a partial": lambda: partial(partial(F.cross_entropy, label_smoothing=0.1), ignore_index=3),
    "lambda": lambda: lambda logits, labels: F.cross_entropy(logits, labels),
    "lambda with a constant": lambda: lambda logits, labels: 2 * F.cross_entropy(logits, labels),
    "lambda inside a lambda": lambda: lambda logits, labels: (lambda x: 3 * x)(F.cross_entropy(logits, labels)),
    "other lambda inside": lambda: lambda logits, labels: (lambda x: 4 * x)(F.cross_entropy(logits, labels)),
    "default": lambda: lambda logits, labels, share=0.5: share * F.cross_entropy(logits, labels),
    "other default": lambda: lambda logits, labels, share=0.7: share * F.cross_entropy(logits, labels),
    "closure": lambda: scaled(1),
    "closure of another value": lambda: scaled(1.5),
    "closure of another mapping": lambda: scaled(1, label_smoothing=0.1),
    "closure of a tensor": lambda: scaled(torch.tensor([1.0, 2])),
    "closure of another tensor": lambda: scaled(torch.tensor([1.0, 3])),
    "closure of a set": lambda: scaled({"a", "b", "c", "d"}),
    "module": lambda: nn.CrossEntropyLoss(),
    "module of another option": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "module with a buffer": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2])),
    "module with another buffer": lambda: nn.CrossEntropyLoss(torch.tensor([2.0, 1])),
    "own module": lambda: Focal(2.0),
    "own module of another value": lambda: Focal(3.0),
    "modules": lambda: nn.Sequential(Focal(2.0)),
    "other modules": lambda: nn.Sequential(Focal(3.0)),
    "network": lambda: nn.Linear(3, 2),
    "other network": lambda: nn.Linear(3, 4),
    "object": lambda: Callable(0.5),
    "object of another value": lambda: Callable(0.7),
    "method": lambda: Callable(0.5).half,
    "method of another object": lambda: Callable(0.7).half,
}


def test_the_same_made_again_has_the_same_value_and_all_others_another():
    values = {name: value_of(make()) for name, make in MAKERS.items()}
    assert values == {name: value_of(make()) for name, make in MAKERS.items()}
    assert len({*values.values()}) == len(MAKERS)


def test_values_are_readable():
    assert value_of(F.cross_entropy) == "cross_entropy"
    assert value_of(partial(F.cross_entropy, label_smoothing=0.1)).startswith("cross_entropy(label_smoothing=0.1) ")
    assert value_of(nn.CrossEntropyLoss()).startswith("CrossEntropyLoss(reduction=mean, ignore_index=-100, ")


def test_a_function_that_holds_itself_has_a_value():
    loop = {}
    loop["again"] = loop
    assert value_of(scaled(loop)) == value_of(scaled(loop))


class Counting:
    def __init__(self):
        self.count = 0

    def adapt(self, batch):
        self.count += 1
        return batch


def test_what_an_object_counts_in_a_run_does_not_change_the_value_of_its_method():
    counting = Counting()
    before = value_of(counting.adapt)
    counting.adapt(None)
    assert value_of(counting.adapt) == before
    assert value_of(Callable(0.5).half) != before


def test_training_a_network_does_not_change_its_value():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = value_of(network)
    network(torch.randn(4, 3)).sum().backward()
    with torch.no_grad():
        network[0].weight += 1
    network.eval()
    assert value_of(network) == before


def test_values_are_the_same_in_another_process():
    program = "from tests.test_values import *; print({name: value_of(make()) for name, make in MAKERS.items()})"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str({name: value_of(make()) for name, make in MAKERS.items()})


@pytest.mark.parametrize(
    ("option", "first", "other"),
    [
        ("loss", "partial", "partial of another"),
        ("loss", "lambda", "lambda with a constant"),
        ("loss", "closure", "closure of another value"),
        ("loss", "function", "module with seven weights"),
        ("loss", "module with seven weights", "function"),
        ("loss", "module with seven weights", "module with seven other weights"),
        ("adapt", "pairs", "other pairs"),
        ("forward", "passes", "other passes"),
    ],
)
def test_a_resume_with_another_value_of_one_name_is_refused_and_with_the_same_is_not(option, first, other, tmp_path):
    makers = {
        **MAKERS,
        "module with seven weights": lambda: nn.CrossEntropyLoss(torch.ones(7)),
        "module with seven other weights": lambda: nn.CrossEntropyLoss(torch.arange(1.0, 8)),
        "pairs": lambda: lambda batch: (batch[0], batch[1]),
        "other pairs": lambda: lambda batch: (batch[0] * 2, batch[1]),
        "passes": lambda: lambda module, images: module(images),
        "other passes": lambda: lambda module, images: module(images + 1),
    }

    def soft(name):
        source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, **{option: makers[name]()})
        return lt.SoftFinetuning(source, weight=lt.Schedule(until_steps=5))

    fit(toys.LitToy(), [soft(first), SaveEveryStep(tmp_path)], max_epochs=1)
    fit(toys.LitToy(), [soft(first)], max_epochs=1, ckpt_path=tmp_path / "step=3.ckpt")
    with pytest.raises(lt.TransferConfigError, match=f"source {option}: .* in the checkpoint, .* now"):
        fit(toys.LitToy(), [soft(other)], max_epochs=1, ckpt_path=tmp_path / "step=3.ckpt")
