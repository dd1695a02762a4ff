"""The names that other people's projects import."""

import doctest
import inspect

import pytest

import lightning_transfer as lt


def test_every_public_name_is_there():
    assert all(getattr(lt, name) is not None for name in lt.__all__)
    assert set(dir(lt)) == set(lt.__all__)
    for face in (lt.callbacks, lt.checkpoints, lt.mixins, lt.functional, lt.reports):
        assert all(getattr(face, name).__doc__ for name in face.__all__)


def test_every_public_name_has_an_example():
    """Which pytest runs, with all that docstrings hold."""
    faces = lt, lt.callbacks, lt.checkpoints, lt.functional, lt.metrics, lt.mixins, lt.nn, lt.reports
    named = {f"{face.__name__}.{name}": getattr(face, name) for face in faces for name in face.__all__}
    things = {name: thing for name, thing in named.items() if inspect.isclass(thing) or inspect.isfunction(thing)}
    assert len(things) > 60
    assert [name for name, it in things.items() if not doctest.DocTestParser().get_examples(it.__doc__)] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SoftFinetunning'"):
        _ = lt.SoftFinetunning
