"""The names that other people's projects import."""

import pytest

import lightning_transfer as lt


def test_every_public_name_is_there():
    assert all(getattr(lt, name) is not None for name in lt.__all__)
    assert set(dir(lt)) == set(lt.__all__)
    for face in (lt.callbacks, lt.checkpoints, lt.mixins, lt.functional, lt.reports):
        assert all(getattr(face, name).__doc__ for name in face.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SoftFinetunning'"):
        _ = lt.SoftFinetunning
