"""Bad input and bad luck: a clear error that names what was found, nothing lost, nothing silent."""

import contextlib
import os
import signal
from functools import cache

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

import lightning_transfer as lt
from tests import toys
from tests.contracts.test_as_found import anatomy
from tests.methods import METHODS, each, one
from tests.toys import LitToy, SaveEveryStep, assert_same, fit, weights

each_method, each_sourced = each(), each(has_source=True)
SOFT = one(has_source=True)


@each_method
def test_sigterm_stops_cleanly(method):
    class Terminated(LitToy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)

    module = Terminated()
    before = anatomy(module)
    with pytest.raises(L.utilities.exceptions.SIGTERMException):
        fit(module, [method.callback(num_workers=1)])
    method.plain(module)
    assert anatomy(module) == before


@each_sourced
def test_a_nan_pixel_stops_in_front_of_the_optimizer_and_is_named(method, tmp_path):
    data = toys.source_data()
    data.tensors[0][13] = torch.nan
    module = LitToy()
    with pytest.raises(FloatingPointError, match=r"source loss is nan in step \d: pixels of source samples \[13\]"):
        fit(module, [method.callback(data), SaveEveryStep(tmp_path)])
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert_same(weights(module.model.conv), weights(LitToy.load_from_checkpoint(last).model.conv))


@each(has_source=False, adds_loss=True, of_weights=False)
def test_a_nan_pixel_of_the_target_stops_before_the_optimizer_and_the_term_is_named(method, tmp_path):
    """Where a term is taken of the target's images."""
    data = toys.target_data()
    data.tensors[0][13] = torch.nan
    module = LitToy()
    with pytest.raises(FloatingPointError, match=r"^The .* is nan in step 3"):
        fit(module, [method.callback(), SaveEveryStep(tmp_path)], loader=torch.utils.data.DataLoader(data, 4))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert not (tmp_path / "step=4.ckpt").exists()
    trained = [name for name, _ in module.named_parameters() if name in saved]
    assert len(trained) > 3
    assert_same({name: weights(module)[name] for name in trained}, {name: saved[name] for name in trained})


@each_sourced
def test_an_exploded_source_loss_names_the_samples(method):
    def exploding(logits, labels):
        return F.cross_entropy(logits, labels) / 0

    with pytest.raises(FloatingPointError, match=r"source loss is inf in step 0: source samples \[.*finite pixels"):
        fit(LitToy(), [method.callback(loss=exploding)])


@each_sourced
def test_a_loss_that_is_no_mean_is_refused(method):
    with pytest.raises(lt.TransferConfigError, match=r"source loss has shape \(4,\); expected a scalar"):
        fit(LitToy(), [method.callback(loss=nn.CrossEntropyLoss(reduction="none"))])


@each_method
def test_a_step_that_the_gradient_scaler_skips_is_not_called_nan(method):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = LitToy()
    fit(module, [method.callback()], plugins=[plugin])
    assert scaler.get_scale() < 2.0**120, "no step overflowed: the test tests nothing"
    assert len(module.losses) == 12


@each_method
def test_manual_optimization_is_refused_with_the_mixins_name(method):
    module = LitToy()
    module.automatic_optimization = False
    use = f"lightning_transfer.{method.callback().mixin}" if method.has_mixin else "automatic optimization"
    with pytest.raises(lt.TransferConfigError, match=f"Use {use}"):
        fit(module, [method.callback()])
    assert not method.has_mixin or hasattr(lt, method.callback().mixin)


@each_method
def test_lbfgs_is_refused(method):
    class Closure(LitToy):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(lt.TransferConfigError, match="LBFGS runs the training step several times"):
        fit(Closure(), [method.callback()])


@each_method
def test_training_without_an_optimizer_is_refused(method):
    class Without(LitToy):
        def configure_optimizers(self):
            return None

    with pytest.raises(lt.TransferConfigError, match="no optimizer"):
        fit(Without(), [method.callback()])


@each_sourced
def test_training_only_the_head_is_said_to_have_no_effect(method):
    class HeadOnly(LitToy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.fc.parameters(), lr=0.1)

    with pytest.warns(lt.NoEffectWarning, match="No parameter before the head is trained"):
        fit(HeadOnly(), [method.callback()])


