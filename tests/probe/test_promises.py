"""What a run keeps with a head that starts as a probe: resume, random state, crashes, processes, surroundings."""

import copy
import os
import pickle
import random
import signal
import types

import lightning.pytorch as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from tests import processes, toys
from tests.contracts.test_as_found import anatomy
from tests.methods import each
from tests.probe import ranks_run
from tests.toys import LitToy, PlToy, SaveEveryStep, assert_same, fit, weights

HEAD = ("model.fc.weight", "model.fc.bias")


class Stateful(DataLoader):
    """Goes on in mid-epoch after a resume, and shows its dataset, as torchdata's loader does."""

    next = start = 0

    def __iter__(self):
        self.next, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number == self.next:
                self.next += 1
                yield batch

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"] % len(self)


@each(changes_layers=True)
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_alone_with_a_checkpoint_of_changed_layers_it_names_the_callback_and_the_fix(method, stage, tmp_path):
    fit(LitToy(), [method.callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    module, start = LitToy(), lt.ProbeStart()
    runner, found, name = toys.trainer([start]), anatomy(module), type(method.callback()).__name__
    with pytest.raises(lt.TransferConfigError, match=f"changed by {name}, .*lightning_transfer.load_from_checkpoint"):
        getattr(runner, stage)(module, toys.target_loader(), ckpt_path=tmp_path / "step=6.ckpt")
    assert anatomy(module) == found
    fit(module, [start])
    assert anatomy(module) == found
    assert pickle.loads(pickle.dumps(start)).head == "auto"


def stateful(data=None):
    return Stateful(toys.target_data() if data is None else data, batch_size=4)


def test_resumed_after_every_step_it_is_the_uninterrupted_run_and_does_not_look_again(tmp_path):
    whole = LitToy()
    fit(whole, [lt.ProbeStart(), SaveEveryStep(tmp_path)], loader=stateful())
    for cut in range(1, 12):
        module, unread = LitToy(), toys.Recorder(toys.target_data())
        start, path = lt.ProbeStart(unaugmented=unread), tmp_path / f"step={cut}.ckpt"
        fit(module, [start], loader=stateful(), ckpt_path=path)
        assert_same(weights(module), weights(whole))
        assert unread.loaded == []


def test_a_checkpoint_before_the_first_optimizer_step_is_not_started_again(tmp_path):
    """BatchNorm has moved by then, and the probe would be another one."""

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"batch={batch_idx}.ckpt")

    fit(LitToy(), [lt.ProbeStart(), Saving()], loader=stateful(), accumulate_grad_batches=3, max_epochs=1)
    unread = toys.Recorder(toys.target_data())
    fit(LitToy(), [lt.ProbeStart(unaugmented=unread)], loader=stateful(), ckpt_path=tmp_path / "batch=0.ckpt")
    assert unread.loaded == []


def killed(folder):
    class Dying(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    fit(LitToy(), [lt.ProbeStart(), SaveEveryStep(folder), Dying()], loader=stateful())


def test_kill_nine_and_resume(tmp_path):
    assert processes.run(killed, tmp_path)[0].code == -signal.SIGKILL
    whole, module = LitToy(), LitToy()
    fit(whole, [lt.ProbeStart()], loader=stateful())
    fit(module, [lt.ProbeStart()], loader=stateful(), ckpt_path=tmp_path / "step=3.ckpt")
    assert_same(weights(module), weights(whole))


def test_training_draws_what_it_would_have_drawn():
    """Shuffled, with dropout and augmentation by every generator; only the head's first weights are others."""

    class Random(LitToy):
        def on_train_start(self):
            self.states = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
            self.batches = []

        def on_train_batch_start(self, batch, batch_idx):
            self.batches.append(batch[0].clone())

    def run(callbacks, workers):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        data, module = Noisy(toys.target_data()), Random()
        fit(module, callbacks, loader=DataLoader(data, batch_size=4, shuffle=True, num_workers=workers))
        return module

    for workers in (0, 1):
        plain, module = run([], workers), run([lt.ProbeStart()], workers)
        assert module.states == plain.states
        assert len(plain.batches) == 12
        assert all(map(torch.equal, module.batches, plain.batches))
        assert module.losses != plain.losses


class Noisy(toys.Augmented):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], index % toys.TARGET_CLASSES


class Failing(toys.Recorder):
    def __init__(self, error):
        super().__init__(toys.target_data())
        self.error = error

    def __getitem__(self, index):
        if index == 13:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [RuntimeError("unreadable"), KeyboardInterrupt()], ids=repr)
