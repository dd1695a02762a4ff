"""Descriptors, their distance and the exact nearest, against loops in float64."""

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.functional import (
    filter_responses,
    neighbor_budget,
    response_histograms,
    symmetric_kl,
    symmetric_kl_neighbors,
)
from tests.reference import selective


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def descriptors(num, filters, bins, seed, empty=0.0):
    """Random histograms, a share of whose bins is empty."""
    generator = seeded(seed)
    counts = torch.rand(num, filters, bins, generator=generator, dtype=torch.float64) ** 3
    counts *= torch.rand(num, filters, bins, generator=generator) >= empty
    counts[..., 0] += 1e-3
    return counts / counts.sum(2, keepdim=True)


def test_responses_wherever_the_filter_lies_wholly_inside():
    images, filters = torch.randn(2, 3, 9, 7, generator=seeded()), torch.randn(4, 3, 5, 5, generator=seeded(1))
    found = filter_responses(images, filters)
    assert found.shape == (2, 4, 5, 3)
    for image, response in zip(images, found, strict=True):
        assert response.numpy() == pytest.approx(selective.responses(image.numpy(), filters.numpy()), abs=1e-4)
    assert torch.equal(filter_responses(images, filters, stride=2), found[:, :, ::2, ::2])


@pytest.mark.parametrize("shape", [(1, 3, 9, 4), (1, 3, 4, 9), (1, 1, 9, 9), (3, 9, 9)])
def test_images_that_the_filters_cannot_take_are_named(shape):
    with pytest.raises(lt.TransferConfigError, match="take .n, 3, height, width. with sides of at least 5"):
        filter_responses(torch.zeros(shape), torch.zeros(4, 3, 5, 5))
    assert filter_responses(torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 5, 5)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_histograms_by_loops_on_the_edges_and_beyond_them(smoothing):
    responses = torch.randn(3, 4, 5, 6, generator=seeded())
    edges = torch.randn(4, 7, generator=seeded(1)).sort(1).values
    responses[0, :, 0, 0] = edges[:, 3]
    found = response_histograms(responses, edges, smoothing=smoothing)
    assert found.numpy() == pytest.approx(selective.histograms(responses.numpy(), edges.numpy(), smoothing), abs=1e-6)
    assert found.sum(2).numpy() == pytest.approx(np.ones((3, 4)), abs=1e-6)


def test_histograms_do_not_depend_on_the_batch():
    responses, edges = torch.randn(6, 4, 5, 5, generator=seeded()), torch.linspace(-1, 1, 9).expand(4, 9)
    one_by_one = torch.cat([response_histograms(responses[i : i + 1], edges) for i in range(6)])
    assert torch.equal(response_histograms(responses, edges), one_by_one)


def test_what_no_histogram_can_be_made_of_is_named():
    responses = torch.zeros(3, 4, 5)
    with pytest.raises(lt.TransferConfigError, match=r"edges \(3, 9\) for 4 filters"):
        response_histograms(responses, torch.zeros(3, 9))
    responses[2, 1, 3] = torch.nan
    with pytest.raises(lt.TransferConfigError, match="image 2 are not numbers"):
        response_histograms(responses, torch.zeros(4, 9))


@pytest.mark.parametrize("empty", [0.0, 0.6])
def test_distance_is_the_authors_formula(empty):
    p, q = descriptors(4, 3, 5, seed=0, empty=empty), descriptors(6, 3, 5, seed=1, empty=empty)
    weights = torch.rand(3, generator=seeded(2))
    found = symmetric_kl(p, q, filter_weights=weights)
    for i, j in np.ndindex(4, 6):
        expected = selective.distance(p[i].numpy(), q[j].numpy(), weights.double().numpy())
        assert found[i, j].item() == pytest.approx(expected, rel=1e-9)
        assert expected == pytest.approx(selective.all_distances(p.numpy(), q.numpy(), weights.double().numpy())[i, j])


def test_distance_is_zero_to_itself_symmetric_and_weighs_filters_alike():
    p, q = descriptors(5, 3, 8, seed=0, empty=0.3), descriptors(4, 3, 8, seed=1)
    assert (symmetric_kl(p, p).diagonal() == 0).all()
    assert torch.equal(symmetric_kl(p, q), symmetric_kl(q, p).T)
    assert torch.allclose(symmetric_kl(p, q), symmetric_kl(p, q, filter_weights=torch.full((3,), 1 / 3)), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("empty", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(4, 10), (37, 20)])
def test_neighbors_are_those_of_brute_force_in_that_order(shape, empty, k):
    target, source = descriptors(25, *shape, seed=0, empty=empty), descriptors(300, *shape, seed=1, empty=empty)
    weights = torch.rand(shape[0], generator=seeded(2), dtype=torch.float64)
    distances, indices = symmetric_kl_neighbors(target.float(), source.float(), k=k, filter_weights=weights)
    brute = selective.all_distances(target.float().double().numpy(), source.float().double().numpy(), weights.numpy())
    expected = np.argsort(brute, axis=1, kind="stable")[:, :k]
    assert (indices.numpy() == expected).all()
    assert distances.numpy() == pytest.approx(np.take_along_axis(brute, expected, 1), rel=1e-9)


def test_a_planted_copy_is_the_nearest_at_distance_zero():
    source = descriptors(200, 6, 10, seed=1)
    distances, indices = symmetric_kl_neighbors(source[[17, 3]], source, k=4)
    assert indices[:, 0].tolist() == [17, 3]
    assert distances[:, 0].tolist() == [0.0, 0.0]


