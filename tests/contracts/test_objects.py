"""Callbacks pickle, copy and show themselves; and no method is missing from SOURCED."""

import copy
import pickle

import pytest

import lightning_transfer as lt
from lightning_transfer.glue.base import TransferCallback
from tests.methods import METHODS, SOURCED
from tests.toys import LitToy, assert_same, fit, weights


@pytest.mark.parametrize("method", METHODS, ids=str)
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
    if method in SOURCED:
        assert_same(weights(clone(callback).part.head), weights(callback.part.head))


@pytest.mark.parametrize("method", SOURCED, ids=str)
def test_repr_names_what_decides(method):
    shown = repr(method.callback())
    assert "20 images of TensorDataset" in shown
    assert "until_steps=5" in shown


def test_no_method_is_missing_from_the_table():
    listed = {type(method.callback()) for method in METHODS}
    public = {getattr(lt.callbacks, name) for name in lt.callbacks.__all__}
    assert listed == public
    assert all(issubclass(callback, TransferCallback) for callback in public)
    bases = {base for method in METHODS for base in type(method.mixin()).__mro__}
    assert {getattr(lt.mixins, name) for name in lt.mixins.__all__} <= bases
