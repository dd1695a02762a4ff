"""Weights that are annealed away: exact ends, never rising, the formulas of the shapes."""

import math
from itertools import pairwise

import numpy as np
import pytest

import lightning_transfer as lt
from lightning_transfer.functional import anneal

SHAPES = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "exponential": lambda u: (math.exp(-5 * u) - math.exp(-5)) / (1 - math.exp(-5)),
    "step": lambda u: 1.0,
}


@pytest.mark.parametrize("until", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.7, 0.1), (2.0, 0.0)])
@pytest.mark.parametrize("shape", [*SHAPES, lambda u: (1 - u) ** 2])
def test_shapes_against_their_formulas_with_exact_ends(shape, ends, until):
    start, end = ends
    formula = SHAPES.get(shape, shape)
    values = [anneal(p, start=start, end=end, shape=shape, until=until) for p in np.linspace(0, 1, 101)]
    for progress, value in zip(np.linspace(0, 1, 101), values, strict=True):
        expected = end if progress >= until else end + (start - end) * formula(progress / until)
        assert value == pytest.approx(expected, abs=1e-12)
    assert values[0] == start
    assert all(value == end for value, p in zip(values, np.linspace(0, 1, 101), strict=True) if p >= until)
    assert all(later <= earlier for earlier, later in pairwise(values))


def test_steps_and_shares_meet():
    by_share, by_steps = lt.Schedule(until=0.3), lt.Schedule(until_steps=30)
    assert [by_share.at(step, 100) for step in range(100)] == pytest.approx([by_steps.at(s, 100) for s in range(100)])
    assert by_share.at(30, 100) == by_steps.at(30, 100) == 0.0
    assert by_share.at(29, 100) > 0


@pytest.mark.parametrize("until_steps", range(1, 200))
def test_until_steps_ends_at_that_step_exactly(until_steps):
    weight = lt.Schedule(until_steps=until_steps)
    assert weight.at(until_steps - 1, 1) > 0 == weight.at(until_steps, 1)


def test_a_constant_is_exactly_constant():
    assert {lt.Schedule(0.3, 0.3, shape=shape)(p / 7) for shape in SHAPES for p in range(8)} == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "linaer"}, "Did you mean 'linear'?"),
        ({"start": -1.0}, "start=-1.0"),
        ({"end": math.nan}, "end=nan"),
        ({"start": math.inf}, "start=inf"),
        ({"start": "1"}, "start='1'"),
        ({"until": 0}, "until=0 is not a share"),
        ({"until": 50}, "until_steps="),
        ({"until_steps": 0}, "until_steps=0"),
        ({"until_steps": 1.5}, "whole number"),
        ({"until_steps": True}, "until_steps=True"),
        ({"shape": lambda u: 1 - 2 * u}, r"shape\(0.51\)=-0.02"),
        ({"shape": lambda u: u}, r"shape\(0.0\) < shape\(0.01\); a shape starts at 1"),
        ({"shape": lambda u: 0.5}, r"shape\(0\) is 0.5"),
        ({"shape": lambda u: "a"}, r"shape\(0.0\)='a'"),
        ({"until": 0.3, "until_steps": 10}, "not both"),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction(options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.Schedule(**options)
