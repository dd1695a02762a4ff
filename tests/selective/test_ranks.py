"""One, two and three processes choose the same; one that fails ends all of them, and says which it was."""

import pytest
import torch

from lightning_transfer.methods.selective.selection import TENSORS
from tests.selective import select_run
from tests.selective.select_run import BLOCK, NUM_SOURCE, NUM_TARGET, PLANTED, READ_BEFORE, UNREADABLE, K


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return select_run.started("ranks", tmp_path_factory.mktemp("ranks"))


def assert_equal(found, expected):
    for name in TENSORS:
        assert torch.equal(found[name], expected[name]), name


def test_one_process_finds_what_it_should(ranks):
    """What the others are held against."""
    _, written = ranks
    alone = written("select_once-1-0")
    assert alone["indices"].shape == (NUM_TARGET, K)
    assert alone["unreadable"].tolist() == list(UNREADABLE)
    assert sorted(alone["dropped"][:, 1].tolist()) == list(PLANTED)
    assert not {*UNREADABLE, *PLANTED} & {*alone["indices"].flatten().tolist()}
    assert len({image // BLOCK for image in alone["indices"].flatten().tolist()}) == 5  # of all processes' shares


@pytest.mark.parametrize("job", ["select_once-2", "select_once-3", "select_in_few_blocks-3"])
def test_every_process_has_the_selection_of_one(ranks, job):
    """Five blocks do not divide among them; of two blocks the third process has none."""
    told, written = ranks
    num_ranks = int(job[-1])
    assert told[job] == [0] * num_ranks
    for rank in range(num_ranks):
        assert_equal(written(f"{job}-{rank}"), written("select_once-1-0"))


def test_the_first_process_alone_shows_bars_and_says_what_it_does(ranks):
    """But an image that only another one has tried to read, is told by that one."""
    _, written = ranks
    alone, first, *others = (
        written(name) for name in ("select_once-1-0", *(f"select_once-3-{rank}" for rank in range(3)))
    )
    assert alone["shown"][:3] == ["Filters over the target"] * 2 + ["Filters over the source"]
    assert first["shown"] == alone["shown"]
    assert first["said"]
    for other in others:
        assert other["shown"] == first["shown"]  # a bar of one's own may have more to do than to be seen
        assert all("cannot be used: OSError" in line for line in other["said"])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_another_number_of_processes_goes_on_where_some_were_killed(ranks, before, after):
    told, written = ranks
    assert told[f"killed-{before}"].count(-9) >= 1
    assert told[f"resumed-{before}-{after}"] == [0] * after
    found = [written(f"from{before}to{after}/resumed-{after}-{rank}") for rank in range(after)]
    finished = found[0]["blocks"]
    assert finished == list(range(before))
    missing = [number for number in range(5) if number not in finished]
    for rank, one in enumerate(found):
        assert_equal(one, written("select_once-1-0"))
        images = [
            image
            for number in missing[rank::after]
            for image in range(number * BLOCK, min((number + 1) * BLOCK, NUM_SOURCE))
        ]
        assert one["loaded"][READ_BEFORE:][: len(images)] == images
        looked_at = 10 * (4 + NUM_TARGET) if rank == 0 else 0  # mirrored or not; duplicates are the first process' work
        assert len(one["loaded"]) <= READ_BEFORE + len(images) + looked_at
    assert found[0]["left"] == ["chosen"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("fails_in_source", "More than 1% of the source images cannot be used"),
        ("fails_in_target", "Target image 3 cannot be used: OSError: truncated file"),
        ("fails_in_protected", "More than 1% of the protected images cannot be used"),
        ("fails_to_write", "No space left on device"),
    ],
)
def test_where_one_process_fails_all_end_and_say_which(ranks, job, message):
    told, written = ranks
    assert told[f"{job}-2"] == [1, 1]  # -9 is one that hung
    other, failed = (written(f"{job}-2-{rank}") for rank in range(2))
    assert message in failed["message"]
    assert failed["error"] == ("OSError" if job == "fails_to_write" else "TransferConfigError")
    assert other["message"].startswith("In process 1: ")
    assert message in other["message"]


def test_processes_that_see_different_images_are_refused(ranks):
    told, written = ranks
    assert told["other_images-2"] == [1, 1]
    for rank in range(2):
        assert "Processes have different images" in written(f"other_images-2-{rank}")["message"]


def test_rounds_on_two_processes_give_the_budgets_of_one(ranks):
    """Asked in shares of 12 and 11 target images."""
    told, written = ranks
    assert told["rounds-1"] == [0]
    assert told["rounds-2"] == [0, 0], written("rounds-2-0")
    alone, *shared = (written(name)["budgets"] for name in ("rounds-1-0", "rounds-2-0", "rounds-2-1"))
    assert {*alone[1].tolist()} == {1.0}
    assert {*alone[2].tolist()} == {1.0, 3.0, 5.0}
    assert (alone[5] > alone[3]).any()
    for one in shared:
        assert torch.equal(one, alone)
