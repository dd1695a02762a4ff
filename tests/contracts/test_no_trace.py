"""Source images leave no trace: not in loops that a sample could end, not in what the user's batch hooks remember."""

import pytest
from torch.utils.data import Dataset

import lightning_transfer as lt
from tests import toys
from tests.methods import borrowed
from tests.toys import LitToy, fit

ALWAYS = lt.Schedule(1.0, 1.0)
BAD = 13


class Ending(Dataset):
    """One sample raises what ends a loop or a program; from a number of readings on."""

    def __init__(self, data, error, after=0):
        self.data, self.error, self.after = data, error, after

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == BAD:
            self.after -= 1
            if self.after < 0:
                raise self.error
        return self.data[index]


def task(data, **options):
    return lt.SourceTask(data, head=toys.source_head(), batch_size=4, **options)


def trained(data, workers):
    fit(LitToy(), [lt.SoftFinetuning(task(data, num_workers=workers), weight=ALWAYS)])


def measured_source(data, workers):
    fit(LitToy(), [lt.SoftFinetuning(task(data, num_workers=workers))])


def measured_source_of_a_selection(data, workers):
    """Where unreadable images are forgiven."""
    source = task(data, num_workers=workers, unaugmented=toys.source_data())
    fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(), weight="auto")])


def measured_target(data, workers):
    loader = toys.DataLoader(data, batch_size=4, num_workers=workers)
    fit(LitToy(), [lt.SoftFinetuning(task(toys.source_data()))], loader=loader)


def selected_source(data, workers):
    scan = lt.Scan(num_workers=workers, say=lambda line: None)
    lt.select_neighbors(toys.target_data(), data, bank=borrowed().bank, k=3, scan=scan)


def selected_target(data, workers):
    scan = lt.Scan(num_workers=workers, say=lambda line: None)
    lt.select_neighbors(data, toys.source_data(), bank=borrowed().bank, k=3, scan=scan)


def round_of_the_target(data, workers):
    class Arming(LitToy):
        """The selection has read every sample before the first step's end; the round comes at the third step."""

        def on_train_batch_end(self, outputs, batch, batch_idx):
            data.after = 0

    data.after = 1000
    source = task(toys.source_data(), num_workers=workers)
    fit(Arming(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(), target=data, weight=ALWAYS)])


def advised(data, workers):
    lt.advise(LitToy(), toys.target_loader(), source=task(data), steps=3, trainer={"accelerator": "cpu"})


PLACES = [
    (trained, "Source"),
    (measured_source, "Source"),
    (measured_source_of_a_selection, "Source"),
    (measured_target, "Target"),
    (selected_source, "Source"),
    (selected_target, "Target"),
    (round_of_the_target, "Target"),
    (advised, "Source"),
]


@pytest.mark.parametrize(
    "error", [StopIteration("over"), SystemExit(0), StopAsyncIteration(), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize(("place", "side"), PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_a_sample_that_would_end_the_loop_is_an_error_that_names_it(place, side, error):
    """D2."""
    data = toys.source_data() if side == "Source" else toys.target_data()
    with pytest.raises(lt.TransferConfigError, match=rf"(?s){side} sample 13 raised {type(error).__name__}") as caught:
        place(Ending(data, error), 0)
    chain, link = [], caught.value
    while link is not None:
        chain, link = [*chain, link], link.__cause__
    assert error in chain


@pytest.mark.parametrize("place", [trained, measured_source, selected_source], ids=lambda place: place.__name__)
def test_the_same_where_workers_read(place):
    """D2."""
    with pytest.raises(lt.TransferConfigError, match="(?s)Source sample 13 raised StopIteration"):
        place(Ending(toys.source_data(), StopIteration()), 1)


def test_ctrl_c_stays_ctrl_c():
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        lt.select_neighbors(
            toys.target_data(), Ending(toys.source_data(), KeyboardInterrupt()), bank=borrowed().bank, k=3
        )
    assert caught.type is KeyboardInterrupt
