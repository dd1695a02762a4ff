"""The domain gap against scikit-learn's regression, fold by fold."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

import lightning_transfer as lt
from lightning_transfer.functional import domain_gap


def features(num_target, num_source, width, distance, seed):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width))
    target = random.normal(size=(num_target, width)) @ mixing + distance * random.normal(size=width)
    return target, random.normal(size=(num_source, width)) @ mixing


@pytest.mark.parametrize("sizes", [(40, 60, 5), (30, 200, 50), (100, 100, 150)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 5.0])
def test_equals_scikit_learn_on_the_same_folds(sizes, distance):
    target, source = features(*sizes, distance, seed=3)
    generator = torch.Generator().manual_seed(0)
    folds = np.concatenate([(torch.randperm(len(side), generator=generator) % 5).numpy() for side in (target, source)])
    values, labels = np.concatenate([target, source]), np.repeat([1, 0], [len(target), len(source)])
    said = np.empty(len(labels))
    for fold in range(5):
        scaler = StandardScaler().fit(values[folds != fold])
        model = LogisticRegression(class_weight="balanced", max_iter=10_000, tol=1e-8)
        model.fit(scaler.transform(values[folds != fold]), labels[folds != fold])
        said[folds == fold] = model.predict(scaler.transform(values[folds == fold]))
    expected = balanced_accuracy_score(labels, said)
    found = domain_gap(torch.from_numpy(target), torch.from_numpy(source))
    assert found == pytest.approx(expected, abs=2 / min(sizes[:2]))


def test_near_is_a_half_and_far_is_one():
    target, source = (torch.from_numpy(side) for side in features(300, 300, 8, 0.0, seed=1))
    assert domain_gap(target, source) == pytest.approx(0.5, abs=0.1)
    assert domain_gap(target + 1000, source) == 1.0


def test_images_of_a_group_that_are_alike_for_that_alone_are_no_gap():
    random = np.random.default_rng(0)
    places = random.normal(size=(20, 128)).repeat(10, 0)
    target = torch.from_numpy(places + 0.1 * random.normal(size=(200, 128)))
    source, groups = torch.from_numpy(random.normal(size=(1000, 128))), np.arange(20).repeat(10)
    assert domain_gap(target, source) > 0.9
    assert domain_gap(target, source, target_groups=groups) < 0.65
    assert domain_gap(target + 9, source, target_groups=groups) > 0.95
    alone = [domain_gap(target, source, target_groups=given) for given in (None, range(200))]
    assert alone[0] == alone[1]


def test_random_state_is_left_alone_and_gradients_may_be_off():
    before = torch.get_rng_state()
    with torch.no_grad():
        first = domain_gap(torch.ones(9, 2) * torch.arange(9)[:, None], torch.zeros(9, 2))
    assert first == domain_gap(torch.ones(9, 2) * torch.arange(9)[:, None], torch.zeros(9, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(lt.TransferConfigError, match="4 target and 9 source images"):
        domain_gap(torch.rand(4, 2), torch.rand(9, 2))
    with pytest.raises(lt.TransferConfigError, match="of one network"):
        domain_gap(torch.rand(9, 2), torch.rand(9, 3))
    with pytest.raises(lt.TransferConfigError, match=r"All 9 target images are of one group \('p'\)"):
        domain_gap(torch.rand(9, 2), torch.rand(9, 2), target_groups="p" * 9)
    with pytest.raises(lt.TransferConfigError, match="8 groups are named for 9 target images"):
        domain_gap(torch.rand(9, 2), torch.rand(9, 2), target_groups=range(8))
    with pytest.raises(lt.TransferConfigError, match="not finite"):
        domain_gap(torch.full((9, 2), float("nan")), torch.rand(9, 2))


@pytest.mark.parametrize("side", ["target", "source"])
def test_features_that_are_not_finite_are_named_by_side_and_row(side):
    features = {"target": torch.rand(9, 2), "source": torch.rand(12, 2)}
    features[side][[3, 7], 1] = float("nan")
    with pytest.raises(lt.TransferConfigError, match=rf"2 of \d+ {side} images are not finite, the first .* row 3"):
        domain_gap(features["target"], features["source"])
