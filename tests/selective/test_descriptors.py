"""Responses counted as bfloat16 numbers, edges read from those counts, and pictures described in any company."""

import numpy as np
import pytest
import torch
from torch import nn

import lightning_transfer as lt
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.descriptors import Binning, ResponseCounts, num_bins, to_histograms
from lightning_transfer.methods.selective.pictures import Picture, Pictures, scaled
from tests.reference import selective

CPU = torch.device("cpu")


def random_responses(num, filters, side, seed, *, ties=False):
    """On scales that differ by filter; with ties, few different numbers, both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(num, filters, side, side, generator=generator)
    if ties:
        found = (2 * found).round() / 4
        found[found == 0] = torch.where(torch.rand(int((found == 0).sum()), generator=generator) < 0.5, 0.0, -0.0)
    return found * torch.logspace(-3, 2, filters)[:, None, None]


def counted(responses, first=0, num_filters=None):
    found = ResponseCounts(num_filters or responses.shape[1], CPU)
    found.add(responses, first)
    return found


def of_filter(responses, number):
    """The numbers that are counted of a filter's responses."""
    return selective.bfloat16(responses[:, number].numpy())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("bins", [2, 7, 30])
def test_counts_are_those_of_a_loop(bins, ties):
    """Also of responses on an edge, outside of all edges, and of both zeros."""
    responses = random_responses(3, 4, 6, seed=0, ties=ties)
    edges = random_responses(1, 4, 6, seed=1)[0].flatten(1)[:, : bins - 1].bfloat16().float().sort(1).values
    edges[1, bins // 2 - 1] = 0.0
    edges = edges.sort(1).values
    responses[0, :, 0, :2] = torch.stack([edges[:, 0], edges[:, -1]], 1)
    responses[1, :, 0, :4] = torch.tensor([0.0, -0.0, 1e30, -1e30])
    found = Binning(edges).counts(responses, 0)
    assert found.shape == (3, 4, bins)
    for image, number in np.ndindex(3, 4):
        expected = selective.counts(selective.bfloat16(responses[image, number].numpy()), edges[number].numpy())
        assert found[image, number].tolist() == expected.tolist()


def test_a_response_is_counted_as_the_bfloat16_number_next_to_it():
    """Rounded, not cut off: what is nearer to an edge than to the number below it counts as on the edge."""
    edge = torch.tensor([[1.0]])
    responses = torch.tensor([1 - 2**-9 + 1e-6, 1 - 2**-9 - 1e-4, 1 - 1e-7, 1.0, -5.0]).view(1, 1, 1, 5)
    assert Binning(edge).counts(responses, 0).tolist() == [[[2, 3]]]


def test_filters_of_a_later_layer_have_their_own_edges():
    responses = random_responses(2, 5, 6, seed=0)
    edges = counted(responses).edges(6)
    whole = Binning(edges).counts(responses, 0)
    assert torch.equal(Binning(edges).counts(responses[:, 3:], 3), whole[:, 3:])
    assert torch.equal(Binning(edges).counts(responses[:, :3], 0), whole[:, :3])
    apart = counted(responses[:, :2], 0, num_filters=5)
    apart.add(responses[:, 2:], 2)
    assert torch.equal(apart.edges(6), edges)


def test_counting_in_parts_is_counting_at_once():
    responses = random_responses(6, 4, 5, seed=0)
    parts = counted(responses[:1])
    parts.add(responses[1:4], 0)
    parts.add(responses[4:, :, 2:], 0)
    parts.add(responses[4:, :, :2], 0)
    assert torch.equal(parts.counts, counted(responses).counts)
    assert parts.per_filter == 6 * 25
    edges = parts.edges(5)
    one_by_one = torch.cat([Binning(edges).counts(responses[i : i + 1], 0) for i in range(6)])
    assert torch.equal(Binning(edges).counts(responses, 0), one_by_one)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("bins", [2, 5, 12])
def test_no_edge_could_share_the_responses_out_more_evenly(bins, ties):
    responses = random_responses(5, 4, 7, seed=0, ties=ties)
    edges = counted(responses).edges(bins)
    assert edges.shape == (4, bins - 1)
    assert (edges.diff(dim=1) >= 0).all()
    for number in range(4):
        values = of_filter(responses, number)
        possible = selective.splits(values)
        for place, edge in enumerate(edges[number].tolist(), start=1):
            wanted = place * len(values.ravel()) / bins
            assert edge == selective.bfloat16(np.array([edge]))[0]
            assert abs(int((values < edge).sum()) - wanted) == np.abs(possible - wanted).min()


def test_every_bin_holds_the_same_share_where_responses_differ():
    """A thousand different bfloat16 numbers in ten bins: a hundred in each."""
    values = torch.arange(16000, 17000, dtype=torch.int16)[torch.randperm(1000)].view(torch.bfloat16).float()
    responses = torch.cat([values, -values]).view(1, 2, 25, 40)
    edges = counted(responses).edges(10)
    assert (Binning(edges).counts(responses, 0) == 100).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_background_of_zeros_is_told_from_what_is_above_it_and_below(sign):
    responses = torch.zeros(2, 1, 4, 4)
    responses[0] = -0.0
    responses[:, :, 2:] = float(sign)
    found = Binning(counted(responses).edges(2)).counts(responses, 0)
    assert found.tolist() == [[[8, 8]], [[8, 8]]]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e-5, 1e38, 3.3895314e38, -3.3895314e38])
