"""Run a function in processes of its own, started as torchrun starts them, and see how each of them ends."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

# a forked process imports nothing again; beside a GPU, autograd has threads in this one, with which none can be forked
HOW = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "fork")


class End(NamedTuple):
    """How a process ended.

    Attributes:
        code: its exit code; below 0 the signal that killed it.
        found: what the function returned, or its error's name and message; None if the process was killed.
    """

    code: int
    found: Any


def run(act, *arguments, num_ranks=1, seconds=120):
    """Run a function in so many processes and give the end of each; one that hangs is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    latest = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of pytest-xdist's thread, which only waits
        paths = [Path(folder, str(rank)) for rank in range(num_ranks)]
        given = ((act, arguments, path, rank, num_ranks, port) for rank, path in enumerate(paths))
        started = [HOW.Process(target=_be, args=each) for each in given]
        for process in started:
            process.start()
        for process in started:
            process.join(max(0, latest - time.monotonic()))
            process.kill()
            process.join()
        codes = [process.exitcode for process in started]
        return [
            End(code, torch.load(path, weights_only=False) if code >= 0 else None)
            for code, path in zip(codes, paths, strict=True)
        ]


def _be(act, arguments, path, rank, num_ranks, port):
    """Be one of the processes."""
    whole = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "ranks", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in {**whole, **mine}.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        found, code = act(*arguments), 0
    except BaseException as error:
        traceback.print_exc()
        found, code = {"error": type(error).__name__, "message": str(error)}, 1
    torch.save(found, path)
    sys.exit(code)
