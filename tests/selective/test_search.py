"""Exact, pruned and approximate search against brute force in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_transfer.methods.selective import approximate, bounds, exact, search
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.bounds import Sketcher, pruned_scan
from lightning_transfer.methods.selective.descriptors import Binning, ResponseCounts, to_histograms
from lightning_transfer.methods.selective.distances import pair_distances, with_logs
from lightning_transfer.methods.selective.exact import exact_neighbors
from lightning_transfer.methods.selective.finding import Finder
from lightning_transfer.methods.selective.functional import symmetric_kl_neighbors
from lightning_transfer.methods.selective.search import InMemory, Nearest, Packed
from tests.contracts.test_devices import Moves, TwoDevices
from tests.reference import selective

PRUNE = [True, False, None]
DEVICE = torch.device("cpu", 0)  # not the CPU as far as a search can tell


def random_histograms(num, filters, bins, seed, dtype=torch.float32):
    """Of no structure: nothing can be ruled out."""
    found = torch.rand(num, filters, bins, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    found += 1e-3
    return (found / found.sum(2, keepdim=True)).to(dtype)


def alike_histograms(num, filters, bins, seed, noise=0.3):
    """As images give them, of few degrees of freedom and some noise: most pairs can be ruled out."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, filters, generator=torch.Generator().manual_seed(99))
    slopes = torch.randn(num, 2, generator=generator) @ mixing
    found = torch.exp(1.5 * slopes[:, :, None] * torch.linspace(-1, 1, bins)) + 0.05
    found += noise * torch.rand(found.shape, generator=generator)
    return found / found.sum(2, keepdim=True)


def root_of(weights, bins):
    return weights.double().sqrt().repeat_interleave(bins)


def even(filters):
    return torch.full((filters,), 1 / filters, dtype=torch.float64)


def rows(histograms):
    return InMemory(histograms.flatten(1), tuple(histograms.shape[1:]))


def find(queries, source, k, *, weights=None, rows=rows, **options):
    weights = even(queries.shape[1]) if weights is None else weights
    return exact_neighbors(rows(queries), rows(source), k=k, root=root_of(weights, queries.shape[2]), **options)


def assert_brute_force(found, queries, source, k, weights=None, rel=1e-9):
    """The same indices in the same order, and true distances."""
    weights = even(queries.shape[1]) if weights is None else weights
    distances, indices = selective.nearest(queries.numpy(), source.numpy(), weights.numpy(), k)
    assert found[1].numpy().tolist() == indices.tolist()
    assert found[0].dtype == torch.float64
    assert found[0].numpy() == pytest.approx(distances, rel=rel, abs=1e-5 if rel > 1e-9 else 1e-15)


class OnDemand:
    """Rows that are read as files are: whole ranges, or chosen ones in rising order, and never many at once."""

    def __init__(self, histograms, most):
        self.histograms, self.shape, self.most = histograms.flatten(1), tuple(histograms.shape[1:]), most
        self.reads = 0

    def __len__(self):
        return len(self.histograms)

    def read(self, start, stop):
        assert 0 <= start < stop <= len(self)
        assert stop - start <= self.most
        self.reads += 1
        return self.histograms[start:stop].clone()

    def take(self, chosen):
        assert (chosen.diff() > 0).all()
        assert len(chosen) <= self.most
        self.reads += 1
        return self.histograms[chosen]


def small_blocks(monkeypatch, block=2000, least=8):
    for module in (search, bounds, exact):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(search, "LEAST", least)


# the exact search