def test_interrupted_in_the_middle_of_the_look_the_module_is_as_found(error):
    module = LitToy()
    before, found = weights(module), anatomy(module)
    with pytest.raises((RuntimeError, SystemExit)) as caught:
        fit(module, [lt.ProbeStart(unaugmented=Failing(error))])
    if isinstance(error, RuntimeError):
        assert any("ProbeStart looked at the training images" in note for note in caught.value.__notes__)
    assert_same(weights(module), before)
    assert anatomy(module) == found
    assert all(child.training for child in module.modules())


def test_a_second_fit_of_the_same_trainer_goes_on_and_a_new_trainer_starts_anew():
    unaugmented, module = toys.Recorder(toys.target_data()), LitToy()
    start = lt.ProbeStart(unaugmented=unaugmented)
    runner = fit(module, [start], max_epochs=1)
    runner.validate(module, toys.target_loader(), verbose=False)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, toys.target_loader())
    assert len(unaugmented.loaded) == 24
    fit(module, [start], max_epochs=1)
    assert len(unaugmented.loaded) == 48


def test_another_module_in_a_second_fit_of_the_trainer_starts_as_its_own_probe():
    start, other = lt.ProbeStart(), LitToy()
    runner = fit(LitToy(), [start], max_epochs=1)
    before = other.model.fc.weight.clone()
    runner.fit_loop.max_epochs = 2
    starts = []
    other.on_train_batch_start = lambda *_: starts.append(other.model.fc.weight.detach().clone())
    runner.fit(other, toys.target_loader())
    assert not torch.equal(starts[0], before)


