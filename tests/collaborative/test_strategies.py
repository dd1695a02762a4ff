"""Swarm and Parzen estimators, asked and told."""

import json

import numpy as np
import pytest

import lightning_transfer as lt
from lightning_transfer.methods.collaborative.search.strategies import STRATEGIES, Swarm

MOST = [48, 16, 3]
each_strategy = pytest.mark.parametrize("name", list(STRATEGIES))


def fitness(layers):
    """Best at (30, 5, 1)."""
    return -sum(((number - best) / most) ** 2 for number, best, most in zip(layers, (30, 5, 1), MOST, strict=True))


def made(name, **options):
    return STRATEGIES[name](MOST, **{"particles": 10, "iterations": 5, "seed": 0, **options})


def asked(strategy, number, score=fitness):
    found = []
    for _ in range(number):
        found.append(strategy.ask())
        strategy.tell(score(found[-1]))
    return found


@each_strategy
def test_candidates_are_whole_numbers_within_bounds(name):
    for layers in asked(made(name), 60):
        assert all(type(number) is int and 0 <= number <= most for number, most in zip(layers, MOST, strict=True))


@each_strategy
def test_the_same_seed_asks_the_same_and_another_asks_other(name):
    assert asked(made(name), 60) == asked(made(name), 60)
    assert asked(made(name), 60) != asked(made(name, seed=1), 60)


@each_strategy
@pytest.mark.parametrize("cut", [1, 9, 10, 11, 37])
def test_an_interrupted_search_proposes_the_same_candidates(name, cut):
    """What is known goes through a file, and is told to a strategy that begins anew."""
    whole, first = asked(made(name), 60), asked(made(name), cut)
    known = {tuple(layers): score for layers, score in json.loads(json.dumps([(f, fitness(f)) for f in first]))}
    assert asked(made(name), 60, lambda layers: known.get(layers, fitness(layers))) == whole


def test_inertia_is_the_authors():
    np.testing.assert_allclose(Swarm(MOST).inertia, [1.40, 1.26, 1.12, 0.98, 0.84], rtol=1e-12)


def by_hand(score, seed):
    """The swarm particle by particle and number by number, with the same random numbers; positions of every round."""
    random = np.random.default_rng(seed)
    places = random.uniform(0, MOST, (10, 3)).tolist()
    speeds = random.uniform(-5, 5, (10, 3)).tolist()
    best, best_score = [list(place) for place in places], [-np.inf] * 10
    rounds = []
    for inertia in (1.40, 1.26, 1.12, 0.98, 0.84, 0):
        rounds.append([tuple(int(number) for number in place) for place in places])
        for number, place in enumerate(places):
            if score(rounds[-1][number]) > best_score[number]:
                best_score[number], best[number] = score(rounds[-1][number]), list(place)
        leader = best[best_score.index(max(best_score))]
        pulls = [1.5 * random.random((10, 3)) for _ in range(2)]
        for n in range(10):
            for d in range(3):
                speed = inertia * speeds[n][d] + pulls[0][n][d] * (best[n][d] - places[n][d])
                speed += pulls[1][n][d] * (leader[d] - places[n][d])
                speeds[n][d] = min(max(speed, -5), 5)
                places[n][d] = min(max(places[n][d] + speeds[n][d], 0), MOST[d])
    return rounds


@pytest.mark.parametrize("seed", range(3))
def test_the_swarm_flies_as_the_formula_says(seed):
    found = asked(made("swarm", seed=seed), 60)
    assert [found[start : start + 10] for start in range(0, 60, 10)] == by_hand(fitness, seed)


def test_positions_and_velocities_stay_in_bounds_and_the_best_never_falls():
    swarm, best = made("swarm"), []
    for _ in range(60):
        layers = swarm.ask()
        swarm.tell(fitness(layers))
        best.append(swarm.own_fitness.max())
        assert (swarm.positions >= 0).all()
        assert (swarm.positions <= MOST).all()
        assert (np.abs(swarm.velocities) <= 5).all()
    assert best == sorted(best)
    assert best[-1] == max(fitness(layers) for layers in asked(made("swarm"), 60))


@each_strategy
def test_candidates_that_fail_are_the_worst_and_the_search_goes_on(name):
    found = asked(made(name), 60, lambda layers: -np.inf if layers[0] % 2 else fitness(layers))
    assert len(set(found)) > 10
    assert asked(made(name), 20, lambda layers: -np.inf)


@each_strategy
def test_a_network_of_one_convolution_has_nothing_to_freeze(name):
    assert set(asked(STRATEGIES[name]([0], particles=2, iterations=1, seed=0), 4, sum)) == {(0,)}


def test_optuna_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(lt.TransferConfigError, match=r"pip install 'lightning_transfer\[search\]'"):
        made("tpe")


def test_unknown_strategies_and_options_out_of_range_are_refused():
    with pytest.raises(lt.TransferConfigError, match="Did you mean 'swarm'"):
        lt.LayerSearch(strategy="swam")
    with pytest.raises(lt.TransferConfigError, match="'random' is not known.*Known: 'swarm', 'tpe'"):
        lt.LayerSearch(strategy="random")
    wrong = [("particles", 0), ("iterations", -1), ("proxy_epochs", 0), ("validation", 1.5), ("validation", 0)]
    for option, value in [*wrong, ("seed", 0.5), ("max_evaluations", 0), ("max_seconds", -1)]:
        with pytest.raises(lt.TransferConfigError, match=option):
            lt.LayerSearch(**{option: value})
