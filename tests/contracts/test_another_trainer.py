"""A part is in the fit of one Trainer: what another one does with the module or the callback changes nothing of it."""

import copy
import functools
from contextlib import nullcontext
from itertools import product

import lightning.pytorch as L
import pytest
import torch

import lightning_transfer as lt
from tests import toys
from tests.contracts.test_trains import Noting
from tests.methods import SoftByHand, borrowed, each, one
from tests.toys import LitToy, assert_same, weights


@pytest.fixture(autouse=True)
def steps_that_do_not_log(monkeypatch):
    """As `self.log` asks `module.trainer`, which is the other one afterwards, and refuses then."""
    for cls, name in product((toys.ToySteps, SoftByHand), ("validation_step", "test_step")):
        monkeypatch.setattr(cls, name, lambda self, batch, batch_idx: self(batch[0]), raising=False)


class Aside(L.Callback):
    """Runs the module in another Trainer in the middle of a fit, and leaves weights and random state as they were.

    A user's manual optimization asks `module.trainer` for its optimizers, which is then the other one; as a user would,
    this module remembers the optimizer.
    """

    def __init__(self, run=None):
        self.run = run

    def aside(self, module):
        if self.run is not None:
            before, losses = copy.deepcopy(module.state_dict()), list(module.losses)
            modes = [(layer, layer.training) for layer in module.modules()]
            with torch.random.fork_rng():
                self.run(module)
            module.load_state_dict(before)
            module.losses = losses
            for layer, mode in modes:  # a validation that fails leaves the module as for evaluation
                layer.training = mode

    def on_fit_start(self, trainer, module):
        if not module.automatic_optimization:
            module.optimizers = lambda: trainer.strategy._lightning_optimizers[0]
        module.losses = getattr(module, "losses", [])
        self.aside(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.aside(module)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1 and trainer.state.fn == "fit":
            self.aside(module)


class Sharing(LitToy):
    """Validates by its training step."""

    def test_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


class Broken(L.Callback):
    def on_validation_start(self, *args):
        raise RuntimeError("aside")


def validate(module, *callbacks):
    toys.trainer(callbacks).validate(module, toys.target_loader(6), verbose=False)


def everything(module, *callbacks):
    validate(module, *callbacks)
    toys.trainer(callbacks).test(module, toys.target_loader(), verbose=False)
    toys.trainer(callbacks).predict(module, torch.utils.data.DataLoader(torch.zeros(4, 3, 6, 6)))
    with pytest.raises(RuntimeError, match="aside"):
        validate(module, *callbacks, Broken())


def fit_once(module, *callbacks):
    """A fit of a few steps without this package."""
    toys.trainer(callbacks, limit_train_batches=2, max_epochs=1).fit(module, toys.target_loader())


def outcome(module, callbacks, run):
    """What a fit with a run aside comes to: weights, the state of the part, and all that was logged."""
    torch.manual_seed(1)
    logger = Noting()
    runner = toys.trainer([Aside(run), *callbacks], logger=logger, log_every_n_steps=2)
    runner.fit(module, toys.target_loader(), toys.target_loader())
    part = {} if not callbacks else callbacks[0].part.get_extra_state()
    monitored = {name: float(value) for name, value in runner.callback_metrics.items() if "transfer" in name}
    state = {name: getattr(value, "tolist", value.__repr__)() for name, value in module.state_dict().items()}
    return state, repr(part), logger.noted, monitored


@functools.cache
def undisturbed(method):
    """The same of a fit with nothing aside."""
    return outcome(LitToy(), [method.callback()], None)


@each()
@pytest.mark.parametrize("run", [everything, fit_once], ids=["evaluations", "fit"])
def test_a_fit_goes_on_as_if_another_trainer_had_not_run_the_module(method, run):
    found, expected = (outcome(Sharing(), [method.callback()], aside) for aside in (run, None))
    assert found == expected


@pytest.mark.parametrize("run", [everything, fit_once], ids=["evaluations", "fit"])
def test_a_warm_up_lasts_as_many_epochs_as_its_own_trainer_counts(run):
    def gated():
        return lt.GatedTransfer(ratio=2, gate_dropout=0.0, dropout=0.0, warmup_epochs=1)

    assert outcome(LitToy(), [gated()], run) == outcome(LitToy(), [gated()], None)


@each()
def test_a_callback_that_another_trainer_is_given_too_stays_in_its_fit(method, tmp_path):
    """Its setup, teardown and on_exception there, with this module or a copy, are of no consequence here."""
    callback, path = method.callback(), tmp_path / "begin.ckpt"

    def run(module):
        if not path.exists():
            module.trainer.save_checkpoint(path)
        everything(module, callback)
        everything(LitToy(), callback)
        toys.trainer([callback]).validate(module, toys.target_loader(), ckpt_path=path, verbose=False)

    assert outcome(LitToy(), [callback], run) == undisturbed(method)


@each(has_mixin=True)
@pytest.mark.parametrize("is_automatic", [True, False])
def test_a_mixin_goes_by_the_trainer_that_fits_it(method, is_automatic):
    def made():
        module = method.mixin()
        if is_automatic and not module.automatic_optimization:
            module.automatic_optimization = True
            step = toys.ToySteps.training_step
            module.losses = []
            module.training_step = lambda batch, batch_idx: getattr(module, method.mixin_loss)(
                step(module, batch, batch_idx)
            )
        return module

    assert outcome(made(), [], everything) == outcome(made(), [], None)


@each()
@pytest.mark.parametrize("inner", ["the same", "its like", "another method's"])
def test_a_second_fit_inside_of_the_first_is_refused_by_name(method, inner):
    callback = method.callback()
    kinds = {"the same": lambda: callback, "its like": method.callback, "another method's": other_than(method).callback}

    def run(module):
        with pytest.raises(lt.TransferConfigError, match=f"{name} is in the middle of another Trainer's fit.*deepcopy"):
            fit_once(module, kinds[inner]())

    name = type(callback.make_part(copy.deepcopy(prepared(method)))).title
    assert outcome(LitToy(), [callback], run) == undisturbed(method)


def other_than(method):
    return one(changes_layers=True) if not method.changes_layers else one(has_source=True)


def prepared(method):
    """A module whose layers are changed."""
    module = LitToy()
    method.callback().change_layers(toys.trainer(), module)
    return module


@each()
def test_a_callback_in_the_fits_of_two_modules_at_once_is_refused_by_name(method):
    callback = method.callback()

    def run(module):
        with pytest.raises(
            lt.TransferConfigError, match=r"in the middle of another Trainer's fit.*another \w+\(\.\.\.\)"
        ):
            fit_once(LitToy(), callback)

    assert outcome(LitToy(), [callback], run) == undisturbed(method)


@each(has_mixin=True)
def test_a_mixins_module_in_two_fits_at_once_is_refused_by_name(method):
    def run(module):
        with pytest.raises(lt.TransferConfigError, match=r"is in the middle of another Trainer's fit.*deepcopy"):
            fit_once(module)

    assert outcome(method.mixin(), [], run) == outcome(method.mixin(), [], None)


@each()
@pytest.mark.filterwarnings("ignore")  # what is said of so short a fit
def test_a_copy_can_be_fitted_in_the_middle_of_a_fit(method):
    """As the refusals say, with callbacks of its own."""

    def run(module):
        fitted = module.trainer
        module.trainer = None  # a Trainer's loggers and loaders are not copied
        twin = copy.deepcopy(module)
        module.trainer = fitted
        fit_once(twin, method.always(lt.Schedule()))

    assert outcome(LitToy(), [method.callback()], run) == undisturbed(method)


@each()
def test_another_module_in_a_second_fit_gets_a_part_of_its_own(method):
    """The same Trainer, at a step where a run has begun: as with a callback that has seen no module."""
    found = []
    for second in (lambda first: first, lambda first: method.callback()):
        callback = method.callback()
        runner, module = toys.trainer([callback]), LitToy()
        runner.fit(LitToy(), toys.target_loader())
        runner.fit_loop.max_epochs = 3
        runner.callbacks[runner.callbacks.index(callback)] = callback = second(callback)
        runner.fit(module, toys.target_loader())
        found.append((weights(module), callback.part.get_extra_state()))
    assert_same(found[0][0], found[1][0])
    assert repr(found[0][1]) == repr(found[1][1])


@each()
def test_a_callback_goes_from_one_trainer_to_another(method):
    """Also to one that has trained something before, and back to the first module."""
    callback, module, fresh = method.callback(), LitToy(), LitToy()
    toys.fit(LitToy(), [callback])
    for one_run, trained in ((callback, module), (method.callback(), fresh)):
        runner = toys.trainer([])
        runner.fit(LitToy(), toys.target_loader())
        runner.fit_loop.max_epochs, runner.callbacks[:0] = 3, [one_run]
        runner.fit(trained, toys.target_loader())
    assert_same(weights(module), weights(fresh))


def selective(**options):
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    return lt.SelectiveJointFinetuning(source, neighbors=borrowed(**options), weight=lt.Schedule(1.0, 1.0))


def test_the_same_dataset_in_a_second_fit_is_known_without_a_look():
    """One with augmentation looks like another each time."""

    class Known(LitToy):
        data = toys.target_data()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.data, batch_size=4)

    runner, module = toys.trainer([callback := selective()]), Known()
    runner.fit(module)
    callback.part.chooser._made_of = "what no look would find again"
    runner.fit_loop.max_epochs = 3
    runner.fit(module)


