"""Give a piece of work a random state of its own: torch on the CPU, numpy and random."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

TWISTER = 625 * 4  # bytes of the state of numpy's Mersenne Twister: 624 words and a position


@contextmanager
def restored() -> Iterator[None]:
    """Restore the program's random state (torch on the CPU, numpy, random) after the work inside has used it."""
    state, restore_numpy, others = torch.get_rng_state(), _numpy_restorer(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        restore_numpy()
        random.setstate(others)


def _numpy_restorer() -> Callable[[], None]:
    """Return a function that puts numpy's random state back; `get_state` and `set_state` take ten times as long.

    The generator's memory is copied. Only a normal number that is left of a pair is not in it; if there is one, drawing
    a normal number returns it and changes no memory.
    """
    bits = np.random.mtrand.get_bit_generator()
    if type(bits) is not np.random.MT19937:
        return partial(np.random.set_state, np.random.get_state())
    memory = ctypes.string_at(bits.ctypes.state_address, TWISTER)

    def restore() -> None:
        np.random.seed(0)  # leaves no normal number
        ctypes.memmove(bits.ctypes.state_address, memory, TWISTER)

    normal = np.random.standard_normal()
    if ctypes.string_at(bits.ctypes.state_address, TWISTER) == memory:
        state = {**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": normal}
        restore = partial(np.random.set_state, state)
    restore()
    return restore


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