def test_mixin_names_the_line_for_parameters_that_nobody_trains():
    class Forgetful(type(SOFT.mixin())):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    module = Forgetful(SOFT.callback().source, weight=lt.Schedule(until_steps=5))
    with pytest.raises(lt.TransferConfigError, match=r"\*self\.source_task\.parameters\(\)"):
        fit(module)


@each_sourced
def test_training_without_an_end_asks_for_steps(method):
    callback = lt.SoftFinetuning(method.callback().source)
    with pytest.raises(lt.TransferConfigError, match="length of training is not known.*until_steps"):
        fit(LitToy(), [callback], max_epochs=-1)
    module = LitToy()
    runner = toys.trainer([method.callback(), StopAt(8)], max_epochs=-1)
    runner.fit(module, toys.target_loader())
    assert len(module.losses) == 8


def test_an_accumulation_that_changes_asks_for_steps():
    """Lightning takes that of the current epoch for all: the weight would jump when it changes."""
    source = SOFT.callback().source
    with pytest.raises(lt.TransferConfigError, match="GradientAccumulationScheduler.*until_steps"):
        fit(LitToy(), [lt.SoftFinetuning(source, weight=lt.Schedule()), GradientAccumulationScheduler({1: 2})])
    for weight, factors, options in (
        (lt.Schedule(until_steps=5), {1: 2}, {}),
        (lt.Schedule(), {0: 2}, {}),
        (lt.Schedule(), {1: 2}, {"max_steps": 8, "max_epochs": -1}),
    ):
        fit(LitToy(), [lt.SoftFinetuning(source, weight=weight), GradientAccumulationScheduler(factors)], **options)


def test_a_loader_of_another_length_in_each_epoch_does_not_raise_the_weight():
    class Growing(LitToy):
        def train_dataloader(self):
            return toys.target_loader(batch_size=6 // (self.current_epoch + 1))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(float(self.trainer.callback_metrics["transfer/source_weight"]))

    seen, source = [], lt.SourceTask(toys.source_data(), num_classes=7)
    runner = toys.trainer([lt.SoftFinetuning(source, weight=lt.Schedule())], reload_dataloaders_every_n_epochs=1)
    runner.fit(Growing())
    assert seen[:4] == pytest.approx([1 - step / (4 * runner.max_epochs / 2) for step in range(4)])
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 4 * runner.max_epochs


class StopAt(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


@each_sourced
def test_a_schedule_that_ends_after_training_is_refused(method):
    callback = lt.SoftFinetuning(method.callback().source, weight=lt.Schedule(until_steps=13))
    with pytest.raises(lt.TransferConfigError, match="until_steps=13 is after the end of training, at 12 steps"):
        fit(LitToy(), [callback])


def test_mixin_refuses_what_the_callback_refuses():
    def automatic(optimizer=torch.optim.SGD, **options):
        class Automatic(type(SOFT.mixin())):
            def training_step(self, batch, batch_idx):
                return self.joint_loss(F.cross_entropy(self(batch[0]), batch[1]))

            def configure_optimizers(self):
                return optimizer(self.parameters(), lr=0.1)

        module = Automatic(SOFT.callback().source, **options)
        module.automatic_optimization = True
        return module

    with pytest.raises(lt.TransferConfigError, match="until_steps=13 is after the end of training, at 12"):
        fit(automatic(weight=lt.Schedule(until_steps=13)))
    with pytest.raises(lt.TransferConfigError, match="LBFGS"):
        fit(automatic(torch.optim.LBFGS))


def test_mixin_in_manual_optimization_asks_for_steps():
    module = type(SOFT.mixin())(SOFT.callback().source, weight=lt.Schedule())
    with pytest.raises(lt.TransferConfigError, match="manual optimization.*until_steps"):
        fit(module)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.2, 0.1], total_steps=13),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 0.8**n]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda n: 0.9, lambda n: 0.8]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