@pytest.mark.parametrize("options", [*({"prune": prune} for prune in PRUNE), {"device": DEVICE}])
@pytest.mark.parametrize(("filters", "bins"), [(1, 2), (3, 5), (48, 12), (30, 100)])
@pytest.mark.parametrize("k", [1, 7, 150])
def test_neighbors_are_those_of_brute_force_in_that_order(filters, bins, k, options):
    queries, source = random_histograms(20, filters, bins, 0), random_histograms(150, filters, bins, 1)
    weights = torch.rand(filters, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights /= weights.sum()
    options = {**options, "weights": weights}
    assert_brute_force(find(queries, source, k, **options, all_in_double=True), queries, source, k, weights)
    assert_brute_force(find(queries, source, k, **options), queries, source, k, weights, rel=1e-4)


@pytest.mark.parametrize("k", [3, 90])
def test_a_device_merges_many_blocks_without_waiting(monkeypatch, k):
    small_blocks(monkeypatch)
    queries, source = random_histograms(9, 3, 5, 0), random_histograms(400, 3, 5, 1)
    source[300:320] = source[17]
    device = TwoDevices()
    with device, Moves(device):
        found = find(queries, source, k, device=DEVICE, all_in_double=True)
    assert_brute_force(found, queries, source, k)
    assert device.storages
    assert device.num_reads == 0


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_products_have_full_precision_whatever_training_has(precision):
    random = torch.Generator().manual_seed(0)
    one, two = torch.randn(512, 1920, generator=random), torch.randn(1920, 2048, generator=random)
    expected, before, seen = one @ two, torch.get_float32_matmul_precision(), []

    class Multiplying(InMemory):
        def read(self, start, stop):
            seen.append(torch.equal(one @ two, expected))
            return super().read(start, stop)

    sets = random_histograms(9, 3, 5, 0)
    torch.set_float32_matmul_precision(precision)
    try:
        find(sets, sets, 2, rows=lambda sets: Multiplying(sets.flatten(1), (3, 5)))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert all(seen)


def test_products_go_on_to_have_the_precision_of_all_operations():
    backends, before = torch.backends, getattr(torch.backends, "fp32_precision", None)
    kinds = [backends.cuda.matmul, backends.mkldnn.matmul] if before else []  # torch before 2.9 has only one precision
    own = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        find(random_histograms(9, 3, 5, 0), random_histograms(9, 3, 5, 1), 2)
        backends.fp32_precision = "ieee"
        assert all(kind.fp32_precision == "ieee" for kind in kinds)
    finally:
        backends.fp32_precision = before
        for kind, precision in zip(kinds, own, strict=True):
            kind.fp32_precision = precision


def test_neighbors_of_thousands_of_network_features():
    """The kernels of two convolutions of random weights: 104 filters and 25 bins."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.ReLU(), nn.Conv2d(40, 64, 3))
    bank = FilterBank.from_model(model, ["0", "2"])
    images = torch.rand(100, 3, 32, 32) * torch.rand(100, 3, 1, 1) + torch.linspace(0, 1, 32) * torch.rand(100, 1, 1, 1)
    with torch.no_grad():
        layers = bank(images / 2)
    counts, first = ResponseCounts(104, torch.device("cpu")), (0, 40)
    for start, layer in zip(first, layers, strict=True):
        counts.add(layer[:20], start)
    binning = Binning(counts.edges(25))
    found = torch.cat([binning.counts(layer, start) for start, layer in zip(first, layers, strict=True)], 1)
    queries, source = to_histograms(found[:20]), to_histograms(found)
    assert source.flatten(1).shape == (100, 2600)
    nearest = find(queries, source, 9, weights=bank.weights, all_in_double=True)
    assert_brute_force(nearest, queries, source, 9, bank.weights)
    assert nearest[1][:, 0].tolist() == list(range(20))
    assert (nearest[0][:, 0] == 0).all()
    for prune in PRUNE:
        assert torch.equal(find(queries, source, 9, weights=bank.weights, prune=prune)[1], nearest[1])


@pytest.mark.parametrize("all_in_double", [True, False])
@pytest.mark.parametrize("k", [1, 7])
def test_pruning_changes_nothing(k, all_in_double):
    """To the bit, where it pays by a sample and where it does not."""
    for make in (alike_histograms, random_histograms):
        queries, source = make(80, 40, 25, 0), make(700, 40, 25, 1)
        found = [find(queries, source, k, prune=prune, all_in_double=all_in_double) for prune in PRUNE]
        assert_brute_force(found[0], queries, source, k, rel=1e-9 if all_in_double else 1e-4)
        for distances, indices in found[1:]:
            assert torch.equal(indices, found[0][1])
            assert torch.equal(distances, found[0][0]) or not all_in_double
            assert torch.allclose(distances, found[0][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "prune"), [*((alike_histograms, prune) for prune in PRUNE), (random_histograms, True)]
)
def test_groups_of_queries_and_blocks_of_the_source_change_nothing(monkeypatch, make, prune):
    queries, source = make(50, 12, 10, 0), make(400, 12, 10, 1)
    whole = find(queries, source, 6, prune=prune, all_in_double=True)
    small_blocks(monkeypatch)
    monkeypatch.setattr(search, "SAMPLE", 20)
    monkeypatch.setattr(bounds, "FITTED", 20)
    monkeypatch.setattr(bounds, "TRIED", (20, 8))
    monkeypatch.setattr(exact, "MOST_QUERIES", 16)
    made = []

    def on_demand(histograms):
        made.append(OnDemand(histograms, most=25))
        return made[-1]

    found = find(queries, source, 6, prune=prune, all_in_double=True, rows=on_demand)
    assert_brute_force(found, queries, source, 6)
    assert made[0].reads == 4
    assert made[1].reads >= 4 * 400 / 16
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1], whole[1])
    monkeypatch.setattr(exact, "QUERIES", 2 * 120 * 7)
    made.clear()
    assert torch.equal(find(queries, source, 6, prune=prune, rows=on_demand)[1], whole[1])
    assert made[0].reads == 8


@pytest.mark.parametrize("prune", PRUNE)
def test_copies_come_first_at_distance_zero_and_equal_ones_by_index(prune):
    source = random_histograms(200, 6, 10, 1)
    source[150], source[40] = source[7], source[7]
    distances, indices = find(source[[7, 3]], source, 5, prune=prune)
    assert indices[0, :3].tolist() == [7, 40, 150]
    assert distances[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert indices[1, 0] == 3
    assert_brute_force((distances, indices), source[[7, 3]], source, 5, rel=1e-4)


def test_a_copys_distance_is_zero_however_many_queries_there_are():
    """Far more of them than are measured again to see how much float32 errs."""
    source = random_histograms(900, 6, 10, 1)
    distances, indices = find(source[:800], source, 3)
    assert indices[:, 0].tolist() == list(range(800))
    assert (distances[:, 0] == 0).all()
    assert (distances[:, 1] > 0).all()


@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("k", [3, 90])
def test_among_many_copies_the_lowest_indices_win(monkeypatch, k, prune):
    """More copies than are kept, spread over blocks: the query is asked again until nothing else can be among them."""
    small_blocks(monkeypatch)
    source = random_histograms(300, 6, 10, 1)
    copies = torch.randperm(300)[:200].sort().values
    source[copies] = source[copies[0]].clone()
    queries = torch.cat([source[copies[:1]], random_histograms(30, 6, 10, 2)])
    distances, indices = find(queries, source, k, prune=prune)
    assert indices[0].tolist() == copies[:k].tolist()
    assert (distances[0] == 0).all()
    assert_brute_force((distances, indices), queries, source, k, rel=1e-4)


@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("apart", [1e-5, 1e-7, 1e-10])
def test_what_float32_cannot_tell_apart_is_told_apart(apart, prune):
    """A hundred near copies, nearer to each other than float32 resolves, and queries among and far from them."""
    source = random_histograms(250, 6, 10, 1, torch.float64)
    noise = torch.rand(100, 6, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    source[20:120] = source[20] * (1 + apart * noise)
    source /= source.sum(2, keepdim=True)
    queries = torch.cat([source[60:63], random_histograms(3, 6, 10, 3, torch.float64), source[200:201]])
    assert_brute_force(find(queries, source, 12, prune=prune), queries, source, 12, rel=1e-4)
    found = find(queries, source, 12, prune=prune, all_in_double=True)
    assert found[1].tolist() == find(queries, source, 12, prune=prune)[1].tolist()


def test_bins_that_are_empty_in_float64_keep_the_authors_eps():
    queries, source = random_histograms(10, 4, 8, 0, torch.float64), random_histograms(120, 4, 8, 1, torch.float64)
    for part in (queries, source):
        part[torch.rand(part.shape) < 0.5] = 0
        part[:, :, 0] += 1e-3
        part /= part.sum(2, keepdim=True)
    for prune in PRUNE:
        assert_brute_force(find(queries, source, 9, prune=prune, all_in_double=True), queries, source, 9)


def test_threads_change_nothing():
    for prune, shape in ((True, (12, 12)), (False, (48, 25))):
        queries, source = alike_histograms(40, *shape, 0), alike_histograms(600, *shape, 1)
        torch.set_num_threads(1)
        alone = find(queries, source, 5, prune=prune, all_in_double=True)
        torch.set_num_threads(2)
        found = find(queries, source, 5, prune=prune, all_in_double=True)
        assert torch.equal(found[1], alone[1])
        assert torch.equal(found[0], alone[0])


def test_few_source_images_for_many_target_images():
    """Pruning is tried, for the queries are many, on a sample of very few rows."""
    for num in (1, 2, 9, 150, 255, 256, 257):
        queries, source = random_histograms(90, 6, 10, 0), random_histograms(num, 6, 10, 1)
        for prune in PRUNE:
            found = find(queries, source, min(3, num), prune=prune, all_in_double=True)
            assert_brute_force(found, queries, source, min(3, num))


@pytest.mark.parametrize("prune", PRUNE)
def test_where_guesses_are_all_that_can_be_among_the_nearest(prune):
    """The bound is so tight that it rules every other pair out."""
    queries, source = (alike_histograms(num, 40, 25, seed, noise=0) for seed, num in enumerate((150, 1500)))
    assert_brute_force(find(queries, source, 5, prune=prune, all_in_double=True), queries, source, 5)


@pytest.mark.parametrize("prune", PRUNE)
@pytest.mark.parametrize("total", [1e-4, 1e4, 1e6])
def test_weights_of_any_total_find_the_same(total, prune):
    center, noise = alike_histograms(1, 24, 20, 0).double(), torch.rand(440, 24, 20, dtype=torch.float64)
    found = center * (1 + 1e-3 * noise)
    found /= found.sum(2, keepdim=True)
    queries, source, weights = found[:40], found[40:], total * even(24)
    nearest = find(queries, source, 7, weights=weights, prune=prune, all_in_double=True)
    assert_brute_force(nearest, queries, source, 7, weights)


def test_copies_of_long_descriptors_come_by_index():
    """Wherever a pair falls when distances are measured some at a time."""
    for seed, num_queries in ((0, 1), (2, 2)):
        source = random_histograms(40, 96, 100, seed)
        source[1::2] = source[::2].clone()
        queries = random_histograms(num_queries, 96, 100, seed + 100)
        indices = find(queries, source, 40, all_in_double=True)[1]
        assert (indices[:, 1::2] == indices[:, ::2] + 1).all()


# the pruned scan


def packed(queries, source):
    root = root_of(even(queries.shape[1]), queries.shape[2])
    return queries.flatten(1), Packed(queries.flatten(1), rows(source), root), rows(source)


def test_where_pruning_does_not_pay_everything_is_scanned():
    arguments = packed(random_histograms(100, 20, 20, 0), random_histograms(500, 20, 20, 1))
    assert pruned_scan(*arguments, 5, None) is None
    assert pruned_scan(*arguments, 5, False) is None
    assert isinstance(pruned_scan(*arguments, 5, True), Nearest)
    few = packed(alike_histograms(40, 40, 25, 0), alike_histograms(1500, 40, 25, 1))
    assert pruned_scan(*few, 5, None) is None, "sketching the source costs more than so few queries' scan"


def test_where_pruning_pays_most_pairs_are_never_compared(monkeypatch):
    queries, source = alike_histograms(200, 40, 25, 0), alike_histograms(2000, 40, 25, 1)
    compared, original = [], bounds._single_scores
    monkeypatch.setattr(bounds, "_single_scores", lambda *args: (compared.append(len(args[2])), original(*args))[1])
    found = find(queries, source, 5, all_in_double=True)
    assert_brute_force(found, queries, source, 5)
    assert 200 * 5 <= sum(compared) < 0.2 * 200 * 2000


def hellinger(queries, source, weights):
    """Twice the weighted squared difference of the roots, in float64: what a bound is a projection of."""
    a, b = np.sqrt(queries.double().numpy()), np.sqrt(source.double().numpy())
    squared = ((a[:, None] - b[None]) ** 2).sum(3)
    return 2 * (squared * weights.numpy()).sum(2)


def test_a_query_whose_distances_were_foreseen_too_short_is_asked_again(monkeypatch):
    queries, source = alike_histograms(60, 40, 25, 0), alike_histograms(900, 40, 25, 1)
    asked, original = [], bounds._below
    monkeypatch.setattr(bounds, "_below", lambda *args: (asked.append(len(args[0])), original(*args))[1])
    monkeypatch.setattr(bounds, "LIKELY", 0.0)
    assert_brute_force(find(queries, source, 6, prune=True, all_in_double=True), queries, source, 6)
    assert len(asked) == 2
    assert 0 < asked[1] < asked[0]


def test_what_float32_errs_by_loses_no_neighbor_that_was_ruled_out(monkeypatch):
    queries, source = alike_histograms(60, 6, 6, 0), alike_histograms(150, 6, 6, 1)
    errors = 0.03 * torch.rand(150, generator=torch.Generator().manual_seed(2))  # large, and all rather too near
    original = bounds._single_scores
    monkeypatch.setattr(bounds, "_single_scores", lambda *args: original(*args) + errors[args[3]])
    for margin in ("LIKELY", "CLEAR"):
        monkeypatch.setattr(bounds, margin, 0.0)
    assert_brute_force(find(queries, source, 6, prune=True, all_in_double=True), queries, source, 6)


def test_of_so_few_filters_that_all_coordinates_are_fewer_than_asked_for_nothing_is_pruned():
    queries, source = random_histograms(400, 3, 100, 0), random_histograms(3000, 3, 100, 1)
    assert pruned_scan(*packed(queries, source), 5, None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_empty_bins_are(dtype):
    queries, source = (random_histograms(num, 4, 6, num).to(dtype) for num in (5, 60))
    source[::3, :, 1] = 0
    found = symmetric_kl_neighbors(queries, source, k=4)
    expected = symmetric_kl_neighbors(queries.double(), source.double(), k=4)
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0])


def bounds_of(sketcher, queries, source, num=None):
    mine, theirs = sketcher(queries.flatten(1)), sketcher(source.flatten(1))
    if num:
        mine, theirs = sketcher.shortened(mine, num), sketcher.shortened(theirs, num)
    a, b = mine[:, :-1].double().numpy(), theirs[:, :-1].double().numpy()
    return 2 * ((a[:, None] - b[None]) ** 2).sum(2)


def peaked(num, filters, bins, seed, smoothing):
    """All mass in one bin, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((num, filters, bins), smoothing)
    found.scatter_add_(2, torch.randint(bins, (num, filters, 1), generator=generator), torch.ones(num, filters, 1))
    return found / found.sum(2, keepdim=True)


HARD = {
    "random": lambda seed: random_histograms(40, 12, 20, seed),
    "alike": lambda seed: alike_histograms(40, 12, 20, seed),
    "one-hot": lambda seed: peaked(40, 12, 20, seed, 1e-3),
    "sharper than float32": lambda seed: peaked(40, 12, 20, seed, 1e-12),
    "few numbers": lambda seed: peaked(40, 2, 3, seed, 1e-2),
    "one row": lambda seed: random_histograms(1, 12, 20, seed),
    "all the same": lambda seed: random_histograms(1, 12, 20, 5).expand(40, -1, -1),
}


@pytest.mark.parametrize("name", HARD)
def test_a_bound_is_never_above_the_distance(name):
    """Also of rows that the projection was not fitted to, of other kinds, and of the first coordinates alone."""
    sample, queries, source = (HARD[name](seed) for seed in range(3))
    filters, bins = sample.shape[1:]
    weights = torch.rand(filters, dtype=torch.float64)
    weights /= weights.sum()
    sketcher = Sketcher(sample.flatten(1), root_of(weights, bins), bins)
    if (filters, bins) == (12, 20):
        source = torch.cat([source, *(HARD[other](9) for other in ("random", "alike", "one-hot"))])
    true = selective.all_distances(queries.double().numpy(), source.double().numpy(), weights.numpy())
    squared = hellinger(queries, source, weights)
    assert (squared <= true + 1e-12).all()
    for num in (None, *bounds.COORDINATES):
        found = bounds_of(sketcher, queries, source, num)
        assert (found <= squared + 2 * bounds.ROUNDING).all()
        mine, theirs = sketcher(queries.flatten(1)), sketcher(source.flatten(1))
        scores = bounds._scores(mine, theirs, residuals=True)
        assert (2 * (mine[:, -1:] - scores) <= torch.from_numpy(true) + 2 * bounds.ROUNDING).all()


def test_a_bound_of_all_coordinates_is_the_squared_difference_of_roots():
    """Bins few enough to be kept whole, rows few enough to be spanned: nothing is lost."""
    sample = random_histograms(30, 6, 8, 0)
    weights = torch.rand(6, dtype=torch.float64)
    weights /= weights.sum()
    sketcher = Sketcher(sample.flatten(1), root_of(weights, 8), 8)
    expected = hellinger(sample, sample, weights)
    assert bounds_of(sketcher, sample, sample) == pytest.approx(expected, abs=1e-5)
    assert expected.max() > 0.1


def test_a_bound_of_histograms_as_images_give_them_is_close():
    queries, source = alike_histograms(20, 24, 20, 0, noise=0.0), alike_histograms(600, 24, 20, 1, noise=0.0)
    sketcher = Sketcher(source[::2].flatten(1), root_of(even(24), 20), 20)
    true = selective.all_distances(queries.double().numpy(), source.double().numpy(), even(24).numpy())
    found = bounds_of(sketcher, queries, source, 32)
    assert np.median(found / true) > 0.7


# parts


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_running_best_are_those_of_all(k):
    scores = torch.randn(9, 120, generator=torch.Generator().manual_seed(0))
    nearest = Nearest(9, k)
    for start, stop in ((0, 3), (3, 50), (50, 51), (51, 120)):
        nearest.add(scores[:, start:stop], start)
    best = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    order = nearest.scores.argsort(1, descending=True)
    assert nearest.indices.gather(1, order).tolist() == best.tolist()
    assert nearest.scores.gather(1, order).tolist() == np.take_along_axis(scores.numpy(), best, 1).tolist()


def test_the_running_best_take_single_pairs_too():
    scores = torch.randn(9, 120, generator=torch.Generator().manual_seed(0))
    asked = torch.rand(9, 120, generator=torch.Generator().manual_seed(1)) < 0.4
    asked[4] = False
    nearest = Nearest(9, 5)
    for part in (slice(0, 30), slice(30, 120)):
        query, place = asked[:, part].nonzero(as_tuple=True)
        nearest.add_pairs(query, place + part.start, scores[:, part][query, place])
    nearest.add_pairs(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0))
    for query in range(9):
        open_to = [i for i in range(120) if asked[query, i]]
        best = sorted(open_to, key=lambda i: -float(scores[query, i]))[:5]
        assert sorted(nearest.indices[query].tolist()) == (sorted(best) if query != 4 else [-1] * 5)
    assert (nearest.scores[4] == -torch.inf).all()


