"""Linear probes against scikit-learn's, and against what they must not have seen."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import lightning_transfer as lt
from lightning_transfer.probing import PENALTIES, fit_probe, probed
from lightning_transfer.splitting import folds


def clouds(number, width, spread, *, seed=0):
    """Images of three classes, each a cloud."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    features = random.normal(size=(number, width)) + spread * np.eye(3, width)[labels]
    return torch.from_numpy(features), torch.from_numpy(labels)


def by_scikit_learn(features, labels, penalty):
    scaler = StandardScaler().fit(features)
    each = scaler.scale_ * (len(features) / (len(features) - 1)) ** 0.5
    scaler.scale_[:] = np.sort(each)[(len(each) - 1) // 2]  # all are divided by the lower median
    model = LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-10).fit(scaler.transform(features), labels)
    return lambda others: model.predict_log_proba(scaler.transform(others))


@pytest.mark.parametrize(("spread", "width", "strongest"), [(6.0, 5, False), (1.0, 200, True)])
def test_the_penalty_is_the_one_that_suits_images_held_out(spread, width, strongest):
    features, labels = clouds(45, width, spread)
    features *= torch.from_numpy(np.geomspace(0.5, 2, width))
    losses = dict.fromkeys(PENALTIES, 0.0)
    for out in folds(labels.tolist()):
        kept = sorted({*range(45)} - {*out})
        for penalty in PENALTIES:
            says = by_scikit_learn(features[kept].numpy(), labels[kept].numpy(), penalty)(features[out].numpy())
            losses[penalty] -= says[np.arange(len(out)), labels[out].numpy()].sum()
    best = min(losses, key=losses.get)
    assert (best == PENALTIES[-1]) == strongest  # the cases differ in it
    expected = by_scikit_learn(features.numpy(), labels.numpy(), best)(features.numpy())
    found = fit_probe(features, labels, num_classes=3)(features).log_softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_nothing_is_scored_by_what_has_seen_it():
    """Labels by chance cannot be said of images held out, though a probe says those of its own by heart."""
    features, labels = clouds(90, 100, 0.0)
    assert (fit_linear_by_heart(features, labels) == labels).all()
    assert probed(features, labels, num_classes=3).double().mean() < 0.55
    assert probed(*clouds(90, 5, 8.0), num_classes=3).all()


def fit_linear_by_heart(features, labels):
    return torch.from_numpy(by_scikit_learn(features.numpy(), labels.numpy(), 1.0)(features.numpy()).argmax(1))


def test_images_of_a_group_are_held_out_together():
    """Each image has a twin, by which its label is known; with twins in one group it is not."""
    features, labels = clouds(45, 200, 0.0)
    features, labels, groups = torch.cat([features] * 2), torch.cat([labels] * 2), [*range(45)] * 2
    alone = probed(features, labels, num_classes=3).double().mean()
    assert alone > 0.9
    assert probed(features, labels, num_classes=3, groups=groups).double().mean() < 0.55
    with pytest.raises(lt.TransferConfigError, match="one group"):
        probed(features, labels, num_classes=3, groups=[0] * 90)


def test_parts_are_even_and_keep_groups_together():
    random = np.random.default_rng(1)
    groups = random.integers(0, 40, 400).tolist()
    labels = [group % 5 for group in groups]
    parts = folds(labels, groups, num_folds=4)
    assert sorted(index for part in parts for index in part) == [*range(400)]
    assert all(60 <= len(part) <= 140 for part in parts)
    for part in parts:
        assert not {groups[index] for index in part} & {groups[index] for index in {*range(400)} - {*part}}
        assert {labels[index] for index in part} == {*range(5)}
    assert len(folds([0] * 6, list("aabbcc"), num_folds=5)) == 3
