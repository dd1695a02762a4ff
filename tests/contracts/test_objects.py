"""Callbacks pickle, copy and show themselves; and no method is missing from METHODS."""

import ast
import copy
import pathlib
import pickle

import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.source.term import SourceTerm
from tests import methods, toys
from tests.methods import METHODS, each
from tests.toys import LitToy, assert_same, fit, weights


@each()
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_clone_does_the_same(method, clone):
    first, second = LitToy(), LitToy()
    callback = method.callback()
    twin = clone(callback)
    fit(first, [callback])
    fit(second, [twin])
    assert_same(weights(second), weights(first))
    if method.has_source:
        assert_same(weights(clone(callback).part.head), weights(callback.part.head))


@each(has_source=True)
def test_repr_names_what_decides(method):
    shown = repr(method.callback())
    assert "20 images of TensorDataset" in shown
    assert "until_steps=5" in shown


def test_no_method_is_missing_from_the_table():
    listed = {type(method.callback()) for method in METHODS if method.has_mixin}  # the examples have none
    in_tests_probe = {lt.ProbeStart, lt.FrozenStatistics}
    public = {getattr(lt.callbacks, name) for name in lt.callbacks.__all__} - in_tests_probe
    assert listed == public
    assert all(issubclass(callback, TransferCallback) for callback in public)
    bases = {base for method in METHODS if method.has_mixin for base in type(method.mixin()).__mro__}
    assert {getattr(lt.mixins, name) for name in lt.mixins.__all__} <= bases


@each()
def test_a_row_has_the_flags_of_what_it_is(method):
    """So that a new method is in every test that it could fail."""

    class Seeing(LitToy):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.model.bn.weight *= 1.5  # what holds on to the toy's own weights has lost some already

        def on_before_backward(self, loss):
            backward.append(loss.item())

    backward, callback, module = [], method.callback(), Seeing()
    fit(module, [callback])
    assert method.has_source == isinstance(callback.part, SourceTerm)
    assert method.is_joint == (method.has_source and callback.source.forward == "joint")
    assert method.changes_layers == (module.state_dict().keys() != LitToy().state_dict().keys())
    assert method.adds_loss == (backward[0] != module.losses[0])
    assert method.tolerance == 0 or method.changes_layers
    term = backward[0] - module.losses[0]
    backward.clear()
    fit(other := Seeing(), [method.callback()], loader=toys.target_loader(6))
    same_term = backward[0] - other.losses[0] == pytest.approx(term, abs=1e-6)
    assert method.of_weights == (method.adds_loss and not method.has_source and same_term)


def test_contracts_take_their_methods_from_the_table_alone():
    """A list of some methods would not see a new one: rows are chosen by flags, which every row has to set."""
    for path in pathlib.Path(__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "tests.methods"
            for alias in node.names
        }
        lists = {name for name, value in vars(methods).items() if isinstance(value, list | tuple)}
        assert imported & lists <= {"METHODS"}, f"{path.name} takes methods from another list"
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            named = {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
            assert "method" not in named, f"{path.name}:{call.lineno} lists methods by itself; write @each(flag=True)"
