"""One object stands in for the step: any number of terms, in and out in any order, never a stale wrapper."""

import copy
import inspect
import pickle

import pytest
import torch

from lightning_transfer.glue.dispatcher import StepDispatcher
from tests.toys import LitToy

BATCH = (torch.ones(2, 3, 6, 6).double(), torch.tensor([0, 1]))


class Plus:
    def __init__(self, amount, log):
        self.amount, self.log = amount, log

    def begin(self, module):
        self.log.append(("begin", self.amount))

    def add_to(self, module, loss):
        self.log.append(("add", self.amount))
        return loss + self.amount


def test_terms_add_up_and_leave_in_any_order():
    module, log = LitToy().double(), []
    plain = module.training_step(BATCH, 0).item()
    StepDispatcher.add(module, "one", Plus(1, log))
    StepDispatcher.add(module, "ten", Plus(10, log))
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 11, abs=1e-12)
    assert log == [("begin", 1), ("begin", 10), ("add", 1), ("add", 10)]
    StepDispatcher.remove(module, "one")
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 10, abs=1e-12)
    StepDispatcher.add(module, "ten", Plus(20, log))
    assert module.training_step(BATCH, 0).item() == pytest.approx(plain + 20, abs=1e-12)
    StepDispatcher.remove(module, "ten")
    StepDispatcher.remove(module, "ten")
    assert "training_step" not in vars(module)


def test_a_dictionary_is_copied_not_changed():
    class DictStep(LitToy):
        def training_step(self, batch, batch_idx):
            self.output = {"loss": super().training_step(batch, batch_idx), "extra": 1}
            return self.output

    module = DictStep().double()
    StepDispatcher.add(module, "one", Plus(1, []))
    found = module.training_step(BATCH, 0)
    assert found["loss"] == module.output["loss"] + 1
    assert found["extra"] == 1


def test_the_signature_is_the_users():
    class OneArgument(LitToy):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module = OneArgument()
    before = inspect.signature(module.training_step)
    StepDispatcher.add(module, "one", Plus(1, []))
    assert inspect.signature(module.training_step) == before


def test_copies_get_the_users_own_step_bound_to_them():
    for clone in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        module = LitToy()
        StepDispatcher.add(module, "one", Plus(1, []))
        twin = clone(module)
        assert twin.training_step.__self__ is twin
        assert twin.training_step.__func__ is LitToy.training_step
