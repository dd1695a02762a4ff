"""Which trainings are begun, which candidates are dropped, and what a page then says: with made answers and a clock."""

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.advising.advise import outcome
from lightning_transfer.advising.candidates import Candidate, own
from lightning_transfer.advising.race import Race
from lightning_transfer.advising.trials import OutOfTimeError, Scored
from tests.advising.test_verdicts import answers

IMAGES = 40  # of a fold


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Made:
    """Trainings that take the time that they are said to take, and give the answers that they are said to give."""

    def __init__(self, clock, costs, shares, *, refused=(), diverging=(), error=0.0):
        self.clock, self.costs, self.shares, self.begun = clock, costs, shares, []
        self.refused, self.diverging = refused, diverging

    def __call__(self, candidate, fold):
        name = candidate.name
        self.begun.append((name, fold))
        if name in self.refused:
            raise lt.TransferConfigError("It is not for this. Pass another.")
        if name in self.diverging:
            raise FloatingPointError("The loss is nan.")
        self.clock.now += self.costs[name]
        found = {name: self._scored(name)}
        return found | ({"linear probe": self._scored("linear probe")} if name == "fine-tuning" else {})

    def _scored(self, name):
        return Scored(torch.arange(IMAGES) < round(self.shares[name] * IMAGES), self.costs.get(name, 0.1))


def race(minutes, costs, shares, *, rival=lambda name: Candidate(name, name, list), **options):
    clock = Clock()
    shares = {"fine-tuning": 0.5, "linear probe": 0.5, **shares}
    made = Made(clock, {"fine-tuning": 60.0, **costs}, shares, **options)
    rivals = [rival(name) for name in shares if name != "fine-tuning"]
    skipped = []
    found = Race(
        rivals,
        num_folds=5,
        train=made,
        groups=lambda fold: [(fold, place) for place in range(IMAGES)],
        clock=clock,
        deadline=60.0 * minutes,
        skip=skipped.append,
    )
    found.run()
    return found, made, {racer.candidate.name: racer for racer in found.rivals}, sum(skipped)


def test_with_time_enough_all_folds_are_run_cheap_ones_first():
    _, made, found, skipped = race(1e3, {"a": 90.0, "b": 30.0}, {"a": 0.5, "b": 0.5})
    assert made.begun[3:] == [(name, fold) for fold in range(1, 5) for name in ("fine-tuning", "b", "a")]
    assert {name: len(racer.found) for name, racer in found.items()} == {"linear probe": 5, "a": 5, "b": 5}
    assert skipped == 0


def test_a_users_own_candidate_is_begun_if_there_is_time_for_one_more_fine_tuning():
    """What it costs is not known, and what does not fit is stopped after a few steps."""
    mine = lambda name: Candidate(name, "", list) if name == "linear probe" else own({name: list})[0]  # noqa: E731
    for minutes, number in ((2.5, 1), (1.5, 0)):
        assert len(race(minutes, {"a": 66.0}, {"a": 0.5}, rival=mine)[2]["a"].found) == number


def test_what_is_clearly_worse_is_dropped_after_one_fold():
    ran, made, found, skipped = race(1e3, {"a": 60.0, "b": 60.0}, {"a": 0.05, "b": 0.5})
    assert [name for name, _ in made.begun].count("a") == 1
    assert [outcome(ran, found[name]).verdict for name in "ab"] == ["dropped", "not shown"]
    assert len(found["b"].found) == 5
    assert skipped == 4


def test_the_probe_is_scored_on_all_folds_since_it_is_paid_for():
    ran, _, found, skipped = race(1e3, {"a": 60.0}, {"a": 0.5, "linear probe": 0.05})
    assert len(found["linear probe"].found) == 5
    assert outcome(ran, found["linear probe"]).verdict == "shown worse"
    assert skipped == 0


def test_the_worse_half_is_dropped_if_there_is_not_time_for_all():
    costs = dict.fromkeys("abcd", 60.0)
    shares = {"a": 0.45, "b": 0.55, "c": 0.5, "d": 0.6}
    _, made, found, skipped = race(5 + 12, costs, shares)  # a round of all, and four of three
    assert {name: len(found[name].found) for name in "abcd"} == {"a": 1, "b": 5, "c": 1, "d": 5}
    assert skipped == 8
    assert made.clock.now == 17 * 60
    assert {name: len(race(5 + 8, costs, shares)[2][name].found) for name in "bd"} == {"b": 2, "d": 4}