class Scheduled(LitToy):
    """Notes the learning rates of every step under one of the schedulers."""

    def __init__(self, name):
        super().__init__()
        self.name, self.rates = name, []

    def configure_optimizers(self):
        groups = [{"params": self.model.conv.parameters()}, {"params": self.model.fc.parameters(), "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = {"scheduler": SCHEDULERS[self.name](optimizer), "interval": "step"}
        if self.name == "ReduceLROnPlateau":
            scheduler["monitor"] = "loss"
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])


@cache
def rates(name, method=None):
    module = Scheduled(name)
    fit(module, [method.callback()] if method else [], max_epochs=1)
    return module.rates


# every scheduler with parameters of a source, of layers and of networks; other methods are given theirs in the same way
SCHEDULED = [
    (name, method)
    for name in SCHEDULERS
    for method in METHODS
    if method.name in ("soft-separate-add", "gated", "collaborative") or name in ("OneCycleLR", "LambdaLR")
]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own, in older torch
@pytest.mark.parametrize(("name", "method"), SCHEDULED, ids=str)
def test_every_scheduler_gives_the_rates_of_a_run_without_us(name, method):
    assert len(rates(name)) == 6
    assert rates(name, method) == rates(name)


def soft(dataset, **options):
    source = lt.SourceTask(dataset, **{"num_classes": 7, "batch_size": 4, **options})
    return lt.SoftFinetuning(source, weight=lt.Schedule())


def dataset(images, labels=None):
    """A plain list is a dataset too."""
    return [(image, index % 7 if labels is None else labels[index]) for index, image in enumerate(images)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            dataset([torch.rand(3, 6, 6)] * 5 + [torch.rand(3, 6, 7)] * 5),
            r"do not fit .*sample \d+ is .*\(3, 6, [67]\)",
        ),
        (dataset(torch.rand(10, 1, 6, 6)), r"separate pass of images, torch.float32 \(4, 1, 6, 6\)"),
        (
            dataset(torch.zeros(10, 3, 6, 6, dtype=torch.uint8)),
            r"torch.uint8 \(4, 3, 6, 6\). Give the source dataset your transform",
        ),
        (dataset(["path.png"] * 10), r"A source batch is \[\(str, str, str, str\), Tensor\(4,\)\]"),
        ([{"image": torch.rand(3, 6, 6), "label": 1}] * 9, r"'image': Tensor\(4, 3, 6, 6\).*adapt="),
        (dataset(torch.rand(10, 3, 6, 6), [0, 1, 2, 7, 3] * 2), r"Source sample [38] has label 7; .*0 to 6"),
        (dataset(torch.rand(10, 3, 6, 6), [-100] * 10), "has label -100"),
        (dataset(torch.rand(10, 3, 6, 6), [0.5] * 10), "type torch.float64; cross_entropy takes class indices"),
        (dataset(torch.rand(10, 3, 6, 6), torch.eye(7).repeat(2, 1)[:10]), "One-hot labels"),
        (dataset(torch.rand(10, 3, 6, 6), [True] * 10), "type torch.bool"),
    ],
    ids=["sizes", "grey", "uint8", "paths", "dict", "out-of-range", "ignored", "float", "one-hot", "bool"],
)
def test_source_samples_that_do_not_fit_are_named(data, message):
    with pytest.raises(Exception, match="(?s)" + message) as caught:
        fit(LitToy(), [soft(data)])
    del caught


def test_a_failing_sample_is_named_by_its_index():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("cannot identify image file")

    with pytest.raises(OSError, match="(?s)cannot identify.*while loading source sample"):
        fit(LitToy(), [soft(Broken([0] * 9))])


def test_pixels_that_nobody_normalised_are_pointed_out():
    with pytest.warns(UserWarning, match="Source pixels reach 255"):
        fit(LitToy(), [soft(dataset(torch.full((9, 3, 6, 6), 255.0)))], max_steps=1)


def test_raw_pixels_on_both_sides_are_the_modules_to_normalise():
    class Normalising(LitToy):
        def forward(self, pixels):
            return super().forward(pixels / 255)

    loader = torch.utils.data.DataLoader(dataset(torch.full((8, 3, 6, 6), 250.0), [0, 1, 2, 3] * 2), batch_size=4)
    fit(Normalising(), [soft(dataset(torch.full((9, 3, 6, 6), 255.0)))], loader=loader, max_steps=1)


