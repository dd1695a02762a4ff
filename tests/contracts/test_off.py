"""A method that is turned off leaves not a bit of difference."""

import random

import numpy as np
import pytest
import torch

from tests import toys
from tests.methods import METHODS
from tests.toys import LitToy, Recorder, assert_same, fit, weights


def random_state():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_zero_weight_is_bit_identical_to_no_callback(method, options):
    shuffled = torch.utils.data.DataLoader(toys.target_data(), batch_size=4, shuffle=True)
    results = []
    for callbacks in ([], [method.off(data := Recorder(toys.source_data()))]):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        module = LitToy()
        fit(module, callbacks, loader=shuffled, **options)
        results.append((weights(module), module.losses, random_state()))
    plain, off = results
    assert_same(off[0], plain[0])
    assert off[1] == plain[1]
    assert all(np.array_equal(a, b) for a, b in zip(off[2][:2], plain[2][:2], strict=True))
    assert off[2][2] == plain[2][2]
    assert data.loaded == []


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_once_annealed_away_a_step_is_plain_finetunings(method):
    """From `until` on: no source image is loaded, the source head gets no gradient, and a step from the same weights
    gives the same weights."""

    class Watched(LitToy):
        heads, snapshots, loaded = [], [], []  # noqa: RUF012

        def on_train_batch_start(self, batch, batch_idx):
            self.loaded.append(len(data.loaded))

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            self.heads.append(callback.part.head.weight.grad)
            self.snapshots.append((weights(self), list(self.optimizers().state.values())))

    data = Recorder(toys.source_data())
    callback = method.callback(data)
    module = Watched()
    fit(module, [callback])
    steps_with_source = callback.weight.until_steps
    assert module.loaded[: steps_with_source + 1] == [4 * step for step in range(steps_with_source + 1)]
    assert set(module.loaded[steps_with_source:]) == {4 * steps_with_source}
    assert all(grad is not None for grad in module.heads[:steps_with_source])
    assert all(grad is None for grad in module.heads[steps_with_source:])
