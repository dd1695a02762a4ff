"""Source images leave no trace: not in loops that a sample could end, not in what the user's batch hooks remember."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import Dataset

import lightning_transfer as lt
from lightning_transfer.glue.standin import HOOKS
from tests import toys
from tests.methods import borrowed
from tests.toys import LitToy, fit

ALWAYS = lt.Schedule(1.0, 1.0)
BAD = 13


class Ending(Dataset):
    """One sample raises what ends a loop or a program; from a number of readings on."""

    def __init__(self, data, error, after=0):
        self.data, self.error, self.after = data, error, after

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == BAD:
            self.after -= 1
            if self.after < 0:
                raise self.error
        return self.data[index]


def task(data, **options):
    return lt.SourceTask(data, head=toys.source_head(), batch_size=4, **options)


def trained(data, workers):
    fit(LitToy(), [lt.SoftFinetuning(task(data, num_workers=workers), weight=ALWAYS)])


def measured_source(data, workers):
    fit(LitToy(), [lt.SoftFinetuning(task(data, num_workers=workers))])


def measured_source_of_a_selection(data, workers):
    """Where unreadable images are forgiven."""
    source = task(data, num_workers=workers, unaugmented=toys.source_data())
    fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(), weight="auto")])


def measured_target(data, workers):
    loader = toys.DataLoader(data, batch_size=4, num_workers=workers)
    fit(LitToy(), [lt.SoftFinetuning(task(toys.source_data()))], loader=loader)


def selected_source(data, workers):
    scan = lt.Scan(num_workers=workers, say=lambda line: None)
    lt.select_neighbors(toys.target_data(), data, bank=borrowed().bank, k=3, scan=scan)


def selected_target(data, workers):
    scan = lt.Scan(num_workers=workers, say=lambda line: None)
    lt.select_neighbors(data, toys.source_data(), bank=borrowed().bank, k=3, scan=scan)


def round_of_the_target(data, workers):
    class Arming(LitToy):
        """The selection has read every sample before the first step's end; the round comes at the third step."""

        def on_train_batch_end(self, outputs, batch, batch_idx):
            data.after = 0

    data.after = 1000
    source = task(toys.source_data(), num_workers=workers)
    fit(Arming(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(), target=data, weight=ALWAYS)])


def advised(data, workers):
    loader = toys.DataLoader(data, batch_size=4, num_workers=workers)
    lt.advise(LitToy(), loader, candidates={}, steps=3, trainer={"accelerator": "cpu"})


PLACES = [
    (trained, "Source"),
    (measured_source, "Source"),
    (measured_source_of_a_selection, "Source"),
    (measured_target, "Target"),
    (selected_source, "Source"),
    (selected_target, "Target"),
    (round_of_the_target, "Target"),
    (advised, "Target"),
]


