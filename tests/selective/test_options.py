"""What a user may ask of neighbors, and what is refused."""

import pytest

import lightning_transfer as lt
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.options import Neighbors
from tests import toys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0; it takes a whole number of at least 1"),
        ({"k": -3}, "k=-3"),
        ({"k": 2.0}, "k=2.0"),
        ({"k": True}, "k=True"),
        ({"k": "300"}, "k='300'"),
        ({"bins": 1}, "bins=1; it takes a whole number of at least 2"),
        ({"bins": 10.5}, "bins=10.5"),
        ({"rounds": -1}, "rounds=-1; it takes a whole number of at least 0"),
        ({"rounds": None}, "rounds=None"),
        ({"every": 0}, "every=0; it takes a whole number of at least 1"),
        ({"k": 10, "limit": 9}, "limit=9; it takes a whole number of at least 10"),
        ({"limit": 1.5}, "limit=1.5"),
        ({"min_per_class": -1}, "min_per_class=-1"),
        ({"hard_entropy": -1}, "hard_entropy=-1; it takes a finite number from 0"),
        ({"hard_entropy": float("nan")}, "hard_entropy=nan"),
        ({"hard_entropy": float("inf")}, "hard_entropy=inf"),
        ({"hard_entropy": None}, "hard_entropy=None"),
        ({"hard_entropy": True}, "hard_entropy=True"),
        ({"hard_entropy": "abc"}, """hard_entropy='abc'; write nats, such as 0.1, or a quantile, such as "75%"."""),
        ({"hard_entropy": "120%"}, "hard_entropy='120%'"),
        ({"hard_entropy": "-5%"}, "hard_entropy='-5%'"),
        ({"hard_entropy": "75"}, "hard_entropy='75'"),
        ({"hard_entropy": "%"}, "hard_entropy='%'"),
        ({"hard_entropy": "nan%"}, "hard_entropy='nan%'"),
        ({"bank": "gabour"}, r"bank='gabour' is not known. Write bank='gabor' or FilterBank.from_model\("),
        ({"bank": FilterBank}, "is not known"),
        ({"bank": None}, "bank=None is not known"),
        ({"search": "fast"}, "search='fast' is not known.*Known: 'exact', 'approximate'"),
        ({"search": "aproximate"}, "Did you mean 'approximate'"),
    ],
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        Neighbors(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"neighbors": 0}, "neighbors=0; it takes"), ({}, "neighbors=300, the default, exceeds the 20 source images")],
)
def test_a_number_of_neighbors_is_refused_by_the_callbacks_name(options, message):
    source = lt.SourceTask(toys.source_data(), num_classes=7)
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.SelectiveJointFinetuning(source, **options)


def test_a_misspelt_option_is_pythons_own_error():
    with pytest.raises(TypeError, match="neighbours"):
        Neighbors(neighbours=3)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1, "limit": 1},
        {"bins": 2},
        {"rounds": 0},
        {"every": 1},
        {"hard_entropy": 0},
        {"hard_entropy": 0.5},
        {"bank": FilterBank.gabor(orientations=2)},
        {"search": "approximate"},
    ],
)
def test_what_lies_at_the_ends_is_taken(options):
    assert all(getattr(Neighbors(**options), name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options", [{"every": 1}, {"hard_entropy": 0.2}, {"hard_entropy": "75%"}, {"limit": 600}, {"oversample_hard": True}]
)
def test_an_option_of_rounds_without_rounds_is_warned_of_by_name(options):
    with pytest.warns(lt.NoEffectWarning, match=f"rounds=0.*{next(iter(options))} changes nothing.*rounds=2"):
        Neighbors(rounds=0, **options)


def test_the_defaults_are_those_that_are_told():
    asked = Neighbors()
    assert (asked.k, asked.bank, asked.bins, asked.rounds, asked.every) == (300, "gabor", None, 2, None)
    assert (asked.hard_entropy, asked.limit, asked.min_per_class) == (0.1, None, 0)
    assert (asked.oversample_hard, asked.search) == (False, "exact")


@pytest.mark.parametrize(
    ("text", "share"), [("75%", 0.75), ("0%", 0.0), ("100%", 1.0), ("12.5%", 0.125), (0.1, None), (0, None)]
)
def test_a_quantile_is_a_share_and_nats_are_none(text, share):
    assert Neighbors(hard_entropy=text).quantile == share


@pytest.mark.parametrize(
    ("options", "num_images", "longest"),
    [
        ({"k": 10}, 1000, 50),
        ({"k": 10}, 50, 50),
        ({"k": 10}, 31, 31),
        ({"k": 10, "limit": 80}, 1000, 80),
        ({"k": 10, "limit": 10}, 1000, 10),
        ({"k": 10, "limit": 80}, 60, 60),
    ],
)
def test_the_longest_list_is_the_limit_or_five_k_and_never_above_the_source(options, num_images, longest):
    assert Neighbors(**options).longest(num_images) == longest
