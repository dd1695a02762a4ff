"""Give a piece of work a random state of its own: torch on the CPU, numpy and random."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def restored() -> Iterator[None]:
    """Restore the program's random state (torch on the CPU, numpy, random) after the work inside has used it."""
    # legacy=True would warn if numpy's bit generator is not its default
    states = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Use a separate random state (torch on the CPU, numpy, random) inside, and restore the program's after it."""
    with restored():
        reseed(seed, position)
        yield


def next_numbers() -> tuple[float, float, float]:
    """Return what each generator would draw next, without drawing it."""
    with restored():
        return float(torch.rand(())), float(np.random.rand()), random.random()


def reseed(seed: int, position: int) -> None:
    """Seed torch on the CPU, numpy and random with a value of these two."""
    value = seed_of(seed, position)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would reseed the accelerators too
    np.random.seed(value % 2**32)
    random.seed(value)


def seed_of(seed: int, number: int) -> int:
    """Return a well-mixed seed for the `number`-th use of `seed`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) >> 1