def test_other_data_in_a_second_fit_is_refused_where_images_are_borrowed_for_the_first():
    runner, module = toys.trainer([callback := selective()]), LitToy()
    runner.fit(module, toys.target_loader())
    lists = callback.part.chooser.lists
    runner.fit_loop.max_epochs = 3
    runner.fit(module, toys.target_loader())  # another loader and dataset, the same images
    assert callback.part.chooser.lists is lists
    runner.fit_loop.max_epochs = 4
    with pytest.raises(lt.TransferConfigError, match=r"neighbors were selected with.*another Trainer"):
        runner.fit(module, torch.utils.data.DataLoader(toys.images(24, toys.TARGET_CLASSES, seed=8), batch_size=4))


@pytest.mark.parametrize("fold", [range(12), range(12, 24)], ids=["the same", "another"])
def test_a_reloaded_loader_with_other_images_is_refused_too(fold):
    """Before a round would score new images as old ones; folds of one dataset differ by what is drawn of it."""
    data = toys.target_data()

    class Folds(LitToy):
        def train_dataloader(self):
            sampler = torch.utils.data.SubsetRandomSampler(fold if self.current_epoch else range(12))
            return torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)

    runner = toys.trainer([selective(every=4)], reload_dataloaders_every_n_epochs=1)
    is_other = fold.start > 0
    with pytest.raises(lt.TransferConfigError, match="neighbors were selected with") if is_other else nullcontext():
        runner.fit(Folds())
    assert runner.global_step == (3 if is_other else 6)
