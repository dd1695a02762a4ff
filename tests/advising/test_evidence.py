"""What is expected of a method, against loops over runs; what the package ships against the results it is made of."""

import json
import math
import pathlib
import runpy

import numpy as np
import pytest
from scipy import stats

from lightning_transfer.advising import evidence
from lightning_transfer.advising.evidence import Expected, Setting, expect, known_settings, weigh
from lightning_transfer.advising.measuring import Measured
from lightning_transfer.advising.student import quantile

BENCHMARKS = pathlib.Path(__file__).parents[2] / "examples/benchmarks"


def measured(gap=0.6, probe=0.6, tuned=0.6, error=0.02, images=200, classes=20):
    return Measured(images, classes, fewest=10, scored=images, probe=probe, tuned=tuned, error=error, gap=gap)


def setting(name="a", gap=0.6, distance=0.0, shots=10.0, **differences):
    return Setting(name, shots, gap, distance, differences, dict.fromkeys(differences, 2.0))


def test_settings_count_by_gap_distance_and_shots():
    settings = [setting("a"), setting("b", gap=0.7), setting("c", distance=20.0), setting("d", shots=40.0)]
    found = {each.target: share for share, each in weigh(measured(error=0.1), settings)}
    apart = {"a": 0.0, "b": (0.1 / 0.05) ** 2, "c": 20**2 / (10**2 + 10**2), "d": (math.log2(4) / 2) ** 2}
    total = sum(math.exp(-value / 2) for value in apart.values())
    assert found == pytest.approx({name: math.exp(-value / 2) / total for name, value in apart.items()})
    assert next(iter(found)) == "a"


def test_without_a_source_the_gap_does_not_count():
    shares = [share for share, _ in weigh(measured(gap=None), [setting(gap=0.5), setting(gap=1.0)])]
    assert shares == pytest.approx([0.5, 0.5])


def test_a_setting_that_is_nowhere_near_still_counts_for_a_number():
    (share, _), *_ = weigh(measured(error=0.0), [setting(distance=900.0)] * 2)
    assert share == pytest.approx(0.5)


def test_one_setting_gives_the_interval_of_its_runs():
    runs = [1.0, 2.0, 4.0, 0.5, 3.0]
    (found,) = expect(measured(), [setting(soft=runs)], ["soft", "unknown"])
    low, high = stats.t.interval(0.95, 4, np.mean(runs), stats.sem(runs))
    assert found.points == pytest.approx(np.mean(runs))
    assert found.interval == pytest.approx((high - low) / 2, rel=5e-3)
    assert (found.method, found.cost) == ("soft", 2.0)


def test_nobody_gains_more_than_is_left():
    runs, left = [3.0, 4.0, 5.0], 100 * (1 - 0.98)
    (found,) = expect(measured(probe=0.98, tuned=0.98), [setting(soft=runs)], ["soft"])
    assert found.points == pytest.approx(left)


def test_what_is_known_of_one_target_alone_is_no_surer_than_what_varies_most():
    settings = [setting("a", soft=[1.0, 1.1], rare=[2.0, 2.1]), setting("b", gap=0.7, soft=[-8.0, -8.1])]
    found = {each.method: each.interval for each in expect(measured(gap=0.65), settings, ["soft", "rare"])}
    assert found["rare"] >= found["soft"]


def test_what_settings_differ_by_widens_the_interval():
    runs = {0.60: [1.0, 2.0, 3.0], 0.65: [-4.0, -2.0, 0.0], 0.70: [0.0, 0.5, 1.0]}
    settings = [setting(str(gap), gap=gap, soft=values) for gap, values in runs.items()]
    (found,) = expect(measured(gap=0.61), settings, ["soft"])
    gaps, means = np.array([*runs]), np.array([np.mean(values) for values in runs.values()])
    errors = np.array([stats.sem(values) for values in runs.values()])
    surplus = unlike = 0.0
    for one, other in ((0, 1), (0, 2), (1, 2)):
        surplus += (means[one] - means[other]) ** 2 - errors[one] ** 2 - errors[other] ** 2
        unlike += ((gaps[one] - gaps[other]) / 0.05) ** 2
    apart = ((gaps - 0.61) / 0.05) ** 2
    shares = np.exp(-apart / 2) / np.exp(-apart / 2).sum()
    may_be = apart + (2 / 10) ** 2  # what was measured has an error of two points
    variance = ((shares * errors) ** 2).sum() + surplus / unlike * (shares * may_be).sum()
    assert evidence.spread(settings, "soft") == pytest.approx(surplus / unlike)
    assert found.points == pytest.approx(shares @ means)
    assert found.interval == pytest.approx(stats.t.ppf(0.975, 2) * variance**0.5, rel=1e-3)


