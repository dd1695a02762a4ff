"""Batches and labels of any form are read right or refused with what was found, and can always be named."""

import contextlib
import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import lightning_transfer as lt
from lightning_transfer.batches import find_labels
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.naming import nesting
from tests import toys

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
OTHER = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = st.sampled_from(WHOLE + OTHER)


@dataclasses.dataclass
class Sample:
    image: object
    label: object


Pair = namedtuple("Pair", ["image", "label"])


class Odd:
    """Cannot be shown, compared or measured."""

    def __repr__(self):
        raise RuntimeError("not to be shown")

    __str__ = __len__ = __eq__ = __repr__
    __hash__ = object.__hash__


def empty(dtype, shape):
    return torch.zeros(shape, dtype=dtype)


LEAVES = st.one_of(
    st.builds(empty, DTYPES, st.lists(st.integers(0, 4), max_size=4)),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.builds(lambda shape: np.zeros(shape), st.lists(st.integers(0, 3), max_size=3)),
    st.builds(Odd),
    st.builds(set),
    st.just(torch.zeros(2, device="meta")),
    st.just(torch.zeros(2).to_sparse()),
)
KEYS = st.sampled_from(["image", "label", "labels", "target", "x", 0, 1, None, ("a", 1)])


def nested(inner):
    return st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=6).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
        st.builds(Sample, inner, inner),
        st.builds(Pair, inner, inner),
    )


BATCHES = st.recursive(LEAVES, nested, max_leaves=12)


@given(BATCHES)
def test_every_structure_has_a_name(batch):
    shown = nesting(batch)
    assert isinstance(shown, str)
    assert shown
    if isinstance(batch, Tensor):
        assert str(tuple(batch.shape)) in shown


@given(BATCHES)
def test_a_source_batch_is_read_or_refused_with_its_structure(batch):
    task = lt.SourceTask(toys.source_data(), num_classes=7)
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if is_pair:
        images, labels = task.unpack(batch)
        assert images is batch[0]
        assert labels is batch[1]
    else:
        with pytest.raises(lt.TransferConfigError) as refused:
            task.unpack(batch)
        assert nesting(batch) in str(refused.value)
        assert "adapt=" in str(refused.value)


@given(BATCHES)
@example((torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, dtype=torch.uint8)))  # a batch without images
def test_labels_are_found_or_refused(batch):
    with contextlib.suppress(lt.TransferConfigError):
        found = find_labels(batch)
        assert isinstance(found, Tensor)
        assert found.ndim == 1
        assert not found.is_floating_point()


@given(
    DTYPES,
    st.sampled_from([(), (0,), (1,), (5,), (5, 1), (1, 5), (5, 7), (5, 7, 1)]),
    st.integers(2, 8),
    st.integers(0, 2**32),
    st.sampled_from([(0, 2), (0, 7), (-100, 1), (-1, 8), (0, 127)]),
)
@example(torch.uint8, (0,), 2, 0, (0, 2))  # a batch without images
def test_labels_that_pass_are_class_numbers_that_a_loss_takes(dtype, shape, num_classes, seed, span):
    values = np.random.default_rng(seed).integers(*span, size=shape)
    labels = torch.from_numpy(np.asarray(values)).to(dtype)
    indices = torch.arange(100, 100 + labels.numel())
    task = lt.SourceTask(toys.source_data(), num_classes=num_classes)
    types = [*WHOLE, torch.bool] if num_classes == 2 else WHOLE
    is_right = dtype in types and (labels.ndim == 1 or labels.shape[1:] == (1,))
    values = labels.numpy().astype(np.int64).reshape(-1) if is_right else None
    if not is_right:
        with pytest.raises(lt.TransferConfigError, match="Source labels have shape"):
            task.check_labels(labels, num_classes, indices)
    elif ((values < 0) | (values >= num_classes)).any():
        place = int(((values < 0) | (values >= num_classes)).argmax())
        with pytest.raises(lt.TransferConfigError, match=f"Source sample {100 + place} has label {values[place]};"):
            task.check_labels(labels, num_classes, indices)
    else:
        found = task.check_labels(labels, num_classes, indices)
        assert found.tolist() == values.tolist()
        if len(labels):
            assert F.cross_entropy(torch.zeros(len(labels), num_classes), found).isfinite()


KINDS = {"bool": 1, "uint8": 255, "float16": 1, "float32": 1, "float64": 1}  # and what white is


def as_picture(values, is_tensor, white):
    """(channels, height, width) without transparency in float64; None where it cannot be an image."""
    if values.ndim == 2:
        values = values[None] if is_tensor else values[:, :, None]
    if values.ndim != 3:
        return None
    places = (0, 2) if is_tensor else (2, 0)  # where channels are looked for first
    place = next((place for place in places if values.shape[place] in (1, 2, 3, 4)), None)
    if place is None:
        return None
    channels = np.moveaxis(values, place, 0).astype(np.float64) / white
    channels = channels[: 3 if len(channels) > 2 else 1]
    return channels if np.isfinite(channels).all() else None


@given(
    st.sampled_from([*KINDS]),
    st.booleans(),
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(0, 2**32),
    st.sampled_from([None, np.nan, np.inf]),
    st.one_of(st.none(), st.integers(-200, 200), st.floats(), st.text(max_size=2), st.lists(st.integers(), max_size=2)),
    st.sampled_from([lambda it: it, np.array, lambda it: torch.tensor(it) if isinstance(it, int) else it]),
)
def test_a_picture_is_read_right_or_says_why(kind, is_tensor, shape, seed, spoiled, label, form):
    random = np.random.default_rng(seed)
    values = np.asarray(random.integers(0, 256, shape) if kind == "uint8" else 4 * random.random(shape) - 2)
    if spoiled is not None and kind.startswith("float") and values.size:
        values.reshape(-1)[random.integers(values.size)] = spoiled
    values = values.astype(kind)
    image = torch.from_numpy(values) if is_tensor else values
    before = values.copy()
    found = Pictures([(image, form(label))], "source").read(0, seed=0)
    expected = as_picture(values, is_tensor, KINDS[kind])
    if expected is None:
        assert isinstance(found.pixels, str)
        return
    assert found.pixels.dtype == torch.float32
    assert found.pixels.is_contiguous()
    np.testing.assert_array_equal(found.pixels.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(values, before)
    assert found.label == (max(label, -1) if isinstance(label, int) and form(label) is not None else -1)
