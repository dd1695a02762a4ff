"""What holds on a CPU holds on a GPU, and no step waits for it. Without a GPU these tests are not run.

The runs are those of tests/contracts/test_reads.py: every method as a callback and as a mixin, and some together.
"""

import copy

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.glue.moving import to_device
from lightning_transfer.source import drawing
from tests import processes, toys
from tests.contracts.test_reads import RUNS, quiet
from tests.gpu import ranks_run, without_run
from tests.gpu.without_run import cut, in_order, tensors
from tests.methods import METHODS, borrowed, each
from tests.toys import LitToy, SaveEveryStep, assert_same, fit, weights

GPU = {"accelerator": "gpu", "devices": 1}
DOUBLE = {"precision": "64-true"}  # sums in another order then differ by less than 1e-9
EXACT = {**GPU, **DOUBLE}
FITTED = 1e-5  # a probe is fitted until little changes
LOADED = 1e-5  # Lightning loads a checkpoint into single precision, before the module is converted

pytestmark = pytest.mark.gpu(1)
each_run = pytest.mark.parametrize("name", RUNS)


def ran(name, *more, **options):
    """What a run ends with."""
    make, callbacks = RUNS[name]
    module = make()
    fit(module, [*callbacks(), *more], **options)
    return tensors(module.state_dict())


def close(name):
    return FITTED if name == "ProbeStart" else 1e-9


class Quiet(LitToy):
    """Reads nothing back from the device."""

    training_step = quiet


class Hooked(Quiet):
    """With a hook that source batches pass too."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1] + 0


class NoWaiting(L.Callback):
    """An operation that waits for the device is an error in every step but an epoch's last, which may log, and three:
    the first, one in which what was loaded and compiled is used again, and one in which a round asks the network."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        is_quiet = trainer.global_step > 2 and not trainer.is_last_batch
        self.steps += is_quiet
        torch.cuda.set_sync_debug_mode("error" if is_quiet else "default")  # until the next step: hooks come later too

    def on_train_end(self, *args):
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_end


QUIET_STEPS = 2 + 5 + 5  # of three epochs of six steps


@each_run
def test_a_run_on_a_gpu_is_the_run_on_a_cpu(name):
    state = torch.cuda.get_rng_state()
    found = ran(name, **EXACT)
    assert torch.equal(torch.cuda.get_rng_state(), state)  # no toy draws on the device
    assert_same(found, ran(name, **DOUBLE), tolerance=close(name))


@each_run
def test_no_step_waits_for_the_device(name, monkeypatch):
    monkeypatch.setattr(toys.ToySteps, "training_step", quiet)
    watch = NoWaiting()
    ran(name, watch, max_epochs=3, log_every_n_steps=1000, **GPU)
    assert watch.steps == QUIET_STEPS


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("make", [Quiet, Hooked])
def test_source_batches_are_pinned_and_copied_without_waiting(make, workers, monkeypatch):
    pinned, watch = [], NoWaiting()

    def moved(trainer, batch, **options):
        pinned.extend(leaf.is_pinned() for leaf in batch)
        return to_device(trainer, batch, **options)

    monkeypatch.setattr(drawing, "to_device", moved)
    source = lt.SourceTask(toys.source_data(), num_classes=7, num_workers=workers)
    fit(make(), [lt.SoftFinetuning(source, weight=1.0), watch], max_epochs=3, log_every_n_steps=1000, **GPU)
    assert pinned == [True] * 2 * 18  # images and labels
    assert watch.steps == QUIET_STEPS


@each()
def test_half_precision_with_a_scaler_trains(method):
    module = LitToy()
    fit(module, [method.callback()], max_epochs=4, precision="16-mixed", **GPU)
    assert all(torch.isfinite(value).all() for value in weights(module).values())
    first, last = torch.tensor(module.losses).chunk(4)[::3]
    assert last.mean() < first.mean()


