"""One, two and three processes choose the same; one that fails ends all of them, and says which it was."""

import functools

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_transfer as lt
from lightning_transfer import ranks
from lightning_transfer.methods.selective import store
from lightning_transfer.methods.selective.selection import TENSORS
from lightning_transfer.progress import no_progress
from tests import processes, toys
from tests.methods import borrowed
from tests.selective.select_run import (
    BLOCK,
    NUM_SOURCE,
    NUM_TARGET,
    PLANTED,
    READ_BEFORE,
    UNREADABLE,
    Faulty,
    K,
    in_processes,
    killed,
    resumed,
    selected,
    small,
    source_data,
    target_data,
    values,
)

# what a process does


def select_once():
    shown, said = [], []
    show = lambda name, total: shown.append(name) or no_progress(name, total)  # noqa: E731
    return {**values(selected(shown=show, say=said.append)), "shown": shown, "said": said}


def select_in_few_blocks():
    store.BLOCK = 4 * BLOCK
    return values(selected())


def fails_in_source():
    selected(source_data(fails_after=READ_BEFORE + 5 if ranks.rank() == 1 else None))


def fails_in_target():
    selected(target=Faulty(target_data(), bad={3} if ranks.rank() == 1 else ()))


def fails_in_protected():
    """It can be told who it is, but not be described."""
    selected(protect=[Faulty(small(4, 3), fails_after=4 + 3 * 4 if ranks.rank() == 1 else None)])


def fails_to_write():
    """The disk of one process is full when it writes what each process keeps for itself."""
    if ranks.rank() == 1:
        write = store.Store.write

        def full(self, number, counts, labels):
            if "target" in str(self.folder):
                raise OSError(28, "No space left on device")
            write(self, number, counts, labels)

        store.Store.write = full
    selected()


def other_images():
    selected(TensorDataset(small(NUM_SOURCE, 2 + ranks.rank()), torch.arange(NUM_SOURCE)))


class FollowBudget(L.Callback):
    """Remembers how much each target image borrows, after every step."""

    def __init__(self, selective):
        self.selective, self.budgets = selective, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.budgets.append(self.selective.target_weights.clone())


def rounds(num_ranks):
    """Budgets after every step of a run with two rounds, on each rank's share of the target."""
    data, module = toys.target_data(), toys.LitToy()
    module.model.bn = nn.GroupNorm(2, toys.WIDTH)  # BatchNorm's statistics would be each rank's own
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4 // num_ranks)
    neighbors = borrowed(k=2, limit=14, rounds=2, every=2, hard_entropy="50%")
    target = Subset(data, range(len(data) - 1))  # 23: no two ranks ask as often
    callback = lt.SelectiveJointFinetuning(source, neighbors=neighbors, target=target, weight=lt.Schedule(1.0, 1.0))
    followed = FollowBudget(callback)
    strategy = {"devices": num_ranks, "strategy": "ddp" if num_ranks > 1 else "auto", "use_distributed_sampler": False}
    runner = toys.trainer([callback, followed], max_epochs=1, **strategy)
    share = Subset(data, range(runner.global_rank, len(data), num_ranks))
    runner.fit(module, DataLoader(share, batch_size=4 // num_ranks))
    return torch.stack(followed.budgets)


@functools.cache
def once(num_ranks):
    """What each of so many processes selects."""
    ends = in_processes(select_once, num_ranks=num_ranks)
    assert [end.code for end in ends] == [0] * num_ranks
    return [end.found for end in ends]


def assert_equal(found, expected):
    for name in TENSORS:
        assert torch.equal(found[name], expected[name]), name


def test_one_process_finds_what_it_should():
    """What the others are held against."""
    (alone,) = once(1)
    assert alone["indices"].shape == (NUM_TARGET, K)
    assert alone["unreadable"].tolist() == list(UNREADABLE)
    assert sorted(alone["dropped"][:, 1].tolist()) == list(PLANTED)
    assert not {*UNREADABLE, *PLANTED} & {*alone["indices"].flatten().tolist()}
    assert len({image // BLOCK for image in alone["indices"].flatten().tolist()}) == 5  # of all processes' shares


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_process_has_the_selection_of_one(num_ranks):
    """Five blocks do not divide among them."""
    for found in once(num_ranks):
        assert_equal(found, once(1)[0])


def test_a_process_without_a_block_has_it_too():
    """Of two blocks the third process has none."""
    for code, found in in_processes(select_in_few_blocks, num_ranks=3):
        assert code == 0
        assert_equal(found, once(1)[0])


def test_the_first_process_alone_shows_bars_and_says_what_it_does():
    """But an image that only another one has tried to read, is told by that one."""
    (alone,), (first, *others) = once(1), once(3)
    assert alone["shown"][:3] == ["Filters over the target"] * 2 + ["Filters over the source"]
    assert first["shown"] == alone["shown"]
    assert first["said"]
    for other in others:
        assert other["shown"] == first["shown"]  # a bar of one's own may have more to do than to be seen
        assert all("cannot be used: OSError" in line for line in other["said"])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_another_number_of_processes_goes_on_where_some_were_killed(tmp_path, before, after):
    assert -9 in [end.code for end in in_processes(killed, tmp_path, num_ranks=before)]
    ends = in_processes(resumed, tmp_path, num_ranks=after)
    assert [end.code for end in ends] == [0] * after
    finished = ends[0].found["blocks"]
    assert finished == list(range(before))
    missing = [number for number in range(5) if number not in finished]
    for rank, (_, found) in enumerate(ends):
        assert_equal(found, once(1)[0])
        images = [
            image
            for number in missing[rank::after]
            for image in range(number * BLOCK, min((number + 1) * BLOCK, NUM_SOURCE))
        ]
        assert found["loaded"][READ_BEFORE:][: len(images)] == images
        looked_at = 10 * (4 + NUM_TARGET) if rank == 0 else 0  # mirrored or not; duplicates are the first process' work
        assert len(found["loaded"]) <= READ_BEFORE + len(images) + looked_at
    assert ends[0].found["left"] == ["chosen"]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (fails_in_source, "More than 1% of the source images cannot be used"),
        (fails_in_target, "Target image 3 cannot be used: OSError: truncated file"),
        (fails_in_protected, "More than 1% of the protected images cannot be used"),
        (fails_to_write, "No space left on device"),
    ],
)
def test_where_one_process_fails_all_end_and_say_which(fails, message):
    other, failed = in_processes(fails, num_ranks=2)
    assert [other.code, failed.code] == [1, 1]  # -9 is one that hung
    assert message in failed.found["message"]
    assert failed.found["error"] == ("OSError" if fails is fails_to_write else "TransferConfigError")
    assert other.found["message"].startswith("In process 1: ")
    assert message in other.found["message"]


def test_processes_that_see_different_images_are_refused():
    for code, found in in_processes(other_images, num_ranks=2):
        assert code == 1
        assert "Processes have different images" in found["message"]


def test_rounds_on_two_processes_give_the_budgets_of_one():
    """Asked in shares of 12 and 11 target images."""
    ends = [end for num_ranks in (1, 2) for end in processes.run(rounds, num_ranks, num_ranks=num_ranks)]
    assert [end.code for end in ends] == [0] * 3, ends
    alone, *shared = (end.found for end in ends)
    assert {*alone[1].tolist()} == {1.0}
    assert {*alone[2].tolist()} == {1.0, 3.0, 5.0}
    assert (alone[5] > alone[3]).any()
    for one in shared:
        assert torch.equal(one, alone)
