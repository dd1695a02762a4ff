"""Linear classifiers against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_transfer.linear import fit_linear, fit_path


@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("penalty", [0.5, 10.0])
def test_scores_are_scikit_learns(is_balanced, penalty, by_feature):
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 10, 25])
    features = random.normal(size=(75, 6)) * [1, 2, 3, 4, 5, 600] + labels[:, None]
    scaler = StandardScaler().fit(features)
    scaler.scale_ *= (75 / 74) ** 0.5  # ours divides by n - 1
    if not by_feature:
        scaler.scale_[:] = np.sort(scaler.scale_)[2]  # the lower median of six
    balance = "balanced" if is_balanced else None
    model = LogisticRegression(C=1 / penalty, class_weight=balance, max_iter=10_000, tol=1e-10)
    expected = model.fit(scaler.transform(features), labels).predict_log_proba(scaler.transform(features[::3]))
    given = torch.from_numpy(features), torch.from_numpy(labels)
    alike = (75 / (3 * given[1].bincount()))[given[1]] if is_balanced else None
    says = fit_linear(*given, num_classes=3, penalty=penalty, importance=alike, by_feature=by_feature)
    found = says(given[0][::3]).log_softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("width", [6, 90])
def test_fits_that_share_their_start_are_each_at_their_own_optimum(width):
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = random.normal(size=(60, width)) * np.geomspace(0.01, 100, width) + labels[:, None]
    scaler = StandardScaler().fit(features)
    scaler.scale_ *= (60 / 59) ** 0.5
    given = {"num_classes": 3, "penalties": (1.0, 300.0, 10.0)}
    exact = fit_path(torch.from_numpy(features), torch.from_numpy(labels), **given)
    rough = fit_path(torch.from_numpy(features), torch.from_numpy(labels), **given, dtype=torch.float32, tolerance=1e-3)
    for penalty in given["penalties"]:
        model = LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-10)
        expected = model.fit(scaler.transform(features), labels).predict_log_proba(scaler.transform(features))
        near, roughly = (fits[penalty](torch.from_numpy(features)).log_softmax(1).numpy() for fits in (exact, rough))
        np.testing.assert_allclose(near, expected, atol=2e-4)
        losses = [-said[np.arange(60), labels].mean() for said in (roughly, expected)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("by_feature", [True, False])
def test_a_class_without_images_and_a_feature_that_never_varies_do_no_harm(by_feature):
    features = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.ones(20, 1)], 1)
    with torch.no_grad():
        says = fit_linear(features, torch.arange(20) % 2 * 2, num_classes=4, by_feature=by_feature)
        nothing = fit_linear(torch.ones(20, 3), torch.arange(20) % 2, num_classes=2, by_feature=by_feature)
    assert (nothing.weight == 0).all()
    scores = says(features + torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert torch.isfinite(scores).all()
    assert set(scores.argmax(1).tolist()) <= {0, 2}


@pytest.mark.parametrize("by_feature", [True, False])
def test_of_a_single_image_every_image_is_said_to_be_of_its_class(by_feature):
    says = fit_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), num_classes=3, by_feature=by_feature)
    assert says(torch.randn(4, 2)).argmax(1).tolist() == [1] * 4


@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_a_feature_that_varies_by_rounding_alone_has_no_weight(penalty, by_feature):
    """What is constant where a classifier is fitted may vary where it is used."""
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 0.3 + 1e-8 * features[:, 2]
    features = torch.cat([features.double(), torch.full((40, 1), 0.7, dtype=torch.float64)], 1)
    weight, bias = fit_linear(features, torch.arange(40) % 3, num_classes=3, penalty=penalty, by_feature=by_feature)
    assert (weight[:, [2, 4]] == 0).all()
    assert 0 < weight.abs().max() < 2
    assert bias.abs().max() < 2