@pytest.mark.parametrize("steps", [3, 12])
def test_a_loss_that_rises_far_above_chance_in_the_first_steps_is_warned_of(steps):
    class Steep(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (1e3 if self.global_step == 1 else 0.0)

    with pytest.warns(UserWarning, match=r"After ProbeStart the loss rose to 1\S*e\+03.*chance is 1\.6\. .*Lower the"):
        fit(Steep(), [lt.ProbeStart()], max_steps=steps)


@pytest.mark.parametrize("parts", [1, 4, 6])
def test_the_loss_is_watched_as_the_module_gave_it_if_gradients_are_accumulated(parts):
    class Steep(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (50.0 if self.global_step == 1 else 0.0)

    with pytest.warns(UserWarning, match=r"After ProbeStart the loss rose to 5\d\S* within 10 steps"):
        fit(Steep(), [lt.ProbeStart()], max_steps=2, accumulate_grad_batches=parts)


def test_a_loss_that_rises_later_is_not_watched():
    class Steep(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (50.0 if self.global_step > 10 else 0.0)

    fit(Steep(), [lt.ProbeStart()], max_steps=14)  # warnings are errors


def test_a_manual_step_that_gives_a_loss_for_each_image_is_watched_by_its_mean():
    class ByHand(LitToy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx) + torch.tensor([0.0, 1e3])}

    with pytest.warns(UserWarning, match=r"After ProbeStart the loss rose to 50\d"):
        fit(ByHand(), [lt.ProbeStart()], max_epochs=1)


@pytest.fixture(scope="module")
def ranks():
    ends = processes.run(ranks_run.results, num_ranks=2)
    assert [end.code for end in ends] == [0, 0]
    return [end.found for end in ends]


@pytest.mark.filterwarnings("ignore:After ProbeStart the")  # of random networks, far apart
@pytest.mark.parametrize("run", ["alone", "gated", "several", "shares"])
def test_two_ranks_start_as_one_process_does_and_stay_equal(ranks, run):
    first, second = (rank[run] for rank in ranks)
    assert_same(first["start"], second["start"])
    assert_same(first["end"], second["end"])
    alone = ranks_run.run(run, 1)
    assert_same(first["start"], alone["start"])
    head = ranks_run.run(run, 1, is_probed=False)["start"]
    heads = {name for name, value in head.items() if not torch.equal(value, first["start"][name])}
    assert heads
    assert all(".fc." in name for name in heads)


def test_runs_the_same_in_pytorch_lightning_and_for_a_copy():
    results = []
    for module, namespace, clone in (
        (LitToy(), L, lambda callback: callback),
        (PlToy(), pl, copy.deepcopy),
        (LitToy(), L, lambda callback: pickle.loads(pickle.dumps(callback))),
    ):
        fit(module, [clone(lt.ProbeStart(head="model.fc"))], namespace=namespace)
        results.append(weights(module))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_in_every_precision_the_probe_is_the_same_as_far_as_that_goes(precision):
    expected, module = Started(), Started()
    fit(expected, [lt.ProbeStart()], max_epochs=1)
    fit(module, [lt.ProbeStart()], max_epochs=1, precision=precision)
    for name in HEAD:
        close = 1e-4 if "bf16" not in precision else 0.15 * expected.start[name].abs().max().item()
        assert_same({name: module.start[name]}, {name: expected.start[name]}, tolerance=close)


class Started(LitToy):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0 and self.trainer.current_epoch == 0:
            self.start = weights(self)


@pytest.mark.filterwarnings("ignore:The head 'model.fc' .* start holds a copy")  # of the finder's trial steps
@pytest.mark.parametrize("order", [1, -1])
def test_beside_lightnings_rate_finder_and_weight_averaging(order):
    """The finder's trial steps begin without it, and the run then with it; an average begins at it."""
    plain, module = Started(), Started()
    fit(plain, [lt.ProbeStart()], max_epochs=1)
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    module.lr = 0.1
    fit(module, [lt.ProbeStart(), finder][::order], max_epochs=1, enable_checkpointing=True)
    assert_same(module.start, plain.start)
    if not hasattr(L.callbacks, "WeightAveraging"):
        return  # newer than the oldest Lightning
    averaged = Started()
    averaging = L.callbacks.WeightAveraging(avg_fn=lambda average, now, number: average)  # stays where it began
    fit(averaged, [lt.ProbeStart(), averaging][::order], max_epochs=1)
    assert_same(averaged.start, plain.start)
    assert (averaged.model.fc.weight - plain.start["model.fc.weight"]).abs().max() < 1


def test_options_reach_the_loggers_and_are_shown(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(LitToy(), [lt.ProbeStart(head="model.fc")], logger=logger, max_epochs=1)
    assert logger.experiment.hparams["transfer/ProbeStart/head"] == "model.fc"
    assert repr(lt.ProbeStart(forward=len)) == "ProbeStart(head='auto', forward=<built-in function len>)"


def test_sharded_strategies_are_refused():
    runner = types.SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(lt.TransferConfigError, match="FSDPStrategy is not supported"):
        lt.ProbeStart().setup(runner, LitToy(), "fit")


class Normalized(LitToy):
    """Its step changes images, or labels, before the network takes them."""

    def __init__(self, images=lambda images: images, labels=lambda labels: labels, *, in_forward=False):
        super().__init__()
        self.images, self.labels, self.in_forward = images, labels, in_forward

    def forward(self, images):
        return self.model(self.images(images) if self.in_forward else images)

    def training_step(self, batch, batch_idx):
        images = batch[0] if self.in_forward else self.images(batch[0])
        return torch.nn.functional.cross_entropy(self(images), self.labels(batch[1]))


def of_timm(images):
    return (images - 0.45) / 0.225


@pytest.mark.parametrize("images", [of_timm, lambda images: images / 255, lambda images: images * 255])
def test_images_that_the_step_changes_are_warned_of(images):
    with pytest.warns(UserWarning, match=r"ProbeStart: training_step changes images before .*ProbeStart\(forward="):
        fit(Normalized(images), [lt.ProbeStart(), lt.FrozenStatistics()], loader=positive())


def test_a_step_by_hand_that_returns_no_loss_is_warned_of_once():
    class ByHand(Normalized):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    with pytest.warns(UserWarning, match="ProbeStart: training_step changes images") as said:
        fit(ByHand(of_timm), [lt.ProbeStart(), lt.FrozenStatistics()], loader=positive(), max_steps=3)
    assert len([each for each in said if "changes images" in str(each.message)]) == 1


def positive():
    images, labels = toys.target_data().tensors
    return DataLoader(TensorDataset(images.sigmoid(), labels), batch_size=4)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: Normalized(of_timm, in_forward=True), {}),
        (lambda: Normalized(of_timm), {"forward": lambda module, images: module(of_timm(images))}),
        (lambda: Normalized(lambda images: 0.5 * images + 0.5 * images.flip(0)), {}),  # as MixUp
        (lambda: Normalized(lambda images: images.flip(3)), {}),
    ],
    ids=["in forward", "said", "mixed", "flipped"],
)
@pytest.mark.filterwarnings("ignore:After ProbeStart the")
def test_images_that_are_augmented_or_changed_in_forward_are_not_warned_of(module, options):
    fit(module(), [lt.ProbeStart(**options), lt.FrozenStatistics()], loader=positive())  # warnings are errors


def separable():
    """Images whose classes differ in brightness, and a network whose features are the brightness of each channel."""
    labels = torch.arange(24) % 3
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images + 4 * torch.eye(3)[labels][:, :, None, None], labels), batch_size=8)


class Plain(Normalized):
    def __init__(self, **options):
        super().__init__(**options)
        pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        self.model = torch.nn.Sequential(*pool, torch.nn.Linear(3, 3))


def test_a_first_loss_above_chance_is_warned_of_and_one_at_chance_is_not():
    fit(Plain(), [lt.ProbeStart()], loader=separable(), max_steps=12)
    with pytest.warns(UserWarning, match=r"After ProbeStart the first loss is \d\S*; chance is 1\.1\. .*labels first"):
        fit(Plain(labels=lambda labels: (labels + 1) % 3), [lt.ProbeStart()], loader=separable(), max_steps=12)
