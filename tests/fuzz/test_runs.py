"""A run of any method that is cut and resumed anywhere is the run that was not, whatever its options."""

import pathlib
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_transfer as lt
from lightning_transfer.source.redrawing import COMPARED, READINGS
from tests import toys
from tests.methods import each
from tests.toys import LitToy, Recorder, SaveEveryStep, StatefulLoader, assert_same, fit, weights


@each()
@settings(max_examples=max(3, settings().max_examples // 40))
@given(st.data())
def test_cut_and_resumed_anywhere(method, data):
    start, end = sorted(data.draw(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.0, 0.3]))), reverse=True)
    shape = data.draw(st.sampled_from(["linear", "cosine", "exponential", "step"]))
    weight = lt.Schedule(start, end, shape=shape, until_steps=data.draw(st.integers(1, 6)))
    options = {"batch_size": data.draw(st.integers(1, 9)), "seed": data.draw(st.integers(0, 99))}
    epochs = data.draw(st.integers(1, 3))
    cut = data.draw(st.integers(1, 6 * epochs - 1))
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for path in (None, pathlib.Path(folder) / f"step={cut}.ckpt"):
            module, source = LitToy(), Recorder(toys.source_data())
            saving = [SaveEveryStep(pathlib.Path(folder))] if path is None else []
            callbacks = [method.always(weight, source, **options), *saving]
            fit(module, callbacks, loader=StatefulLoader(), ckpt_path=path, max_epochs=epochs)
            runs.append((module, source.loaded))
    (whole, drawn), (resumed, rest) = runs
    assert_same(weights(resumed), weights(whole))
    assert resumed.losses == whole.losses[cut:]
    steps = [weight.at(step, 6 * epochs) > 0 for step in range(6 * epochs)]
    num, num_rest = (options["batch_size"] * sum(steps[start:]) * method.has_source for start in (0, cut))
    assert len(drawn) == num
    assert rest[len(rest) - num_rest :] == drawn[num - num_rest :]
    # and before that, to see whether the source is the same
    assert rest[: len(rest) - num_rest] in ([], drawn[: min(options["batch_size"], COMPARED)] * READINGS)