def test_constant_responses_fall_into_one_bin(value):
    responses = torch.full((2, 3, 4, 4), value)
    edges = counted(responses).edges(4)
    found = Binning(edges).counts(responses, 0)
    assert not edges.isnan().any()
    assert found.amax(2).tolist() == [[16] * 3] * 2
    assert found.sum(2).tolist() == [[16] * 3] * 2
    assert Binning(edges).counts(responses + 1, 0).sum() == 2 * 3 * 16


def test_edges_are_unchanged_by_what_is_counted_into_bins():
    responses = random_responses(3, 4, 6, seed=0)
    edges = counted(responses).edges(5)
    before, binning = edges.clone(), Binning(edges)
    found = binning.counts(responses, 0)
    binning.counts(100 * responses, 0)
    assert torch.equal(edges, before)
    assert torch.equal(binning.counts(responses, 0), found)
    assert torch.equal(binning.to(CPU).counts(responses, 0), found)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_histograms_are_shares_of_counts(smoothing):
    counts = torch.randint(0, 50, (3, 4, 6), dtype=torch.int32)
    before = counts.clone()
    found = to_histograms(counts, smoothing=smoothing)
    raised = counts.double().numpy() + smoothing
    assert found.numpy() == pytest.approx(raised / raised.sum(2, keepdims=True), rel=1e-6)
    assert torch.equal(counts, before)
    assert (to_histograms(counts) > 0).all()


@pytest.mark.parametrize(
    ("positions", "bins"), [(1, 2), (4, 2), (8, 2), (9, 3), (99, 9), (100, 10), (9999.9, 99), (10000, 100), (1e9, 100)]
)
def test_bins_are_the_root_of_positions_from_2_to_100(positions, bins):
    assert num_bins(positions) == bins


# pictures described


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2))


BANKS = {
    "gabor": lambda: FilterBank.gabor(sizes=(5, 9), orientations=3),
    "network": lambda: FilterBank.from_model(network(), ["0", "2"]),
}
each_bank = pytest.mark.parametrize("bank", BANKS)


def pictures(num, shapes=((3, 20, 24),), seed=0):
    """Pictures whose shapes take turns."""
    generator = torch.Generator().manual_seed(seed)
    return Pictures([torch.rand(shapes[i % len(shapes)], generator=generator) for i in range(num)], "source")


def described(bank, data, *, workers=0, order=None):
    """The describer, its edges, and counts of all pictures in the dataset's order."""
    data.num_workers = workers
    describer = Describer(BANKS[bank](), CPU)
    counts, most = describer.response_counts(data.batches(range(len(data))))
    edges = counts.edges(6)
    order = order or list(range(len(data)))
    found = torch.zeros(len(data), describer.num_filters, 6, dtype=torch.int32)
    for indices, batch in data.batches(order):
        found[indices] = describer.counts(indices, batch, Binning(edges))
    return describer, edges, found, most


@each_bank
def test_counts_of_pictures_are_those_of_a_loop_over_their_responses(bank):
    data = pictures(3)
    describer, _, found, most = described(bank, data)
    layers = describer.bank(torch.stack([data[i].pixels for i in range(3)]))
    assert most == max(layer.shape[2] * layer.shape[3] for layer in layers)
    first = 0
    for layer in layers:
        for number in range(layer.shape[1]):
            values = of_filter(layer.detach(), number)
            edges = counted(layer[:, number : number + 1]).edges(6)[0].numpy()
            for image in range(3):
                assert found[image, first + number].tolist() == selective.counts(values[image], edges).tolist()
        first += layer.shape[1]


