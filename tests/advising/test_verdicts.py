"""Intervals and verdicts: against numpy and scipy, and by simulation of answers that do not differ."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_transfer.advising.verdicts import NOISE, Difference, difference, is_above, quantile


def answers(random, *, groups, size, folds, candidates, noise):
    """Right or wrong of fine-tuning and of candidates that are as good, whatever their seeds make of it.

    Images of a group are alike, and all candidates find the same images hard; each training is off by a share of its
    own. Two trainings differ by `noise`, beside what single images differ by.
    """
    belongs, found = [], [[] for _ in range(candidates + 1)]
    for fold in range(folds):
        of = np.repeat(np.arange(groups), size)
        belongs += [(fold, group) for group in of.tolist()]
        hard = random.normal(size=groups)[of] + random.normal(size=len(of))
        for mine in found:
            own = random.normal(size=groups)[of] + random.normal(size=len(of))
            level = stats.norm.ppf(0.7 + random.normal() * noise / math.sqrt(2)) * math.sqrt(4)
            mine.append(torch.from_numpy(hard + own < level))
    return found, belongs


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 100, 5000])
@pytest.mark.parametrize("share", [0.95, 0.99])
def test_quantiles_are_students(freedom, share):
    assert quantile(share, freedom) == pytest.approx(stats.t.ppf(0.5 + share / 2, freedom), rel=3e-3)


def test_a_difference_is_that_of_clustered_means():
    random = np.random.default_rng(0)
    mine, plain = (torch.from_numpy(random.random((3, 20)) < 0.7) for _ in range(2))
    groups = (np.arange(60) // 3).tolist()
    found = difference([*mine], [*plain], groups, among=4)
    apart = mine.double().numpy().ravel() - plain.double().numpy().ravel()
    sums = (apart - apart.mean()).reshape(20, 3).sum(1)
    variance = (sums**2).sum() * 20 / 19 / 60**2 + NOISE**2 / 3
    assert found.points == pytest.approx(100 * apart.mean())
    assert found.half == pytest.approx(100 * variance**0.5 * stats.t.ppf(1 - 0.05 / 4 / 2, 19), rel=3e-3)


@pytest.mark.parametrize("size", [1, 5])
def test_an_accuracy_is_above_a_share_if_its_clustered_interval_is(size):
    random, groups = np.random.default_rng(1), np.repeat(np.arange(100 // size), size)
    for _ in range(50):
        right = (random.random(100 // size) < 0.55)[groups if random.random() < 0.5 else groups[::-1]]
        sums = np.array([(right - right.mean())[groups == one].sum() for one in range(100 // size)])
        error = math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / 100
        least = right.mean() - stats.t.ppf(0.975, len(sums) - 1) * error
        assert is_above(torch.from_numpy(right).double(), least - 0.001, groups.tolist())
        assert not is_above(torch.from_numpy(right).double(), least + 0.001, groups.tolist())


def test_a_difference_that_never_varies_is_no_certainty():
    right = torch.ones(20, dtype=torch.bool)
    found = difference([right], [right], range(20), among=1)
    assert found.points == 0
    assert found.half == pytest.approx(100 * math.hypot(1 / 20, NOISE) * stats.t.ppf(0.975, 19), rel=3e-3)


def test_images_of_one_group_leave_it_open():
    right = torch.ones(20, dtype=torch.bool)
    found = difference([right], [~right], [7] * 20, among=1)
    assert (found.points, found.half, found.verdict) == (100.0, math.inf, "not shown")
    assert str(found) == "+100.0 +- not known"


@pytest.mark.parametrize(
    ("points", "half", "verdict"),
    [(2.0, 1.9, "shown better"), (2.0, 2.0, "not shown"), (-2.0, 2.1, "not shown"), (-2.0, 1.9, "shown worse")],
)
def test_verdicts(points, half, verdict):
    assert Difference(points, half).verdict == verdict


@pytest.mark.parametrize(
    "of",
    [
        {"groups": 20, "size": 1, "folds": 1},
        {"groups": 20, "size": 1, "folds": 5},
        {"groups": 100, "size": 1, "folds": 5},
        {"groups": 4, "size": 5, "folds": 5},
        {"groups": 1, "size": 10, "folds": 5},
    ],
    ids=str,
)
def test_of_pages_without_any_difference_few_show_one(of):
    """Intervals of one candidate hold in 95 %; of five, all hold together in 95 %: what is shown better is half of 5 %.

    A page of 300 may be off by 1.3 points with one standard error.
    """
    random = np.random.default_rng(0)
    alone = together = better = 0
    for _ in range(300):
        (plain, *others), groups = answers(random, **of, candidates=5, noise=NOISE)
        alone += difference(others[0], plain, groups, among=1).verdict != "not shown"
        verdicts = {difference(each, plain, groups, among=5).verdict for each in others}
        together += verdicts != {"not shown"}
        better += "shown better" in verdicts
    assert 0.01 < alone / 300 < 0.08
    assert together / 300 < 0.08
    assert better / 300 <= 0.05