@pytest.mark.parametrize("largest", [3, 4])
def test_a_target_head_that_was_not_replaced_is_warned_of_if_the_classes_are_others(largest):
    module, images = LitToy(), torch.rand(8, 3, 6, 6)
    callback = lt.SoftFinetuning(lt.SourceTask(dataset(images, [0, 1, 2, 3] * 2), head=module.model.fc), weight=0.5)
    target = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, largest] * 2))
    loader = torch.utils.data.DataLoader(target, batch_size=4)
    wrong = pytest.warns(UserWarning, match="'model.fc' is the kept source head of 5 classes too.*run to 3")
    with wrong if largest == 3 else contextlib.nullcontext():
        fit(module, [callback], loader=loader, max_steps=1)


def test_labels_in_another_order_than_the_heads_are_pointed_out():
    images, labels = toys.source_data().tensors
    shifted = torch.utils.data.TensorDataset(images, (labels + 3) % 7)
    with pytest.warns(UserWarning, match="does not seem to be trained"):
        fit(LitToy(), [SOFT.callback(shifted)])


def test_labels_are_checked_at_setup_where_the_dataset_lists_them():
    images, labels = toys.source_data().tensors
    labels[17] = 9
    with pytest.raises(lt.TransferConfigError, match="Source sample 17 has label 9"):
        SOFT.callback(torch.utils.data.TensorDataset(images, labels)).make_part(LitToy())


def test_another_loss_takes_other_labels_and_is_not_compared_with_guessing_classes(caplog):
    images, labels = toys.source_data().tensors
    data = torch.utils.data.TensorDataset(images, F.one_hot(labels, 7).float())
    module = LitToy()
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(module, [SOFT.callback(data, loss=F.binary_cross_entropy_with_logits)])
    assert len(module.losses) == 12
    assert "Source loss at step 0: " in caplog.text
    assert "guessing" not in caplog.text


def test_batches_larger_than_the_source_draw_it_again():
    callback = soft(dataset(torch.randn(3, 3, 6, 6)), batch_size=8)
    fit(LitToy(), [callback])
    assert callback.part.get_extra_state()["position"] == 6 * 8


def test_a_source_head_of_another_width_is_refused():
    callback = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), head=nn.Linear(9, 7)))
    with pytest.raises(
        lt.TransferConfigError, match=r"source head takes 9 features, the target head 'model.fc' takes 8"
    ):
        fit(LitToy(), [callback])


def test_hooks_that_do_not_know_source_batches_are_pointed_out():
    class DictOnly(LitToy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch if self.trainer.global_step < 0 else (batch["image"], batch["label"])

    loader = torch.utils.data.DataLoader([{"image": image, "label": label} for image, label in toys.target_data()], 4)
    with pytest.raises(TypeError, match=r"(?s)SourceTask\(adapt=.*SourceTask\(batch_hooks=False\)"):
        fit(DictOnly(), [SOFT.callback()], loader=loader)
    module = DictOnly()
    fit(module, [SOFT.callback(batch_hooks=False)], loader=loader)
    assert len(module.losses) == 12


class Unsized(toys.StatefulLoader):
    def __init__(self):
        super().__init__()
        self.batch_size = None


def test_a_train_loader_without_a_batch_size_asks_for_one():
    callback = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), head=toys.source_head()), weight=lt.Schedule())
    with pytest.raises(lt.TransferConfigError, match=r"does not report a batch size. Pass SourceTask\(batch_size="):
        fit(LitToy(), [callback], loader=Unsized())


def test_batch_size_is_the_targets_by_default():
    callback = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), head=toys.source_head()))
    fit(LitToy(), [callback], loader=toys.target_loader(6), max_steps=1)
    assert callback.part.get_extra_state()["position"] == 6


@each_method
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused_by_name(method, strategy):
    bases = (L.strategies.DDPStrategy,) if strategy == "DeepSpeedStrategy" else (L.strategies.ParallelStrategy,)
    runner = toys.trainer()
    runner.strategy.__class__ = type(strategy, bases, {})
    with pytest.raises(lt.TransferConfigError, match=f"{strategy} is not supported.*strategy='ddp'"):
        method.callback().setup(runner, LitToy(), "fit")
