"""Any schedule falls, or rises, from exactly its start to exactly its end, as numpy has it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_transfer as lt

ORACLES = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + np.cos(np.pi * u)) / 2,
    "exponential": lambda u: (np.exp(-5 * u) - np.exp(-5)) / (1 - np.exp(-5)),
    "step": np.ones_like,
}
WEIGHTS = st.one_of(st.sampled_from([0, 1, 0.0, 1.0, 5e-324]), st.floats(0, 1e6), st.floats(0, 1))
CUSTOM = {"square": lambda u: (1 - u) ** 2, "late": lambda u: 1 - u**7, "held": lambda u: float(u < 0.5)}
SHAPES = st.sampled_from([*ORACLES, *CUSTOM])
STEPS = st.integers(1, 10**6)


def schedule(start, end, shape, **until):
    return lt.Schedule(start, end, shape=CUSTOM.get(shape, shape), **until)


def expected(start, end, shape, shares):
    """At shares of the way to `until`, in float64."""
    fall = {**ORACLES, **{name: np.vectorize(shape) for name, shape in CUSTOM.items()}}[shape](np.minimum(shares, 1.0))
    return np.where(shares >= 1, end, end + (np.float64(start) - end) * fall)


def assert_follows(values, wanted, start, end):
    values = np.array(values, dtype=np.float64)
    scale = max(start, end)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12 * scale)
    assert values[0] == start
    assert values[-1] == end
    assert (values >= min(start, end)).all()
    assert (values <= scale).all()
    assert (np.diff(values) * np.sign(end - start) >= -4 * np.spacing(scale)).all()


@given(WEIGHTS, WEIGHTS, SHAPES, st.floats(1e-9, 1), st.lists(st.floats(0, 1), max_size=30))
def test_over_shares_of_training(start, end, shape, until, progress):
    weight = schedule(start, end, shape, until=until)
    progress = np.array(sorted([0.0, until, 1.0, *progress]))
    assert_follows([weight(p) for p in progress.tolist()], expected(start, end, shape, progress / until), start, end)


@given(WEIGHTS, WEIGHTS, SHAPES, STEPS, STEPS, st.floats(1e-6, 1), st.lists(st.floats(0, 1), max_size=20))
def test_over_steps_of_training(start, end, shape, num_steps, until_steps, until, shares):
    for weight, last in (
        (schedule(start, end, shape, until_steps=until_steps), until_steps),
        (schedule(start, end, shape, until=until), until * num_steps),
    ):
        steps = np.unique([0, *(int(share * num_steps) for share in shares), np.ceil(last), np.ceil(last) + 1])
        values = [weight.at(int(step), num_steps) for step in steps]
        assert_follows(values, expected(start, end, shape, steps / last), start, end)


@given(WEIGHTS, WEIGHTS, SHAPES, st.floats(allow_nan=True, allow_infinity=True))
def test_a_length_is_a_share_of_training_or_refused(start, end, shape, until):
    if 0 < until <= 1:
        assert schedule(start, end, shape, until=until)(1.0) == end
    else:
        with pytest.raises(lt.TransferConfigError, match="until="):
            schedule(start, end, shape, until=until)