def test_packed_products_are_distances(monkeypatch):
    queries, source = random_histograms(5, 6, 10, 0), random_histograms(40, 6, 10, 1)
    expected = selective.all_distances(queries.double().numpy(), source.double().numpy(), even(6).numpy())
    for held in (search.CACHED, 200):
        monkeypatch.setattr(search, "CACHED", held)
        _, pack, _ = packed(queries, source)
        for part in (slice(0, 40), slice(10, 20)):
            products, own = pack.rows(source[part].flatten(1))
            found = pack.distances(pack.queries @ products.T - own)
            assert found.numpy() == pytest.approx(expected[:, part], abs=1e-5)


def test_a_pairs_distance_is_the_same_in_whatever_company():
    """To the bit: alone, shuffled, repeated, in blocks, with two threads, of long descriptors and short ones."""
    for filters, bins in ((4, 7), (96, 100)):
        p, q = random_histograms(12, filters, bins, 0), random_histograms(15, filters, bins, 1)
        root = root_of(even(filters), bins)
        one, other = (part.flatten() for part in torch.meshgrid(torch.arange(12), torch.arange(15), indexing="ij"))
        every = pair_distances(p.flatten(1), q.flatten(1), root, (one, other))
        true = selective.all_distances(p.double().numpy(), q.double().numpy(), even(filters).numpy())
        assert every.view(12, 15).numpy() == pytest.approx(true, rel=1e-9)
        order = torch.randperm(180)[:77]
        assert torch.equal(pair_distances(p.flatten(1), q.flatten(1), root, (one[order], other[order])), every[order])
        for pair in order[:9]:
            alone = (one[pair : pair + 1], other[pair : pair + 1])
            assert torch.equal(pair_distances(p.flatten(1), q.flatten(1), root, alone)[0], every[pair])
            cut = (p.flatten(1)[alone[0]], q.flatten(1)[alone[1]])
            zero = torch.zeros(1, dtype=torch.int64)
            assert torch.equal(pair_distances(*cut, root, (zero, zero))[0], every[pair])
        torch.set_num_threads(2)
        assert torch.equal(pair_distances(p.flatten(1), q.flatten(1), root, (one, other)), every)
        torch.set_num_threads(1)


