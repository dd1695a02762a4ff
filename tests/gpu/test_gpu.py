"""What holds on a CPU holds on a GPU, and no step waits for it. Without a GPU these tests are not run."""

import copy

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.glue.trainer import to_device
from lightning_transfer.source import drawing
from tests import processes, toys
from tests.gpu import ranks_run
from tests.methods import borrowed, each
from tests.toys import LitToy, assert_same, fit, weights

GPU = {"accelerator": "gpu", "devices": 1}
EXACT = {**GPU, "precision": "64-true"}  # sums in another order then differ by less than 1e-9

pytestmark = pytest.mark.gpu(1)


class Quiet(LitToy):
    """Reads nothing back from the device."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class NoWaiting(L.Callback):
    """An operation that waits for the device is an error in every step but the first two."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step > 1:
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *args):
        torch.cuda.set_sync_debug_mode("default")


def on_cpu(module):
    return {name: value.cpu() for name, value in weights(module).items()}


@each()
def test_a_run_on_a_gpu_is_the_run_on_a_cpu(method):
    found = []
    for options in (EXACT, {"precision": "64-true"}):
        module = LitToy()
        fit(module, [method.callback()], **options)
        found.append(on_cpu(module))
    assert_same(*found, tolerance=max(method.tolerance, 1e-9))


@each()
def test_no_step_waits_for_the_device(method):
    watch = NoWaiting()
    fit(Quiet(), [method.callback(), watch], max_epochs=3, log_every_n_steps=1000, **GPU)
    assert watch.steps > 5


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_hooks", [True, False])
def test_source_batches_are_pinned_and_copied_without_waiting(batch_hooks, workers, monkeypatch):
    pinned, watch = [], NoWaiting()

    def moved(trainer, batch, **options):
        pinned.extend(leaf.is_pinned() for leaf in batch)
        return to_device(trainer, batch, **options)

    monkeypatch.setattr(drawing, "to_device", moved)
    source = lt.SourceTask(toys.source_data(), num_classes=7, num_workers=workers, batch_hooks=batch_hooks)
    fit(Quiet(), [lt.SoftFinetuning(source, weight=1.0), watch], max_epochs=3, log_every_n_steps=1000, **GPU)
    assert pinned == [True] * 2 * 18  # images and labels
    assert watch.steps > 5


@each()
def test_half_precision_with_a_scaler_trains(method):
    module = LitToy()
    fit(module, [method.callback()], max_epochs=4, precision="16-mixed", **GPU)
    assert all(torch.isfinite(value).all() for value in weights(module).values())
    first, last = torch.tensor(module.losses).chunk(4)[::3]
    assert last.mean() < first.mean()


@each()
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path):
    whole, half, rest = LitToy(), LitToy(), LitToy()
    fit(whole, [method.callback()], max_epochs=2, **GPU)
    fit(half, [method.callback()], max_epochs=1, **GPU).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, [method.callback()], max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **GPU)
    assert_same(on_cpu(rest), on_cpu(whole), tolerance=1e-5)


def test_a_selection_is_that_of_a_cpu():
    chosen = []
    for options in (GPU, {}):
        callback = lt.SelectiveJointFinetuning(
            lt.SourceTask(toys.source_data(), num_classes=7), neighbors=borrowed(rounds=0), weight=1.0
        )
        fit(LitToy(), [callback], **options)
        chosen.append(callback.selection.indices.cpu())
    assert torch.equal(*chosen)


def test_a_head_starts_as_the_probe_of_a_cpu():
    class Started(LitToy):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 0:
                self.start = on_cpu(self)

    found = []
    for options in (EXACT, {"precision": "64-true"}):
        module = Started()
        fit(module, [lt.ProbeStart()], **options)
        found.append(module.start)
    assert_same(*found, tolerance=1e-6)


def test_networks_on_a_gpu_are_ranked_as_on_a_cpu():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    labels = torch.arange(60) % 3
    data = TensorDataset((torch.rand(60, 3, 16, 16) + 0.3 * labels[:, None, None, None]).clamp(0, 1), labels)
    ranked = [lt.rank_networks({"one": copy.deepcopy(network).to(device)}, data) for device in ("cuda", "cpu")]
    assert ranked[0].rows[0].accuracy == pytest.approx(ranked[1].rows[0].accuracy, abs=0.05)


def test_advice_leaves_module_and_random_state_as_they_were():
    module = LitToy()
    before, state = weights(module), torch.cuda.get_rng_state()
    loader = DataLoader(toys.images(40, 5, seed=1), batch_size=8, shuffle=True)
    lt.advise(module, loader, candidates={"same": lambda: []}, steps=4, trainer={**GPU, "enable_progress_bar": False})
    assert_same(weights(module), before)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu(2)
def test_two_gpus_equal_each_other_and_one():
    ends = [end for num in (2, 1) for end in processes.run(ranks_run.results, num, num_ranks=num)]
    assert [end.code for end in ends] == [0, 0, 0]
    first, second, alone = (end.found for end in ends)
    for name in alone:
        assert_same(first[name], second[name])
        assert_same(first[name], alone[name], tolerance=1e-9)
