"""Any sets of histograms: the k nearest are those of float64 brute force, equal distances by index."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightning_transfer as lt
from lightning_transfer.functional import neighbor_budget, symmetric_kl_neighbors
from lightning_transfer.methods.selective.distances import root_weights
from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.search import InMemory
from tests.reference import selective


@st.composite
def histogram_sets(draw, most=60):
    """Target and source, as they may be: empty bins, copies, near copies, target images in the source."""
    filters, bins = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    num_target, num_source = draw(st.integers(1, 12)), draw(st.integers(1, most))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    power, empty = draw(st.sampled_from([0.0, 1.0, 8.0])), draw(st.sampled_from([0.0, 0.3, 0.95]))
    values = random.random((num_target + num_source, filters, bins)) ** power
    values *= random.random(values.shape) >= empty
    values[..., random.integers(bins)] += draw(st.sampled_from([1e-6, 1.0]))
    target, source = values[:num_target], values[num_target:]
    for _ in range(draw(st.integers(0, 6))):
        row, other = random.integers(num_source, size=2)
        source[row] = draw(st.sampled_from([source[other], target[random.integers(num_target)]]))
        source[row] *= 1 + draw(st.sampled_from([0.0, 1e-9, 1e-5])) * random.random(source[row].shape)
    if draw(st.booleans()):
        source[:] = source[0]  # nothing but copies
    target, source = (side / side.sum(2, keepdims=True) for side in (target, source))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    weights = draw(st.sampled_from([None, "any", "some"]))
    if weights:
        weights = random.random(filters) * (1 if weights == "any" else random.integers(2, size=filters))
    return *(torch.from_numpy(side).to(dtype) for side in (target, source)), weights


@given(histogram_sets(), st.data())
def test_neighbors_are_those_of_brute_force(sets, data):
    target, source, weights = sets
    k = data.draw(st.one_of(st.integers(1, len(source)), st.just(len(source))))
    given_weights = None if weights is None else torch.from_numpy(weights)
    distances, indices = symmetric_kl_neighbors(target, source, k=k, filter_weights=given_weights)
    queries, rows = (InMemory(side.flatten(1), tuple(side.shape[1:])) for side in (target, source))
    root = root_weights(target, source, given_weights)
    for prune in (True, False):  # by default a sample says which of the two is faster
        again = exact_neighbors(queries, rows, k=k, root=root, prune=prune, all_in_double=True)
        assert torch.equal(again[0], distances)
        assert torch.equal(again[1], indices)
    counts = np.full(target.shape[1], 1 / target.shape[1]) if weights is None else weights
    brute = selective.all_distances(target.double().numpy(), source.double().numpy(), counts)
    assert indices.shape == distances.shape == (len(target), k)
    for row in range(len(target)):
        mine = indices[row].tolist()
        assert len({*mine}) == k
        assert distances[row].numpy() == pytest.approx(brute[row][mine], rel=1e-9, abs=1e-13)
        assert np.sort(brute[row])[:k] == pytest.approx(brute[row][mine], rel=1e-9, abs=1e-13)
        for place in range(k - 1):  # in the order of their distances, equal ones by index
            assert (distances[row, place].item(), mine[place]) < (distances[row, place + 1].item(), mine[place + 1])
        copies = (source == source[mine[-1]]).flatten(1).all(1).nonzero()[:, 0].tolist()
        assert [other for other in copies if other not in mine and other < mine[-1]] == []


@given(histogram_sets(most=10), st.integers(-3, 20), st.data())
def test_what_cannot_be_is_refused(sets, k, data):
    target, source, _ = sets
    if not 1 <= k <= len(source):
        with pytest.raises(lt.TransferConfigError, match=f"k={k}"):
            symmetric_kl_neighbors(target, source, k=k)
        return
    bad = data.draw(st.sampled_from([np.nan, -1.0]))
    spoiled = data.draw(st.sampled_from([target, source])).clone()
    name = "target" if spoiled.shape == target.shape and torch.equal(spoiled, target) else "source"
    spoiled.view(-1)[data.draw(st.integers(0, spoiled.numel() - 1))] = bad
    sets = (spoiled, source) if name == "target" else (target, spoiled)
    with pytest.raises(lt.TransferConfigError, match=f"{name} is .*below 0 or NaN"):
        symmetric_kl_neighbors(*sets, k=k)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.floats(0, 3)), min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(1, 100),
    st.floats(0, 3),
)
def test_budgets_are_the_papers_rule(images, k, limit, hard):
    before, right, entropy = (torch.tensor(column) for column in zip(*images, strict=True))
    found = neighbor_budget(before, is_correct=right, entropy=entropy, k=k, limit=limit, hard_entropy=hard)
    sure = entropy.tolist()
    for place, (had, is_right, _) in enumerate(images):
        more = 4 * k if not is_right else 2 * k if sure[place] >= np.float32(hard) else 0
        assert found[place] == max(had, min(had + more, limit))
