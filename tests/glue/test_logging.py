"""What this package logs can be monitored as what `self.log` logs, and loggers get the options of a run."""

import csv

import lightning.pytorch as L
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_transfer as lt
from lightning_transfer.glue.logs import progress_of
from tests import toys
from tests.methods import each, one
from tests.toys import LitToy


class Seen(L.Callback):
    """What is there to be monitored when an epoch or a validation ends."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def on_validation_end(self, trainer, module):
        self.seen.append((trainer.global_step, float(trainer.callback_metrics[self.name])))

    def on_train_epoch_end(self, trainer, module):
        self.seen.append((trainer.global_step, float(trainer.callback_metrics[self.name])))


@each()
@pytest.mark.parametrize("every", [1, 50], ids=["logs each step", "logs none"])
def test_values_can_be_monitored_whatever_the_interval_of_the_loggers(method, every, tmp_path):
    """At the end of an epoch and of a validation in its middle they are those of the last step."""
    callback = method.callback()
    name = method.monitored
    saving = ModelCheckpoint(tmp_path, monitor=name, filename="{step}-{" + name + ":.3f}", save_top_k=-1)
    runner = toys.trainer(
        [callback, seen := Seen(name), saving],
        logger=(noting := Noting()),
        log_every_n_steps=every,
        enable_checkpointing=True,
        val_check_interval=3,
    )
    runner.fit(module := LitToy(), toys.target_loader(), toys.target_loader())
    assert [step for step, _ in seen.seen] == [3, 6, 6, 9, 12, 12]
    assert len({value for _, value in seen.seen}) > 1
    if method.has_source:
        assert [value for _, value in seen.seen] == pytest.approx([module.losses[step - 1] for step, _ in seen.seen])
    assert runner.progress_bar_metrics == {}
    assert noting.metrics.count(name) == 12 // every
    of_validations = [logged for logged in noting.metrics if "val_accuracy" in logged]
    assert len(of_validations) == (8 if name == "transfer/disagreement" else 0)
    saved = {float(path.stem.rpartition("=")[2]) for path in tmp_path.rglob("*.ckpt")}
    assert saved == {round(value, 3) for _, value in seen.seen}


def test_early_stopping_stops_by_a_value_of_ours():
    callback = one(has_source=True).always(lt.Schedule())
    runner = toys.trainer(
        [callback, EarlyStopping("transfer/source_weight", patience=1)], max_epochs=9, log_every_n_steps=50
    )
    runner.fit(LitToy(), toys.target_loader())
    assert runner.current_epoch == 6  # it falls to 0 in the fifth epoch, and the sixth brings nothing


class Keeping(LitToy):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()


class Noting(Logger):
    """What a logger is given; with metrics, as TensorBoard's takes them."""

    name, version = "noting", 0

    def __init__(self):
        super().__init__()
        self.given, self.metrics = [], []

    def log_metrics(self, metrics, step):
        self.metrics += metrics

    def log_hyperparams(self, params, metrics=None, step=None):
        self.given.append((dict(params), metrics))


@each()
@pytest.mark.parametrize("module", [LitToy, Keeping])
def test_loggers_get_the_options_beside_the_users_hyperparameters(method, module, tmp_path):
    callback = method.callback()
    loggers = [CSVLogger(tmp_path, name="", version=""), noting := Noting()]
    runner = toys.trainer([callback], logger=loggers)
    runner.fit(module(), toys.target_loader())
    prefix = f"transfer/{type(callback).__name__}/"
    written = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    theirs = {} if module is LitToy else {"width": 3}
    ours = {name: value for name, value in written.items() if name.startswith(prefix)}
    assert written == theirs | ours
    assert method.options.items() <= {name[len(prefix) :]: value for name, value in ours.items()}.items()
    assert noting.given == [(ours, {})] + ([(theirs, None)] if theirs else [])  # no second hp_metric of TensorBoard's
    assert "hp_metric" not in noting.metrics
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 12


@each(has_mixin=True)
def test_loggers_get_the_options_of_mixins_too(method):
    module = method.mixin()
    toys.trainer([], logger=(noting := Noting()), max_epochs=1).fit(module, toys.target_loader())
    mixin = method.callback().mixin
    expected = {f"transfer/{mixin}/{name}": value for name, value in method.mixin_options.items()}
    ((found, metrics),) = noting.given
    assert expected.items() <= found.items()
    assert metrics == {}


def test_a_trainer_that_logs_no_hyperparameters_logs_none_of_ours():
    runner = toys.trainer([one(has_source=True).callback()], logger=(noting := Noting()), enable_autolog_hparams=False)
    runner.fit(Keeping(), toys.target_loader())
    assert noting.given == []


def test_a_trainer_class_of_the_users_stops_like_lightnings():
    """Whatever its name: the namespace is that of a class of Lightning."""

    class Trainer(L.Trainer):
        pass

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer._signal_connector.received_sigterm = True
    with pytest.raises(SIGTERMException), progress_of(trainer)("work", 2) as step:
        step(1)
