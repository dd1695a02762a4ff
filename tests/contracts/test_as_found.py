"""After a fit, a crash or Ctrl-C, the user's module is as it was found."""

import copy
import multiprocessing
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests import toys
from tests.methods import METHODS, chosen, each
from tests.toys import LitToy, fit, trainer

each_method = each()
each_sourced = each(has_source=True)


def anatomy(module):
    """Everything of a module that a callback could leave something in."""
    return {
        "attributes": set(vars(module)) - {"_hparams", "_fit"},  # _fit: which Trainer a mixin was in, as _trainer
        "step": module.training_step.__func__,
        "modules": [(name, type(child)) for name, child in module.named_modules()],
        "parameters": [(name, parameter.requires_grad) for name, parameter in module.named_parameters()],
        "hooks": [
            (name, len(child._forward_pre_hooks), len(child._forward_hooks), len(child._load_state_dict_post_hooks))
            for name, child in module.named_modules()
        ],
        "batchnorm": [getattr(child, "track_running_stats", None) for child in module.modules()],
        "state": list(module.state_dict()),
    }


class Failing(LitToy):
    error: type[BaseException] = RuntimeError

    def on_train_batch_end(self, outputs, batch, batch_idx):
        raise self.error("in the middle")


class FailingInside(LitToy):
    """Fails in the source images' own pass, when the hooks of that pass are set."""

    def forward(self, pixels):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            raise RuntimeError("in the middle")
        return super().forward(pixels)


class Interrupted(Failing):
    error = KeyboardInterrupt


@each_method
def test_after_fit_validate_test_and_a_second_fit(method):
    module = LitToy()
    before = anatomy(module)
    runner = trainer([method.callback()])
    for _ in range(2):
        runner.fit(module, toys.target_loader())
        assert method.changes_layers or anatomy(module) == before
        runner.fit_loop.max_epochs += 2
    runner.validate(module, toys.target_loader(), verbose=False)
    runner.test(module, toys.target_loader(), verbose=False)
    runner.predict(module, torch.utils.data.DataLoader(torch.zeros(4, 3, 6, 6), batch_size=2))
    method.plain(module)
    assert anatomy(module) == before


@each(has_mixin=True)
def test_a_mixins_module_after_fit_a_crash_ctrl_c_and_sigterm(method):
    ends = [nullcontext(), pytest.raises(RuntimeError), pytest.raises(SystemExit), pytest.raises(SIGTERMException)]
    for number, end in enumerate(ends):
        module = method.mixin()

        class Ending(type(module)):
            number = 0

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if self.number == 1:
                    raise RuntimeError("in the middle")
                if self.number:
                    os.kill(os.getpid(), [signal.SIGINT, signal.SIGTERM][self.number - 2])
                super().on_train_batch_end(outputs, batch, batch_idx)

        module.__class__, module.number = Ending, number
        before = anatomy(module)
        with end:
            fit(module)
        assert anatomy(module) == before


@each_sourced
def test_a_second_fit_of_the_same_trainer_goes_on(method):
    """The source head and the stream are the run's: two fits of two epochs end where one of four does."""
    long, short = LitToy(), LitToy()
    whole = method.callback()
    fit(long, [whole], max_epochs=4)
    parts = method.callback()
    runner = trainer([parts])
    runner.fit(short, toys.target_loader())
    position = parts.part.get_extra_state()["position"]
    runner.fit_loop.max_epochs = 4
    runner.fit(short, toys.target_loader())
    assert parts.part.get_extra_state()["position"] == position == whole.part.get_extra_state()["position"]


@each_method
def test_a_new_trainer_starts_anew(method):
    """A callback used again in another run must not carry the first run's source head over."""
    callback = method.callback()
    first, second = LitToy(), LitToy()
    fit(first, [callback])
    fit(second, [callback])
    assert first.losses == second.losses


WITH_WORKERS = [(method, 2) for method in chosen(has_source=True, is_joint=False)]  # only these have a second loader


@pytest.mark.parametrize(("method", "workers"), [*((method, 0) for method in METHODS), *WITH_WORKERS], ids=str)
@pytest.mark.parametrize("failing", [Failing, FailingInside, Interrupted])
def test_after_a_crash(method, failing, workers):
    module = failing()
    before = anatomy(module)
    with pytest.raises((RuntimeError, SystemExit)) as caught:
        fit(module, [method.callback(num_workers=workers)])
    caught.value.__traceback__ = None
    del caught
    vars(module).pop("calls", None)
    method.plain(module)
    assert anatomy(module) == before
    assert multiprocessing.active_children() == []


@each_method
def test_a_copy_made_in_mid_fit_is_the_users_own(method):
    class Copying(LitToy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            trainer, self.trainer = self.trainer, None
            copies.append(copy.deepcopy(self))
            self.trainer = trainer

    copies = []
    fit(Copying(), [method.callback()], max_epochs=1)
    twin = copies[0]
    method.plain(twin)
    assert twin.training_step.__self__ is twin
    assert twin.training_step.__func__ is LitToy.training_step
    assert list(twin.state_dict()) == list(LitToy().state_dict())


@each_method
def test_a_compiled_modules_own_step_comes_back(method):
    """torch.compile puts a step on the instance; that one must come back, not the class'."""
    module = LitToy()
    own = module.training_step
    module.training_step = own
    fit(module, [method.callback()], max_epochs=1)
    assert vars(module)["training_step"] is own
