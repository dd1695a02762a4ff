"""Two processes equal each other after every step, and equal one process that takes both their batches."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch

from tests.contracts import ranks_run
from tests.methods import UNTIL, each
from tests.toys import assert_same

SCRIPT = pathlib.Path(ranks_run.__file__)


def launch(folder: pathlib.Path, num_ranks: int, *, script: pathlib.Path | str = SCRIPT) -> list[dict]:
    """Start the ranks and read what each of them found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "ranks",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    paths = [folder / f"rank{rank}.pt" for rank in range(num_ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, path],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
        )
        for rank, path in enumerate(paths)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * num_ranks
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return launch(folder, 2)


@pytest.fixture(scope="module")
def alone(folder):
    (folder / "alone").mkdir()
    return launch(folder / "alone", 1)[0]


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
    paths = [folder / f"{method}-2/step=4.ckpt", folder / f"alone/{method}-1/step=4.ckpt"]
    states = [
        torch.load(path, weights_only=True)["callbacks"][type(method.callback()).__name__]["part"]["_extra_state"]
        for path in paths
    ]
    assert states[0]["position"] == states[1]["position"] == 32


def test_general_discrimination_is_the_same_on_two_processes(ranks, alone):
    assert ranks[0]["general discrimination"] == ranks[1]["general discrimination"] == alone["general discrimination"]
    assert 0.3 < alone["general discrimination"] < 1