@pytest.mark.parametrize("vague", [{"error": 0.3}, {"gap": None}])
def test_the_less_is_known_of_a_target_the_wider_the_interval(vague):
    runs = {0.60: [1.0, 2.0, 3.0], 0.65: [-4.0, -2.0, 0.0], 0.70: [0.0, 0.5, 1.0]}
    settings = [setting(str(gap), gap=gap, distance=100 * gap - 60, soft=values) for gap, values in runs.items()]
    sure, unsure = (expect(measured(**{"gap": 0.65, **more}), settings, ["soft"])[0] for more in ({}, vague))
    assert unsure.interval > sure.interval


def test_where_a_method_has_one_setting_others_tell_by_how_much_settings_differ():
    gaps = (0.60, 0.65, 0.70)
    settings = [setting("a", gap=gap, soft=[10 * gap, 10 * gap + 0.1]) for gap in gaps]
    settings.append(setting("b", gap=0.62, selective=[1.0, 1.2]))
    assert evidence.spread(settings, "selective") is None
    assert evidence.spread(settings, "soft") == pytest.approx(0.5**2, rel=0.05)  # a step of the gap is .05
    (found,) = expect(measured(gap=0.67), settings, ["selective", "none"])[-1:]
    alone = expect(measured(gap=0.67), settings[3:], ["selective"])[0]
    assert alone.interval == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem([1.0, 1.2]), rel=1e-3)
    both = [each for each in expect(measured(gap=0.67), settings, ["selective", "soft"]) if each.method == "selective"]
    assert both[0].interval > alone.interval == found.interval
    same = [setting(str(gap), gap=gap, soft=[1.0, 3.0]) for gap in gaps]
    assert evidence.spread(same, "soft") == 0


def test_methods_that_were_run_in_nothing_alike_are_left_out():
    settings = [setting("near", soft=[1.0, 2.0]), setting("far", gap=0.8, soft=[1.0, 2.0], selective=[5.0, 6.0])]
    assert [each.method for each in expect(measured(), settings, ["soft", "selective"])] == ["soft"]


@pytest.mark.parametrize(
    ("points", "interval", "verdict"),
    [
        (2.0, 1.9, "recommended"),
        (2.0, 2.1, "may help"),
        (0.9, 2.1, "no difference shown"),
        (-0.9, 1.0, "no difference shown"),
        (-1.1, 3.0, "advised against"),
        (-0.5, 0.4, "advised against"),
        (-9.0, 10.1, "not known"),
        (-20.0, 12.0, "advised against"),
        (20.0, 12.0, "recommended"),
    ],
)
def test_verdicts(points, interval, verdict):
    assert Expected("soft", points, interval, 1.0).verdict == verdict


def test_a_measured_weight_is_the_method_near_and_nothing_far():
    settings = [setting(gap=0.6, soft=[1.0, 2.0]), setting(gap=0.9, soft=[-3.0, -4.0])]
    names = ["soft", "soft, measured weight"]
    near = {each.method: each for each in expect(measured(gap=0.62), settings, names)}
    assert near["soft, measured weight"].points == near["soft"].points
    assert near["soft, measured weight"].interval == near["soft"].interval
    far = {each.method: each for each in expect(measured(gap=0.88), settings, names)}
    assert far["soft, measured weight"] == Expected("soft, measured weight", 0.0, 0.0, 1.0)
    assert far["soft"].points < -2


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 14, 100])
def test_quantiles_are_students(freedom):
    assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_best_first_and_places():
    found = expect(measured(), [setting(a=[1.0, 2.0], b=[3.0, 4.0], c=[-1.0, 0.0])], ["a", "b", "c"])
    assert [each.method for each in found] == ["b", "a", "c"]
    places = [evidence.place(far) for far in (-5, 2.9, 3, 14.9, 15)]
    assert places == ["near", "near", "middle", "middle", "far"]


def test_what_the_package_knows_is_made_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "transfer_report.py"))
    settings = [Setting(**each) for each in made["evidence"]()]
    assert list(known_settings()) == settings
    assert {evidence.place(each.distance) for each in settings} == {"near", "middle", "far"}


def test_evidence_is_of_paired_final_runs(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "transfer_report.py"))
    report = json.loads((BENCHMARKS / "results/transfer.json").read_text())
    found = next(each for each in made["evidence"]() if each["target"] == "near")
    tests = {
        row: {c["seed"]: c["test"] for c in report["cells"] if (c["target"], c["row"]) == ("near", row) and "test" in c}
        for row in ("soft", "fine-tuning")
    }
    expected = [100 * (tests["soft"][seed] - tests["fine-tuning"][seed]) for seed in range(1, 6)]
    assert found["differences"]["soft"] == pytest.approx(expected, abs=0.005)
    assert 0.5 < found["gap"] < 0.75
    assert found["shots"] == 10