@each_bank
def test_a_picture_is_counted_the_same_in_whatever_company(bank):
    """To the bit: alone, in batches of other sizes, at another place, among pictures of other shapes."""
    data = pictures(70, shapes=((3, 20, 24), (3, 20, 24), (3, 17, 30), (1, 20, 24)))
    describer, edges, found, _ = described(bank, data)
    binning = Binning(edges)
    for chosen in ([5], [69, 5, 0], list(range(40, 70)), list(range(69, -1, -1))):
        assert torch.equal(describer.counts(chosen, [data[i] for i in chosen], binning), found[chosen])
    assert torch.equal(described(bank, data, order=torch.randperm(70).tolist())[2], found)


def test_pictures_of_one_shape_are_always_as_many_at_once():
    """How a convolution adds up may depend on how many there are, on this machine or on another one."""
    data = pictures(75, shapes=((3, 20, 24), (3, 20, 24), (3, 17, 30)))
    describer, edges, _, _ = described("gabor", data)
    seen, forward = [], describer.bank.forward
    describer.bank.forward = lambda images: (seen.append(tuple(images.shape)), forward(images))[1]
    for chosen in (range(75), [3], [2, 4, 5]):
        describer.counts(chosen, [data[i] for i in chosen], Binning(edges))
    assert len(seen) > 5
    assert len(set(seen)) == 2


@each_bank
def test_workers_and_threads_change_no_count(bank):
    data = pictures(66, shapes=((3, 20, 24), (3, 33, 19)))
    _, edges, found, most = described(bank, data)
    for threads, workers in ((2, 0), (1, 2)):
        torch.set_num_threads(threads)
        _, other_edges, other, other_most = described(bank, data, workers=workers)
        assert torch.equal(other, found)
        assert torch.equal(other_edges, edges)
        assert other_most == most


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_stay_bytes_on_their_way_and_are_counted_as_floats_are(workers):
    """Grey and colour, sizes in turn, and one that a worker cannot stack with the others."""
    shapes = ((3, 20, 24), (1, 20, 24), (3, 33, 19))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, shapes[i % 3], generator=generator, dtype=torch.uint8) for i in range(70)]
    images[40] = torch.full((3, 20, 24), torch.nan)
    data = Pictures(images, "source", num_workers=workers)
    floats = Pictures([image / 255 for image in images], "source")
    _, edges, _, _ = described("gabor", floats)
    describer, binning = Describer(BANKS["gabor"](), CPU), Binning(edges)
    for indices, batch in data.batches(range(70)):
        assert {batch[i].pixels.dtype for i in range(len(indices)) if indices[i] != 40} == {torch.uint8}
        alone = describer.counts(indices, [data[i] for i in indices], binning)
        assert torch.equal(describer.counts(indices, batch, binning), alone)
        assert torch.equal(alone, describer.counts(indices, [floats[i] for i in indices], binning))
        assert all(
            i == 40 or torch.equal(scaled(one.pixels), data[i].pixels) for i, one in zip(indices, batch, strict=True)
        )


def test_a_picture_that_could_not_be_read_has_no_counts():
    data = pictures(3)
    describer, edges, found, _ = described("gabor", data)
    binning = Binning(edges)
    batch = [data[0], Picture("it is torn"), data[2]]
    counts = describer.counts([0, 1, 2], batch, binning)
    assert counts[1].sum() == 0
    assert torch.equal(counts[[0, 2]], found[[0, 2]])
    assert describer.counts([1], [Picture("it is torn")], binning).sum() == 0


def test_the_index_of_a_picture_that_is_too_small_is_named():
    data = pictures(5, shapes=((3, 20, 24), (3, 20, 24), (3, 4, 24)))
    with pytest.raises(lt.TransferConfigError, match="largest Gabor filter has 9 x 9") as caught:
        described("gabor", data)
    assert caught.value.__notes__ == ["This happened with images [2]."]


def test_the_indices_of_normalised_pictures_are_named():
    data = Pictures([torch.rand(3, 20, 20), torch.rand(3, 21, 20) - 1], "source")
    with pytest.raises(lt.TransferConfigError, match="already normalised") as caught:
        described("network", data)
    assert caught.value.__notes__ == ["This happened with images [1]."]