@pytest.mark.parametrize(
    "error", [StopIteration("over"), SystemExit(0), StopAsyncIteration(), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize(("place", "side"), PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_a_sample_that_would_end_the_loop_is_an_error_that_names_it(place, side, error):
    """D2."""
    data = toys.source_data() if side == "Source" else toys.target_data()
    with pytest.raises(lt.TransferConfigError, match=rf"(?s){side} sample 13 raised {type(error).__name__}") as caught:
        place(Ending(data, error), 0)
    chain, link = [], caught.value
    while link is not None:
        chain, link = [*chain, link], link.__cause__
    assert error in chain


@pytest.mark.parametrize("place", [trained, measured_source, selected_source], ids=lambda place: place.__name__)
def test_the_same_where_workers_read(place):
    """D2."""
    with pytest.raises(lt.TransferConfigError, match="(?s)Source sample 13 raised StopIteration"):
        place(Ending(toys.source_data(), StopIteration()), 1)


def test_ctrl_c_stays_ctrl_c():
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        lt.select_neighbors(
            toys.target_data(), Ending(toys.source_data(), KeyboardInterrupt()), bank=borrowed().bank, k=3
        )
    assert caught.type is KeyboardInterrupt


class Remembering(LitToy):
    """Hooks that keep the mean of the last batch, for the loss, and count batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.num_batches = 0
        self.used = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.mean, self.scale = batch[0].mean(), batch[0].std()
        self.num_batches += 1
        return batch

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.used.append((self.mean.item(), self.scale.item()))
        return loss * self.scale

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.used.append((self.mean.item(), self.scale.item()))


class RememberingData(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.kept = []

    def train_dataloader(self):
        return toys.target_loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.kept = [batch[0].mean()]
        return batch


def expected(statistic):
    """A numpy loop over the target's batches, twice each: in the step, and after it."""
    pixels = toys.target_data().tensors[0].numpy()
    return [statistic(pixels[start : start + 4]) for start in [*range(0, 24, 4)] * 2 for _ in range(2)]


def soft(**options):
    return lt.SoftFinetuning(task(toys.source_data(), **options), weight=ALWAYS)


def selective(**options):
    source = task(toys.source_data(), **options)
    return lt.SelectiveJointFinetuning(source, neighbors=borrowed(), target=toys.target_data(), weight=ALWAYS)


KINDS = {
    "separate": soft,
    "joint": lambda: soft(forward="joint"),
    "measured": lambda: lt.SoftFinetuning(task(toys.source_data())),
    "rounds": selective,
}


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_remember_the_targets_batch_when_its_loss_is_computed(kind):
    """D3."""
    module = Remembering()
    fit(module, [KINDS[kind]()])
    np.testing.assert_allclose([mean for mean, _ in module.used], expected(np.mean), rtol=1e-4)
    np.testing.assert_allclose([std for _, std in module.used], expected(lambda part: part.std(ddof=1)), rtol=1e-4)
    assert module.num_batches == 12


def test_a_datamodules_hooks_remember_the_targets_batch_too():
    """D3."""
    data, seen = RememberingData(), []

    class Looking(LitToy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(data.kept[0].item())
            return loss

    toys.trainer([soft(forward="joint")]).fit(Looking(), datamodule=data)
    np.testing.assert_allclose(seen, expected(np.mean)[::2], rtol=1e-4)


KEPT = {
    "permutation": lambda images, labels, order: order,
    "numpy": lambda images, labels, order: order.numpy(),
    "list": lambda images, labels, order: order.tolist(),
    "partners": lambda images, labels, order: (labels, labels[order], 0.3),
    "shares": lambda images, labels, order: torch.rand(len(images), 1, 1, 1),
    "soft labels": lambda images, labels, order: torch.eye(toys.SOURCE_CLASSES)[labels],
}


def keeping(keep):
    class Mixing(LitToy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            order = torch.arange(len(images)).flip(0)
            self.kept = keep(images, labels, order)
            return 0.7 * images + 0.3 * images[order], labels

    return Mixing()


@pytest.mark.parametrize("make", [soft, selective])
@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("kept", KEPT)
def test_mixup_that_the_source_loss_does_not_know_is_refused(kept, forward, make):
    """D3."""
    module = keeping(KEPT[kept])
    with pytest.raises(lt.TransferConfigError, match=r"set 'kept' to .*SourceTask\(batch_hooks=False\)"):
        fit(module, [make(forward=forward)])
    module = keeping(KEPT[kept])
    fit(module, [make(forward=forward, batch_hooks=False)])
    assert len(module.losses) == 12


def test_what_is_kept_of_a_batch_without_mixing_is_allowed():
    def keep(images, labels, order):
        return images, labels, labels[:2], len(images), [0.1] * len(images), images.mean((1, 2))[:, :, None].clone()

    module = keeping(keep)
    fit(module, [soft()])
    assert len(module.losses) == 12


PLAIN = """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.again = False

    def body(self, pixels):
        return F.relu(self.bn(self.conv(pixels))).mean((2, 3))

    def forward(self, pixels):
        return self.fc(checkpoint(self.body, pixels, use_reentrant=False) if self.again else self.body(pixels))


class Lit(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.save_hyperparameters()
        self.model = network

    def forward(self, pixels):
        return self.model(pixels)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""

ELSEWHERE = """
import sys

sys.modules["lightning_transfer"] = None
import torch
from plain_project import Lit

for path in sys.argv[1:]:
    checkpoint = torch.load(path, weights_only=False)
    network = checkpoint["hyper_parameters"]["network"]
    assert all(not layer._forward_pre_hooks and not layer._forward_hooks for layer in network.modules())
    assert all(not layer._forward_pre_hooks_with_kwargs for layer in network.modules())
    module = Lit.load_from_checkpoint(path, weights_only=False)
    module.model.again = True
    module(torch.rand(4, 3, 6, 6)).sum().backward()
    assert module.model.conv.weight.grad is not None
"""


@pytest.fixture
def plain_project(tmp_path, monkeypatch):
    (tmp_path / "plain_project.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("plain_project")
    del sys.modules["plain_project"]


def hooks_of(module):
    kinds = (*HOOKS, "_backward_hooks")
    return [[(kind, *getattr(layer, kind).items()) for kind in kinds] for layer in module.modules()]


class Saving(Callback):
    """Writes in the ways that there are, and sees that the hooks are back."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            before = hooks_of(module)
            trainer.save_checkpoint(self.folder / "all.ckpt")
            trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
            assert hooks_of(module) == before
            assert "lightning_transfer" in str(before)


@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance of `nn.Module`")
def test_a_checkpoint_that_holds_the_network_loads_without_the_package(plain_project, tmp_path):
    """S6."""
    written = []
    ways = {
        "separate": (lambda: soft(), []),
        "joint": (lambda: soft(forward="joint"), []),
        "selective": (selective, []),
        "async": (lambda: soft(), [AsyncCheckpointIO()]),
    }
    for name, (make, plugins) in ways.items():
        folder = tmp_path / name
        kept = ModelCheckpoint(folder, filename="kept", save_weights_only=name == "joint", every_n_train_steps=3)
        network = plain_project.Net()
        network.load_state_dict(toys.toy_net().state_dict())
        module = plain_project.Lit(network)
        callbacks = [make(), Saving(folder), kept]
        fit(module, callbacks, plugins=plugins, enable_checkpointing=True, max_steps=5)
        assert "lightning_transfer" not in str(hooks_of(module))
        written += [folder / "all.ckpt", folder / "weights.ckpt", folder / "kept.ckpt"]
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, written)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance of `nn.Module`")
def test_a_mixins_checkpoint_holds_the_network_without_hooks(tmp_path):
    """S6."""

    class Own(lt.SourceTaskMixin, LitToy):
        def __init__(self, network):
            super().__init__()
            self.save_hyperparameters()
            self.model = network
            self.add_source_task(task(toys.source_data()), weight=ALWAYS)

        def training_step(self, batch, batch_idx):
            return self.joint_loss(super().training_step(batch, batch_idx))

    module = Own(toys.toy_net())
    fit(module, [toys.SaveEveryStep(tmp_path)], max_steps=2)
    runner = fit(module, [toys.SaveEveryStep(tmp_path / "again")], max_steps=1)
    assert "lightning_transfer" in str(hooks_of(module))
    runner.fit_loop.epoch_loop.max_steps, runner.fit_loop.max_epochs = 2, 9
    runner.fit(Own(toys.toy_net()), toys.target_loader())  # another module
    for name in ("step=1", "step=2", "again/step=1", "again/step=2"):
        network = torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["hyper_parameters"]["network"]
        assert not any(hooks for layer in hooks_of(network) for _, *hooks in layer)
