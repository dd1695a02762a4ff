"""One object stands in for the step: any number of terms, in and out in any order, never a stale wrapper."""

import copy
import functools
import inspect
import pickle
from collections import UserDict

import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_transfer.glue.dispatcher import StepDispatcher
from lightning_transfer.glue.standin import Afterwards
from tests.toys import LitToy

BATCH = (torch.ones(2, 3, 6, 6).double(), torch.tensor([0, 1]))


class Running:
    """What of a Trainer the dispatcher asks for."""

    def __init__(self, training=True):
        self.training = training


TRAINS, VALIDATES = Running(), Running(training=False)


def in_training(module, trainer=TRAINS):
    module.trainer = trainer
    return module.double()


class Plus:
    def __init__(self, amount, log):
        self.amount, self.log = amount, log

    def begin(self, module, batch):
        self.log.append(("begin", self.amount))

    def add_to(self, module, loss):
        self.log.append(("add", self.amount))
        return loss + self.amount

    def stepped(self, loss):
        pass

    def end(self):
        self.log.append(("end", self.amount))


def test_terms_add_up_and_leave_in_any_order():
    module, log = in_training(LitToy()), []
    plain = module.training_step(BATCH, 0).item()
    dispatcher = StepDispatcher.add(module, "one", Plus(1, log), TRAINS)
    assert StepDispatcher.add(module, "ten", Plus(10, log), TRAINS) is dispatcher
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 11, abs=1e-12)
    assert log == [("begin", 1), ("begin", 10), ("add", 1), ("add", 10), ("end", 1), ("end", 10)]
    dispatcher.discard("one")
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 10, abs=1e-12)
    StepDispatcher.add(module, "ten", Plus(20, log), TRAINS)
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 20, abs=1e-12)
    dispatcher.discard("ten")
    dispatcher.discard("ten")
    assert "training_step" not in vars(module)


def test_a_dictionary_is_copied_not_changed():
    class DictStep(LitToy):
        def training_step(self, batch, batch_idx):
            self.output = {"loss": super().training_step(batch, batch_idx), "extra": 1}
            return self.output

    module = in_training(DictStep())
    StepDispatcher.add(module, "one", Plus(1, []), TRAINS)
    found = module.training_step(BATCH, 0)
    assert found["loss"] == module.output["loss"] + 1
    assert found["extra"] == 1


def test_any_mapping_with_a_loss_will_do():
    class MappingStep(LitToy):
        def training_step(self, batch, batch_idx):
            return UserDict(loss=super().training_step(batch, batch_idx))

    module = in_training(MappingStep())
    plain = module.training_step(BATCH, 0)["loss"]
    StepDispatcher.add(module, "one", Plus(1, []), TRAINS)
    assert module.training_step(BATCH, 0)["loss"] == plain + 1


def test_outside_of_training_the_step_is_the_users():
    module, log = in_training(LitToy(), VALIDATES), []
    plain = module.training_step(BATCH, 0)
    StepDispatcher.add(module, "one", Plus(1, log), VALIDATES)
    assert module.training_step(BATCH, 0) == plain
    assert log == []


def test_terms_end_when_a_step_fails_or_gives_none():
    class Failing(LitToy):
        def training_step(self, batch, batch_idx):
            if batch is None:
                return
            raise RuntimeError("in the middle")

    module, log = in_training(Failing()), []
    StepDispatcher.add(module, "one", Plus(1, log), TRAINS)
    assert module.training_step(None, 0) is None
    with pytest.raises(RuntimeError):
        module.training_step(BATCH, 0)
    assert log == [("begin", 1), ("end", 1)] * 2


def test_the_signature_is_the_users():
    class OneArgument(LitToy):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module = OneArgument()
    before = inspect.signature(module.training_step)
    StepDispatcher.add(module, "one", Plus(1, []), TRAINS)
    assert inspect.signature(module.training_step) == before


def test_copies_get_the_users_own_step_bound_to_them():
    for clone in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        module = LitToy()
        StepDispatcher.add(module, "one", Plus(1, []), TRAINS)
        twin = clone(module)
        assert twin.training_step.__self__ is twin
        assert twin.training_step.__func__ is LitToy.training_step


def test_a_step_without_a_loss_is_handed_back_as_it_is():
    class NoLoss(LitToy):
        def training_step(self, batch, batch_idx):
            return {"loss": None, "extra": 1}

    module = in_training(NoLoss())
    StepDispatcher.add(module, "one", Plus(1, []), TRAINS)
    assert module.training_step(BATCH, 0) == {"loss": None, "extra": 1}


@pytest.mark.parametrize("wraps", [True, False])
def test_under_somebody_elses_wrapper_ours_falls_silent(wraps):
    """Theirs stays, as they put it there; ours adds nothing any more, and does not come back with what they restore."""
    module, log = in_training(LitToy()), []
    plain = module.training_step(BATCH, 0)
    dispatcher = StepDispatcher.add(module, "one", Plus(1, log), TRAINS)
    ours = module.training_step

    def theirs(batch, batch_idx):
        return ours(batch, batch_idx)

    module.training_step = functools.wraps(ours)(theirs) if wraps else theirs
    assert is_overridden("training_step", module)
    dispatcher.discard("one")
    log.clear()
    assert module.training_step(BATCH, 0) == plain
    module.training_step = ours  # what they found, put back
    assert module.training_step(BATCH, 0) == plain
    assert log == []
    assert StepDispatcher.add(module, "two", Plus(2, log), TRAINS) is not dispatcher


def test_stand_ins_leave_in_any_order():
    module, seen = LitToy(), []
    for first in (0, 1):
        stand_ins = [Afterwards(module, "configure_optimizers", TRAINS, seen.append) for _ in range(2)]
        module.configure_optimizers()
        assert len(seen) == 2
        stand_ins[first].remove()
        module.configure_optimizers()
        assert len(seen) == 3
        stand_ins[1 - first].remove()
        assert "configure_optimizers" not in vars(module)
        seen.clear()
