"""A method that is turned off leaves not a bit of difference."""

import random

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from tests import toys
from tests.methods import UNTIL, each
from tests.toys import LitToy, Recorder, assert_same, fit, weights


def random_state():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


@each()
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_off_is_bit_identical_to_no_callback(method, options):
    shuffled = torch.utils.data.DataLoader(toys.target_data(), batch_size=4, shuffle=True)
    results = []
    for callbacks in ([], [method.off(data := Recorder(toys.source_data()))]):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        module = LitToy()
        fit(module, callbacks, loader=shuffled, **options)
        if callbacks:
            method.plain(module)
        results.append((weights(module), module.losses, random_state()))
    plain, off = results
    assert_same(off[0], plain[0])
    assert off[1] == plain[1]
    assert all(np.array_equal(a, b) for a, b in zip(off[2][:2], plain[2][:2], strict=True))
    assert off[2][2] == plain[2][2]
    assert data.loaded == []


class Watched(LitToy):
    """Notes, for every step, how many source images were loaded before it and the source head's gradient."""

    def __init__(self, data, callback):
        super().__init__()
        self.data, self.callback = data, callback
        self.loaded, self.grads = [], []

    def on_train_batch_start(self, batch, batch_idx):
        self.loaded.append(len(self.data.loaded))

    def on_before_zero_grad(self, optimizer):
        self.grads.append(self.callback.part.head.weight.grad)


@each(has_source=True)
def test_once_annealed_away_no_source_image_is_loaded(method):
    data = Recorder(toys.source_data())
    callback = method.callback(data)
    module = Watched(data, callback)
    fit(module, [callback])
    assert module.loaded == [4 * min(step, UNTIL) for step in range(12)]
    assert [grad is not None for grad in module.grads] == [0 < step <= UNTIL for step in range(12)]


@each(has_source=True)
def test_once_annealed_away_a_step_is_plain_finetunings(method, tmp_path):
    """The rest of the run, begun again from there without the callback, gives the same weights to the bit."""
    with_callback, plain = LitToy(), LitToy()
    fit(with_callback, [method.callback(), toys.SaveEveryStep(tmp_path)], loader=toys.StatefulLoader())
    lt.strip_checkpoint(tmp_path / f"step={UNTIL}.ckpt", tmp_path / "plain.ckpt")
    fit(plain, loader=toys.StatefulLoader(), ckpt_path=tmp_path / "plain.ckpt")
    assert_same(weights(plain), weights(with_callback))
    assert plain.losses == with_callback.losses[UNTIL:]