@pytest.mark.parametrize("minutes", [2, 3, 3.5, 4, 6, 7.9, 8, 12, 30])
def test_the_budget_is_kept_if_trainings_take_as_long_as_they_took(minutes):
    costs = {"a": 60.0, "b": 110.0, "c": 120.0}  # twice fine-tuning's at most, as is expected of them
    _, made, _, _ = race(minutes, costs, dict.fromkeys("abc", 0.5))
    assert 60 < made.clock.now <= minutes * 60


def test_what_does_not_fit_is_said_not_to():
    _, _, found, _ = race(2, {"a": 60.0}, {"a": 0.5})
    assert (found["a"].found, found["a"].reason) == ({}, "no time was left for it")


def test_a_refusal_is_kept_in_its_first_sentence_and_the_rest_goes_on():
    ran, made, found, skipped = race(1e3, {"b": 60.0}, dict.fromkeys("abc", 0.5), refused="a", diverging="c")
    assert (found["a"].reason, found["a"].is_refused) == ("It is not for this", True)
    assert found["c"].reason == "The loss is nan"
    assert len(found["b"].found) == 5
    assert [name for name, _ in made.begun].count("a") == 1
    assert ran.difference(found["a"]) is None
    assert skipped == 10
    alone, _, mine, _ = race(1e3, {"b": 60.0}, {"b": 0.5})
    assert ran.difference(found["b"]) == alone.difference(mine["b"])  # what is refused is not compared


def test_fine_tuning_that_falls_far_short_of_the_probe_ends_the_race():
    ran, made, _, _ = race(1e3, {"a": 60.0}, {"a": 0.5, "linear probe": 1.0})
    assert ran.falls_short()
    assert made.begun == [("fine-tuning", 0)]
    assert not race(1e3, {"a": 60.0}, {"a": 0.5, "linear probe": 0.55})[0].falls_short()


def test_what_may_repair_fine_tuning_goes_on():
    may_repair = lambda name: Candidate(name, name, list, may_repair=name == "a")  # noqa: E731
    shares = {"a": 1.0, "b": 1.0, "linear probe": 1.0}
    ran, _, found, skipped = race(1e3, dict.fromkeys("ab", 60.0), shares, rival=may_repair)
    assert {name: len(racer.found) for name, racer in found.items()} == {"a": 5, "b": 0, "linear probe": 5}
    assert outcome(ran, found["a"]).verdict == "shown better"
    assert found["b"].reason == "it builds on fine-tuning, which falls short of the probe"
    assert skipped == 5


def test_what_does_not_fit_at_all_is_said_by_its_time():
    class Late(Made):
        def __call__(self, candidate, fold):
            raise OutOfTimeError(99.0)

    with pytest.raises(OutOfTimeError):
        Race([], num_folds=5, train=Late(Clock(), {}, {}), groups=lambda fold: [], clock=Clock(), deadline=60.0).run()


@pytest.mark.parametrize(("minutes", "equals"), [(18, 5), (1e3, 5), (1e3, 1)])
def test_of_races_between_equals_few_show_a_difference(minutes, equals):
    """As seeds make it: trainings differ by two points, parts have 20 images, and there is time for half of it or all.

    A share of 300 may be off by 1.3 points with one standard error.
    """
    random, shown, better, dropped = np.random.default_rng(0), 0, 0, 0
    names = ["linear probe", *"abcde"[:equals]]
    for _ in range(300):
        found, _ = answers(random, groups=20, size=1, folds=5, candidates=len(names), noise=0.02)
        rights, clock = dict(zip(["fine-tuning", *names], found, strict=True)), Clock()

        def train(candidate, fold, rights=rights, clock=clock):
            clock.now += 60.0
            both = ["fine-tuning", "linear probe"] if candidate.name == "fine-tuning" else [candidate.name]
            return {name: Scored(rights[name][fold], 60.0) for name in both}

        ran = Race(
            [Candidate(name, name, list) for name in names],
            num_folds=5,
            train=train,
            groups=lambda fold: [(fold, place) for place in range(20)],
            clock=clock,
            deadline=60.0 * minutes,
        )
        ran.run()
        verdicts = {outcome(ran, racer).verdict for racer in ran.rivals}
        shown += bool(verdicts & {"shown better", "shown worse"})
        better += "shown better" in verdicts
        dropped += any(racer.is_out for racer in ran.rivals)
    assert shown / 300 <= 0.05 + 2 * 0.0126
    assert better / 300 <= 0.05
    assert (dropped > 150) == (minutes == 18)