@each_run
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_trains_what_the_whole_one_trains(name, precision):
    """Weights that were cast while the network was asked without gradients are not used again in the step."""
    make, _ = RUNS[name]
    before = tensors(make().state_dict())

    def trained(**options):
        found = ran(name, **options)
        assert all(torch.isfinite(value).all() for value in found.values())
        return {key for key, value in found.items() if key not in before or not torch.equal(value, before[key])}

    assert trained(precision=precision, **GPU) == trained(**GPU)


@each_run
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    whole = ran(name, SaveEveryStep(tmp_path), **EXACT, **in_order(name))
    path = tmp_path / f"step={cut(name)}.ckpt"
    assert_same(ran(name, ckpt_path=path, **EXACT, **in_order(name)), whole, tolerance=LOADED)


def test_a_machine_without_a_gpu_goes_on_with_and_loads_what_one_has_saved(tmp_path, monkeypatch):
    whole = {name: ran(name, SaveEveryStep(tmp_path / name), **EXACT, **in_order(name)) for name in RUNS}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (end,) = processes.run(without_run.results, tmp_path, seconds=600)
    assert end.code == 0, end.found
    resumed, loaded = end.found
    for name in RUNS:
        assert_same(resumed[name], whole[name], tolerance=LOADED)
    for name in map(str, METHODS):
        path = tmp_path / name / f"step={cut(name)}.ckpt"
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        assert_same(loaded[name], tensors(saved), tolerance=LOADED)


@each()
def test_a_network_that_is_built_on_the_device_is_as_any(method):
    """Lightning calls `configure_model` with the device as the default of new tensors."""

    class Late(toys.Late):
        def build(self):
            return toys.toy_net().cuda()

    found = []
    for make in (Late, LitToy):
        module, state = make(), torch.cuda.get_rng_state()
        fit(module, [method.callback()], **GPU)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        found.append(tensors(module.state_dict()))
    assert_same(*found, tolerance=1e-4)


@each(has_source=True)
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_network_is_as_any(method):
    found = []
    for is_compiled in (True, False):
        module = LitToy()
        if is_compiled:
            module.model.compile()
        fit(module, [method.callback()], **EXACT)
        found.append(tensors(module.state_dict()))
    assert_same(*found, tolerance=1e-6)


def test_a_selection_is_that_of_a_cpu():
    chosen = []
    for options in (GPU, {}):
        callback = lt.SelectiveJointFinetuning(
            lt.SourceTask(toys.source_data(), num_classes=7), neighbors=borrowed(rounds=0), weight=1.0
        )
        fit(LitToy(), [callback], **options)
        chosen.append(callback.selection.indices.cpu())
    assert torch.equal(*chosen)


def test_functions_take_what_is_on_the_device():
    images = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    filters, edges = torch.randn(2, 3, 3, 3), torch.tensor([[-1.0, 0.0, 1.0]] * 2)
    found = []
    for device in ("cuda", "cpu"):
        responses = lt.functional.filter_responses(images.double().to(device), filters.double().to(device))
        sets = lt.functional.response_histograms(responses, edges.double().to(device), smoothing=1.0)
        distances, indices = lt.functional.symmetric_kl_neighbors(sets[:4], sets[4:], k=3)  # searched there
        gap = lt.functional.domain_gap(sets[:5].flatten(1), sets[5:].flatten(1))
        assert distances.device == indices.device == sets.device
        found.append((distances.cpu(), indices.cpu(), lt.functional.symmetric_kl(sets, sets).cpu(), torch.tensor(gap)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_head_starts_as_the_probe_of_a_cpu():
    class Started(LitToy):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 0:
                self.start = tensors(self.state_dict())

    found = []
    for options in (EXACT, DOUBLE):
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
    ends = [end for num in (2, 1) for end in processes.run(ranks_run.results, num, num_ranks=num, seconds=600)]
    assert [end.code for end in ends] == [0, 0, 0]
    first, second, alone = (end.found for end in ends)
    for name in alone:
        assert_same(first[name], second[name])
        assert_same(first[name], alone[name], tolerance=1e-9)