def test_ties_are_broken_by_index_even_among_many_copies():
    """More copies than candidates were asked for: the query is asked again until nothing left out can be among them."""
    source = descriptors(150, 6, 10, seed=1)
    source[20:120] = source[20]
    distances, indices = symmetric_kl_neighbors(source[20:21], source, k=5)
    assert indices.tolist() == [[20, 21, 22, 23, 24]]
    assert (distances == 0).all()


def test_what_float32_cannot_tell_apart_is_told_apart():
    """A hundred images nearer to each other than float32 resolves: candidates are not sure, and more are asked for."""
    source = descriptors(150, 6, 10, seed=1)
    noise = torch.rand(100, 6, 10, generator=seeded(2), dtype=torch.float64)
    source[20:120] = source[20] * (1 + 1e-6 * noise)
    source /= source.sum(2, keepdim=True)
    _, indices = symmetric_kl_neighbors(source[60:61], source, k=5)
    brute = selective.all_distances(source[60:61].numpy(), source.numpy(), np.full(6, 1 / 6))
    assert indices[0].tolist() == np.argsort(brute[0], kind="stable")[:5].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 21}, "k=21 exceeds the 20 source images; pass k<=20"),
        ({"k": 2, "filter_weights": torch.ones(4)}, r"shape \(4,\); expected \(3,\)"),
        ({"k": 2, "filter_weights": -torch.ones(3)}, "none of them negative"),
    ],
)
def test_neighbors_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        symmetric_kl_neighbors(descriptors(2, 3, 5, seed=0), descriptors(20, 3, 5, seed=1), **arguments)
    with pytest.raises(lt.TransferConfigError, match="same filters and bins"):
        symmetric_kl(descriptors(2, 3, 5, seed=0), descriptors(20, 3, 6, seed=1))


def test_budgets_after_rounds():
    """In {K, 3 K, 5 K} after one round, never falling, never above the limit."""
    generator = seeded()
    budget, seen = torch.full((100,), 10), []
    for _ in range(4):
        before = budget
        correct, entropy = torch.rand(100, generator=generator) > 0.3, torch.rand(100, generator=generator)
        budget = neighbor_budget(before, is_correct=correct, entropy=entropy, k=10, limit=55, hard_entropy=0.5)
        seen.append(set(budget.tolist()))
        assert (budget >= before).all()
        assert (budget[correct & (entropy < 0.5)] == before[correct & (entropy < 0.5)]).all()
    assert seen[0] == {10, 30, 50}
    assert max(seen[-1]) == 55


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ties_that_all_round_the_same_way_are_told_apart(k):
    """Permutations of one histogram before an even one: float32 errs alike on all of them, so a sample sees little."""
    generator = seeded(0)
    even = torch.full((1, 4, 12), 1 / 12, dtype=torch.float64)
    for _ in range(40):
        one = torch.rand(4, 12, generator=generator, dtype=torch.float64) + 0.05
        orders = torch.rand(60, 4, 12, generator=generator).argsort(dim=2, stable=True)
        source = one.expand(60, 4, 12).gather(2, orders)
        source = source * (1 + 1e-8 * torch.randn(source.shape, generator=generator, dtype=torch.float64))
        source /= source.sum(2, keepdim=True)
        _, indices = symmetric_kl_neighbors(even, source, k=k)
        brute = selective.all_distances(even.numpy(), source.numpy(), np.full(4, 1 / 4))
        nearest = np.sort(brute[0])[:k]
        assert brute[0][indices[0].numpy()] == pytest.approx(nearest, abs=1e-14)


@pytest.mark.parametrize("total", [1.0, 100.0, 1e4])
def test_weights_of_any_total_and_near_copies(total):
    """Enough queries that pruning is tried: what a bound may err grows with the weights."""
    generator = seeded(1)
    latents = torch.randn(1300, 3, generator=generator) @ torch.randn(3, 12 * 20, generator=generator)
    histograms = (0.3 * latents.view(-1, 12, 20)).double().softmax(2)
    target, source = histograms[:300], histograms[300:].clone()
    source[:300] = target * (1 + 1e-3 * torch.randn(target.shape, generator=generator, dtype=torch.float64))
    source[300:600] = target * (1 + 1e-3 * torch.randn(target.shape, generator=generator, dtype=torch.float64))
    source /= source.sum(2, keepdim=True)
    weights = torch.full((12,), total / 12, dtype=torch.float64)
    _, indices = symmetric_kl_neighbors(target, source, k=2, filter_weights=weights)
    brute = selective.all_distances(target.numpy(), source.numpy(), weights.numpy())
    assert (indices.numpy() == np.argsort(brute, axis=1, kind="stable")[:, :2]).all()


@pytest.mark.parametrize("bad", [torch.zeros(0, 3, 5), torch.ones(2, 3, 5, dtype=torch.int64), -torch.ones(2, 3, 5)])
def test_what_is_no_histogram_is_refused(bad):
    with pytest.raises(lt.TransferConfigError, match="target is .* expected histograms"):
        symmetric_kl_neighbors(bad, descriptors(20, 3, 5, seed=1), k=2)
    nan = descriptors(20, 3, 5, seed=1)
    nan[3, 1, 2] = torch.nan
    with pytest.raises(lt.TransferConfigError, match="source is .* NaN"):
        symmetric_kl_neighbors(descriptors(2, 3, 5, seed=0), nan, k=2)