@pytest.mark.parametrize("has_avx512", [True, False])
def test_logs_are_weighted_by_the_root(has_avx512, monkeypatch):
    monkeypatch.setattr("lightning_transfer.methods.selective.distances.HAS_AVX512", has_avx512)
    histograms, weights = random_histograms(3, 2, 4, 0, torch.float64), torch.tensor([0.25, 0.75]).double()
    p, log_p = with_logs(histograms.flatten(1), root_of(weights, 4))
    root = np.sqrt(np.repeat(weights.numpy(), 4))
    assert p.numpy() == pytest.approx(histograms.flatten(1).numpy() * root)
    assert log_p.numpy() == pytest.approx(np.log(histograms.flatten(1).numpy() + 2.2e-16) * root)


def test_blocks_cover_the_source_once():
    class Long(OnDemand):
        def __len__(self):
            return 10_000_001

    found = search.blocks(Long(random_histograms(1, 48, 100, 0), 1), 4800)
    assert found[0][0] == 0
    assert found[-1][1] == 10_000_001
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(found))
    assert max(stop - start for start, stop in found) == max(search.LEAST, search.BLOCK // 4800)


# the approximate search


def approximately(queries, source, k):
    filters, bins = queries.shape[1:]
    finder = Finder(
        rows(source),
        torch.arange(len(source)),
        root=root_of(even(filters), bins),
        device=search.CPU,
        is_approximate=True,
    )
    distances, indices = finder.nearest(rows(queries), k)
    return distances, indices, finder.recall(rows(queries), indices)


@pytest.mark.parametrize("k", [1, 8, 60])
def test_of_few_images_the_approximate_neighbors_are_the_exact_ones(k):
    queries, source = random_histograms(12, 6, 10, 0), random_histograms(min(60, 8 * k), 6, 10, 1)
    distances, indices, recall = approximately(queries, source, k)
    assert_brute_force((distances, indices), queries, source, k)
    assert recall == 1


@pytest.mark.parametrize("num_queries", [20, 150])
@pytest.mark.parametrize("asked", [1, 8])
def test_recall_is_the_share_of_true_neighbors_that_was_found(monkeypatch, num_queries, asked):
    monkeypatch.setattr(approximate, "ASKED", asked)
    small_blocks(monkeypatch, block=40 * 120)
    queries, source = random_histograms(num_queries, 12, 10, 0), random_histograms(900, 12, 10, 1)
    distances, indices, recall = approximately(queries, source, 6)
    true_distances, true = selective.nearest(queries.numpy(), source.numpy(), even(12).numpy(), 6)
    measured = np.linspace(0, num_queries - 1, min(num_queries, 32)).astype(int)
    found = [len({*true[i].tolist()} & {*indices[i].tolist()}) / 6 for i in measured]
    assert recall == pytest.approx(sum(found) / len(found))
    assert 0.1 < recall < 1 if asked == 1 else recall > 0.5
    every = selective.all_distances(queries.double().numpy(), source.double().numpy(), even(12).numpy())
    assert distances.numpy() == pytest.approx(np.take_along_axis(every, indices.numpy(), 1), rel=1e-9)
    assert (distances.diff(dim=1) >= 0).all()
    assert (distances.numpy() >= true_distances - 1e-9).all()
    assert all(len(set(row)) == 6 for row in indices.tolist())


def test_approximate_neighbors_of_images_are_nearly_all_found():
    queries, source = alike_histograms(60, 24, 12, 0), alike_histograms(1500, 24, 12, 1)
    source[700] = queries[3]
    distances, indices, recall = approximately(queries, source, 10)
    assert recall > 0.9
    assert indices[3, 0] == 700
    assert distances[3, 0] == 0
    assert math.isclose(recall, round(recall * 600) / 600)
