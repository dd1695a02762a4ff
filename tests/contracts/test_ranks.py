"""Two processes equal each other after every step, and equal one process that takes both their batches."""

import pytest
import torch

from tests import processes
from tests.contracts import ranks_run
from tests.methods import UNTIL, each
from tests.toys import assert_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    ends = processes.run(ranks_run.results, 2, folder, num_ranks=2)
    assert [end.code for end in ends] == [0, 0]
    return [end.found for end in ends]


@pytest.fixture(scope="module")
def alone(folder):
    (end,) = processes.run(ranks_run.results, 1, folder)
    assert end.code == 0
    return end.found


@pytest.mark.parametrize("run", ["", " off", " bf16"])
@each()
def test_two_ranks_equal_each_other_after_every_step(ranks, method, run):
    first, second = (rank[f"{method}{run}"] for rank in ranks)
    assert len(first) == len(second) == 6 > UNTIL
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("run", ["", " off"])
@each()
def test_two_ranks_equal_one_process(ranks, alone, method, run):
    for shared, single in zip(ranks[0][f"{method}{run}"], alone[f"{method}{run}"], strict=True):
        assert_same(shared, single, tolerance=1e-6)


@pytest.mark.parametrize(
    "pair", ["selective and adafilter", "soft and gated", "a warm-up", "gates shut everywhere", "all"]
)
def test_methods_together_on_two_ranks_equal_each_other_and_one_process(ranks, alone, pair):
    assert len(alone[pair]) == 6
    assert any((alone[pair][0][name] != value).any() for name, value in alone[pair][-1].items())
    for first, second, single in zip(ranks[0][pair], ranks[1][pair], alone[pair], strict=True):
        assert_same(first, second)
        assert_same(first, single, tolerance=1e-6)


def test_what_the_first_rank_finds_in_a_search_is_every_ranks(ranks):
    assert ranks[0]["a search's plan"] == ranks[1]["a search's plan"]
    for first, second in zip(ranks[0]["a search"], ranks[1]["a search"], strict=True):
        assert_same(first, second)


@each(has_source=True)
def test_a_checkpoint_of_two_ranks_names_the_place_where_one_process_is(ranks, alone, folder, method):
    paths = [folder / f"{method}-2/step=4.ckpt", folder / f"{method}-1/step=4.ckpt"]
    states = [
        torch.load(path, weights_only=True)["callbacks"][type(method.callback()).__name__]["part"]["_extra_state"]
        for path in paths
    ]
    assert states[0]["position"] == states[1]["position"] == 32


def test_general_discrimination_is_the_same_on_two_processes(ranks, alone):
    assert ranks[0]["general discrimination"] == ranks[1]["general discrimination"] == alone["general discrimination"]
    assert 0.3 < alone["general discrimination"] < 1
