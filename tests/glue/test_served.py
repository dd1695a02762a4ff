"""Which images a train loader serves: no selection, and no look at a target, may take others."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import lightning_transfer as lt
from lightning_transfer.glue.loaders import served
from lightning_transfer.glue.moving import validating
from tests import toys
from tests.methods import borrowed
from tests.toys import LitToy, Recorder, fit

DATA = TensorDataset(torch.arange(12.0), torch.arange(12))
HALF = [0, 2, 4, 6, 8, 10]
ALL = list(range(12))


class Halves(Sampler):
    """A user's own, of which nothing shows what it draws."""

    def __iter__(self):
        return iter(HALF)

    def __len__(self):
        return 6


class Balanced(Halves):
    """A user's own, of batches."""

    def __iter__(self):
        return iter([HALF[:3], HALF[3:]])

    def __len__(self):
        return 2


class Named(RandomSampler):
    """A user's own that only says more than torch's."""

    def __repr__(self):
        return "Named()"


class Odd(RandomSampler):
    """A user's own that draws otherwise than torch's."""

    def __iter__(self):
        return iter(range(1, 12, 2))


class OddBatches(BatchSampler):
    def __iter__(self):
        yield from ([1, 3], [5, 7])


class Listed(Halves):
    indices = (1, 3)  # of which it draws none


class OddSubset(SubsetRandomSampler):
    def __iter__(self):
        return iter([1, 3])


def shared_out(sampler):
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"shuffle": True}, ALL),
        ({"sampler": SequentialSampler(DATA)}, ALL),
        ({"sampler": RandomSampler(DATA, num_samples=3)}, ALL),  # another three in each epoch
        ({"sampler": RandomSampler(DATA, replacement=True)}, ALL),
        ({"sampler": Named(DATA)}, ALL),
        ({"sampler": SequentialSampler(range(5))}, ALL[:5]),
        ({"sampler": DistributedSampler(DATA, 1, 0)}, ALL),
        ({"sampler": SubsetRandomSampler(HALF)}, HALF),
        ({"sampler": SubsetRandomSampler(torch.tensor(HALF))}, HALF),
        ({"sampler": SubsetRandomSampler(np.array(HALF))}, HALF),
        ({"sampler": HALF}, HALF),
        ({"sampler": WeightedRandomSampler([1.0, 0.0] * 6, 20)}, HALF),
        ({"sampler": shared_out(SubsetRandomSampler(HALF))}, HALF),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(HALF), 2, drop_last=False)}, HALF),
        ({"batch_sampler": BatchSampler(shared_out(SubsetRandomSampler(HALF)), 2, drop_last=False)}, HALF),
        ({"batch_sampler": [HALF[:3], HALF[3:]]}, HALF),
    ],
)
def test_what_a_loader_draws_is_what_is_served(options, expected):
    loader = DataLoader(DATA, **options)
    found = served(loader)
    assert [int(found[index][1]) for index in range(len(found))] == expected
    drawn = {int(label) for _ in range(20) for _, labels in loader for label in labels}
    assert drawn <= {*expected}
    others = TensorDataset(torch.arange(12.0) + 100)
    assert [int(served(loader, others)[index][0]) - 100 for index in range(len(expected))] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": Odd(DATA)},
        {"sampler": OddSubset(HALF)},
        {"sampler": Listed()},
        {"batch_sampler": BatchSampler(Odd(DATA), 2, False)},
        {"batch_sampler": OddBatches(SequentialSampler(DATA), 2, False)},
        {"sampler": DistributedSampler(DATA, 2, 1)},  # in one process
    ],
)
def test_a_sampler_of_torchs_kind_that_draws_otherwise_is_refused_by_name(options):
    names = "an Odd|an OddSubset|a Listed|an OddBatches|a DistributedSampler"
    with pytest.raises(lt.TransferConfigError, match=f"draws by ({names})[ ,]"):
        served(DataLoader(DATA, **options))


@pytest.mark.filterwarnings("ignore::lightning_transfer.errors.NoEffectWarning")
@pytest.mark.parametrize("weight", [1.0, "auto"])
def test_images_of_weight_0_are_neither_looked_at_nor_selected_for(weight):
    recorder = Recorder(toys.target_data())
    weights = [float(index % 3 == 0) for index in range(24)]
    loader = DataLoader(recorder, batch_size=4, sampler=WeightedRandomSampler(weights, 24))
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    callback = lt.SelectiveJointFinetuning(source, neighbors=borrowed(), weight=weight)
    fit(LitToy(), [callback], loader=loader, max_epochs=1)
    assert {*map(int, recorder.loaded)} <= {*range(0, 24, 3)}
    assert weight == "auto" or len(callback.selection.indices) == 8


def test_unaugmented_images_of_a_part_are_refused_where_the_sampler_draws_that_part():
    """In which order they are is not known."""
    loader = DataLoader(toys.target_data(), batch_size=4, sampler=SubsetRandomSampler(range(11, -1, -1)))
    few = Subset(toys.target_data(), range(12))
    with pytest.raises(lt.TransferConfigError, match="unaugmented has 12 images, the train loader's dataset 24"):
        served(loader, few)


@pytest.mark.parametrize("stage", ["training", "sanity_checking", "testing"])
def test_a_look_leaves_the_trainer_in_the_stage_that_it_was_in(stage):
    runner = toys.trainer()
    setattr(runner, stage, True)
    with validating(runner):
        assert runner.validating
    assert getattr(runner, stage)


@pytest.mark.parametrize("options", [{"sampler": Halves()}, {"batch_sampler": Balanced()}])
def test_a_sampler_that_shows_nothing_is_refused_by_name_and_target_cures_it(options):
    name = type(next(iter(options.values()))).__name__
    data = toys.target_data()
    loader = DataLoader(data, **options)
    with pytest.raises(lt.TransferConfigError, match=f"draws by a {name}, .*target=, pass it: .*Subset"):
        served(loader)
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    neighbors = borrowed(rounds=0)
    with pytest.raises(lt.TransferConfigError, match=f"draws by a {name}, .*target=, pass it: "):
        fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=neighbors, weight=1.0)], loader=loader)
    with pytest.raises(lt.TransferConfigError, match=f"draws by a {name}, .*without measuring: weight=lt.Schedule"):
        fit(LitToy(), [lt.SoftFinetuning(source)], loader=loader)
    callback = lt.SelectiveJointFinetuning(source, neighbors=neighbors, weight=1.0, target=Subset(data, HALF))
    fit(LitToy(), [callback], loader=loader, max_epochs=1)
    assert len(callback.selection.indices) == len(HALF)
