"""From images to lists: every neighbor is brute force's, and what cannot be right is refused."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective import descriptions, finding, forecast, pictures, select, store
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import select_neighbors
from lightning_transfer.progress import no_progress
from tests.reference import rounds as by_hand
from tests.selective.select_run import Faulty, quick_bank
from tests.toys import Recorder


def smooth(num, seed, side=24, channels=3):
    """Pictures of soft shapes, with pixels that float32 adds up exactly."""
    coarse = torch.rand(num, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
    return (pixels * 64).round() / 64


def found_in(target, source, *, k=3, bank=None, said=None, cache=None, num_workers=0, **options):
    say = (lambda line: None) if said is None else said.append
    scan = Scan(cache=cache, num_workers=num_workers, progress=no_progress, say=say)
    return select_neighbors(target, source, k=k, bank=bank or quick_bank(), scan=scan, **options)


@pytest.fixture
def edges(monkeypatch):
    """The bins' edges of the selection that a test makes."""
    seen = []
    binning = select.Binning
    monkeypatch.setattr(select, "Binning", lambda edges: seen.append(edges.double().numpy()) or binning(edges))
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_gabor_neighbors_are_those_of_brute_force(edges, channels):
    target, source = smooth(4, 1, channels=channels), smooth(30, 2, channels=channels)
    selection = found_in(target, source, k=6, bank="gabor")
    grey = [images.mean(1, keepdim=True).numpy() for images in (target, source)]
    filters = [by_hand.gabor_filters(size) for size in (7, 11, 15, 19)]
    responses = [[by_hand.convolve(images, some) for some in filters] for images in grey]
    expected = by_hand.distances(*responses, edges[0])
    assert edges[0].shape == (48, 11)  # 656 / 4 positions a filter on average: 12 bins
    # a response on the border of two bfloat16 numbers may count one bin further: float32 against float64
    chosen = np.take_along_axis(expected, selection.indices.numpy(), 1)
    assert selection.distances.numpy() == pytest.approx(chosen, rel=1e-3)
    assert chosen == pytest.approx(np.sort(expected, 1)[:, :6], rel=1e-3)
    assert all(len({*row}) == 6 for row in selection.indices.tolist())


def test_a_networks_neighbors_are_those_of_brute_force_to_the_last_digit(edges):
    """Its weights and pixels are multiples of a power of two, so that float32 is exact."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False))
    for layer in (network[0], network[2]):
        layer.weight.data = torch.randint(-2, 3, layer.weight.shape).float() / 2
    target, source = smooth(5, 1, side=12), smooth(60, 2, side=12)
    bank = lt.FilterBank.from_model(network, layers=["0", "2"], normalize=False)
    selection = found_in(target, source, k=20, bank=bank)
    first = [by_hand.convolve(images.numpy(), network[0].weight.detach().numpy()) for images in (target, source)]
    second = [by_hand.convolve(np.maximum(maps, 0), network[2].weight.detach().numpy()) for maps in first]
    expected = by_hand.distances(*map(list, zip(first, second, strict=True)), edges[0])
    order = np.argsort(expected, axis=1, kind="stable")[:, :20]
    assert selection.indices.numpy().tolist() == order.tolist()
    assert selection.distances.numpy() == pytest.approx(np.take_along_axis(expected, order, 1), rel=1e-7)
    assert selection.distances.dtype == torch.float64


def test_bins_share_the_target_out_and_the_source_does_not_move_them(edges):
    target = smooth(6, 1)
    for source in (smooth(20, 2), smooth(20, 3)):
        found_in(target, source, bins=5)
    assert (edges[0] == edges[1]).all()
    weight = quick_bank().model[0].weight.detach().numpy()
    responses = by_hand.convolve(target.numpy(), weight)
    shares = by_hand.histograms([responses], edges[0]).mean(0)
    assert shares.shape == (4, 5)
    assert shares == pytest.approx(np.full((4, 5), 0.2), abs=0.03)


def test_a_planted_copy_is_the_nearest_and_is_reported():
    target, source = smooth(5, 1), smooth(40, 2)
    source[17], source[31] = target[2], target[4].flip(-1)
    with pytest.warns(UserWarning, match=r"2 target images .*\(2, 17\), \(4, 31\).*protect=\[test_dataset\]"):
        selection = found_in(target, source, bank=symmetric_bank())
    assert selection.indices[[2, 4], 0].tolist() == [17, 31]
    assert selection.distances[[2, 4], 0].tolist() == [0, 0]
    assert selection.duplicates.tolist() == [[2, 17], [4, 31]]
    assert (selection.distances[[0, 1, 3]] > 0).all()


def symmetric_bank():
    """To which a mirrored picture looks as it does."""
    network = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False))
    weight = torch.tensor([[[0.0, 1, 0], [0, -1, 0], [0, 0, 0]], [[0, 0, 0], [1, -2, 1], [0, 0, 0]]])
    network[0].weight.data = weight[:, None].expand(-1, 3, -1, -1).contiguous()
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


def as_jpeg(pixels):
    """Compressed and read again."""
    file = io.BytesIO()
    Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(file, "JPEG", quality=70)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("bank", ["gabor", "network"])
@pytest.mark.parametrize("altered", [lambda pixels: pixels, lambda pixels: pixels.flip(-1), as_jpeg])
def test_protected_images_are_found_and_left_out(altered, bank):
    target, source, tests = smooth(8, 1), smooth(90, 2), smooth(6, 3)
    source[50] = altered(tests[4])
    source[[11, 70]] = source[50].clone()
    said = []
    others = smooth(3, 4)
    bank = "gabor" if bank == "gabor" else quick_bank()
    selection = found_in(target, source, k=60, protect=[others, tests], said=said, bank=bank)
    assert selection.dropped.tolist() == [[7, 11], [7, 50], [7, 70]]  # the fifth image behind three others
    assert not {11, 50, 70} & {*selection.indices.flatten().tolist()}
    assert any("show protected images and are left out: 3, for example (7, 11)" in line for line in said)


def striped(num, seed):
    """Pictures of slanted stripes, whose mirrored copies have other responses to slanted filters."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    slant, width, start = torch.rand(3, num, 1, 1, generator=generator)
    along = column * torch.cos(torch.pi * slant) + row * torch.sin(torch.pi * slant)
    waves = 0.25 * torch.sin((0.3 + 0.9 * width) * along + 6.28 * start)
    return (waves[:, None] + 0.25 + smooth(num, seed) / 2).clamp(0, 1)


def test_mirrored_protected_images_are_found_where_filters_see_them_as_others():
    target, source, tests = striped(4, 1), striped(300, 2), striped(12, 3)
    source[10:22] = tests.flip(-1)
    found = found_in(target, source, protect=[tests], bank="gabor").dropped
    assert {(number, 10 + number) for number in range(12)} <= {*map(tuple, found.tolist())}


def test_every_copy_of_a_protected_image_is_left_out():
    target, source, tests = smooth(4, 1), smooth(90, 2), smooth(2, 3)
    source[20:31] = tests[1].clone()
    selection = found_in(target, source, k=79, protect=[tests])
    assert selection.dropped.tolist() == [[1, image] for image in range(20, 31)]
    assert not {*range(20, 31)} & {*selection.indices.flatten().tolist()}


def test_what_is_left_is_searched_exactly_as_without_the_dropped(edges):
    target, source, tests = smooth(4, 1), smooth(30, 2), smooth(2, 3)
    source[8] = tests[0]
    found = found_in(target, source, k=7, protect=[tests])
    kept = [index for index in range(30) if index != 8]
    alone = found_in(target, source[kept], k=7)
    assert found.indices.tolist() == torch.tensor(kept)[alone.indices].tolist()
    assert torch.equal(found.distances, alone.distances)


def test_more_neighbors_than_there_are_is_refused_before_and_after_some_are_left_out():
    target, source, tests = smooth(2, 1), smooth(30, 2), smooth(2, 3)
    with pytest.raises(lt.TransferConfigError, match="k=31 exceeds the 30 source images; pass k<=30"):
        found_in(target, source, k=31)
    source[8] = tests[0]
    with pytest.raises(lt.TransferConfigError, match="k=30 exceeds the 29 source images that are left when 1 are"):
        found_in(target, source, k=30, protect=[tests])
    assert found_in(target, source, k=29, protect=[tests]).indices.shape == (2, 29)


def test_unreadable_source_images_are_skipped_counted_and_listed():
    target, source = smooth(4, 1), smooth(300, 2)
    said = []
    data = TensorDataset(source, torch.arange(300))
    selection = found_in(target, Faulty(data, bad={7, 150, 299}), k=280, said=said)
    assert selection.unreadable.tolist() == [7, 150, 299]
    assert not {7, 150, 299} & {*selection.indices.flatten().tolist()}
    assert selection.source_labels.tolist() == [-1 if i in (7, 150, 299) else i for i in range(300)]
    readable = [index for index in range(300) if index not in (7, 150, 299)]
    alone = found_in(target, source[readable], k=280)
    assert selection.indices.tolist() == torch.tensor(readable)[alone.indices].tolist()
    text = "\n".join(said)
    assert "source image 150 cannot be used: OSError: truncated file" in text
    assert "3 of 300 source images cannot be used and are left out: [7, 150, 299]" in text


def test_an_image_that_could_not_be_read_for_a_moment_is_not_left_out_of_the_cache_for_good(tmp_path):
    target, source = smooth(4, 1), smooth(200, 2)
    data = Faulty(source, bad={7, 150})
    cache = tmp_path / "chosen.safetensors"
    assert found_in(target, data, k=190, cache=cache).unreadable.tolist() == [7, 150]
    assert found_in(target, data, k=190, cache=cache).unreadable.tolist() == [7, 150]  # still: the cache serves
    data.bad = {7}
    with pytest.warns(UserWarning, match=r"Source images \[150\] could not be read .* can be read now"):
        again = found_in(target, data, k=190, cache=cache)
    expected = found_in(target, data, k=190)
    assert again.unreadable.tolist() == [7]
    assert torch.equal(again.indices, expected.indices)
    assert lt.Selection.load(cache).unreadable.tolist() == [7]


def test_above_one_percent_unreadable_is_an_error_that_names_one_and_its_reason():
    with pytest.raises(lt.TransferConfigError, match=r"More than 1% .*image 3: OSError: truncated file.*Repair"):
        found_in(smooth(4, 1), Faulty(smooth(200, 2), bad={3, 8, 21}), k=2)


@pytest.mark.parametrize("spoil", ["unreadable", "nan"])
def test_an_unreadable_target_image_is_refused_with_its_index(spoil):
    target = smooth(9, 1)
    if spoil == "nan":
        target[5, 0, 0, 0] = torch.nan
    data = Faulty(target, bad={5}) if spoil == "unreadable" else target
    reason = "OSError: truncated file" if spoil == "unreadable" else "NaN or infinite pixels"
    with pytest.raises(lt.TransferConfigError, match=f"Target image 5 cannot be used: .*{reason}"):
        found_in(data, smooth(20, 2))


def test_a_source_of_which_nothing_can_be_read_says_so_whatever_pixels_the_target_has():
    samples = [{"image": image} for image in smooth(20, 2)]
    with pytest.raises(lt.TransferConfigError, match=r".*found \{'image': Tensor.*adapt="):
        found_in((smooth(4, 1) - 0.5) / 0.25, samples)


@pytest.mark.parametrize("which", ["target", "source"])
def test_one_normalised_side_is_refused(which):
    sides = {"target": smooth(4, 1), "source": smooth(20, 2)}
    sides[which] = (sides[which] - 0.5) / 0.25
    with pytest.raises(lt.TransferConfigError, match="one is normalised and the other is not"):
        found_in(**sides)


class Noisy(Dataset):
    """Random augmentation."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index] + 0.1 * torch.rand(())


@pytest.mark.parametrize(
    ("which", "argument"), [("target", "target="), ("source", "SourceTask(unaugmented=)"), ("protect", "augmentation")]
)
def test_random_transforms_are_refused_with_the_argument_to_write(which, argument):
    sides = {"target": smooth(4, 1), "source": smooth(20, 2), "protect": smooth(4, 3)}
    sides[which] = Noisy(sides[which])
    with pytest.raises(lt.TransferConfigError, match=f"transform is random.*{re.escape(argument)}"):
        found_in(**{**sides, "protect": [sides["protect"]]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"bins": 1}, "bins=1"),
        ({"search": "aproximate"}, "search='aproximate' is not known. Did you mean 'approximate'"),
        ({"bank": "gabour"}, "bank='gabour' is not known"),
        ({"source": smooth(0, 2)}, "source dataset Tensor is empty"),
        ({"target": iter([])}, "target.*no length"),
    ],
)
def test_what_cannot_be_right_is_named(options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        found_in(**{"target": smooth(4, 1), "source": smooth(20, 2), **options})


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("indices", "distances", "target_labels", "source_labels", "duplicates", "dropped", "unreadable")
    )


def test_loader_workers_change_nothing():
    data = Faulty(TensorDataset(smooth(150, 2), torch.arange(150)), bad={70})
    none, two = (found_in(smooth(5, 1), data, num_workers=workers) for workers in (0, 2))
    assert same(none, two)


def test_the_training_precision_around_it_changes_nothing():
    target, source, bank = smooth(5, 1), smooth(40, 2), quick_bank()
    expected = found_in(target, source)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = found_in(target, source, bank=bank)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)
    assert torch.is_grad_enabled()


def test_the_programs_random_state_is_left_alone():
    bank = quick_bank()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found_in(smooth(5, 1), smooth(40, 2), bank=bank)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_second_run_reads_no_source_image_beyond_a_few_and_finds_the_same(tmp_path):
    cache, target, data = tmp_path / "kept/chosen.safetensors", smooth(5, 1), smooth(400, 2)
    first = found_in(target, data, cache=cache)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # the folder of work is gone
    said, again = [], Recorder(data)
    second = found_in(target, again, cache=cache, said=said)
    assert len({*again.loaded}) <= 80
    assert same(first, second)
    assert second.fingerprint == first.fingerprint
    assert any("is used: Selection(5 target images, 3 neighbors each" in line for line in said)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda run: run["target"].flip(0), "target: 5 images .* there, 5 images .* now"),
        (lambda run: torch.cat([run["target"][:4], smooth(1, 9)]), "target: "),
        (lambda run: {"source": smooth(40, 3)}, "source: 40 images .* there, 40 images .* now"),
        (lambda run: {"source": run["source"].flip(0)}, "source: "),
        (lambda run: {"source": run["source"][:39]}, "source: 40 images .* there, 39 images .* now"),
        (lambda run: {"bank": symmetric_bank()}, "bank: "),
        (lambda run: {"bins": 7}, "bins: .* there, 7 now"),
        (lambda run: {"k": 4}, "neighbors listed: 3 there, 4 now"),
        (lambda run: {"search": "approximate"}, "search: exact there, approximate now"),
        (lambda run: {"protect": [smooth(3, 8)]}, "protected: none there, 3 images .* now"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_the_difference(tmp_path, change, difference):
    run = {"target": smooth(5, 1), "source": smooth(40, 2), "cache": tmp_path / "chosen"}
    found_in(**run)
    kept = run["cache"].read_bytes()
    changed = change(run)
    changed = changed if isinstance(changed, dict) else {"target": changed}
    with pytest.raises(lt.TransferConfigError, match=rf"holds another selection: .*{difference}.*Delete it, or pass"):
        found_in(**{**run, **changed})
    assert run["cache"].read_bytes() == kept


def test_lines_tell_what_the_work_takes_before_it_starts():
    data, read = Recorder(smooth(40, 2)), []

    class Said(list):
        def append(self, line):
            read.append(len(data.loaded))
            super().append(line)

    said = Said()
    found_in(smooth(5, 1), data, said=said)
    assert re.search(r"among 40 source images for 5 target images: .* GB of memory, .* GB on disk", said[1])
    assert re.search(r"At the target's [\d,]+ images a second the source takes about \d+ s\.", said[1])
    assert read[1] <= len(data.loaded) - 40


def test_after_a_first_part_it_says_how_long_the_rest_takes(monkeypatch):
    """By a clock that goes a second with each image, and with each search a minute and two seconds a source row."""
    data, now, said = Recorder(smooth(64, 2)), [0.0], []
    search = forecast.exact_neighbors
    monkeypatch.setattr(store, "BLOCK", 8)
    monkeypatch.setattr(pictures, "READ", 8)

    def searched(queries, source, **options):
        now[0] += 60 + 2 * len(source)
        return search(queries, source, **options)

    monkeypatch.setattr(forecast, "exact_neighbors", searched)
    monkeypatch.setattr(forecast, "MEASURED", 4)
    clock = SimpleNamespace(monotonic=lambda: now[0] + len(data.loaded))
    monkeypatch.setattr(descriptions, "time", clock)
    monkeypatch.setattr(forecast, "time", clock)
    found_in(smooth(5, 1), data, k=3, said=said)
    (line,) = [line for line in said if line.startswith("Measured")]
    pair = (60 + 2 * 8) / (4 * 3)  # measured in float64
    searching = 2 * (60 + 4 * 2 + 64 * 2) + pair * 5 * 3  # two searches of the source
    images = (64 - 8) + 5 + 5 + 50  # to describe, with the mirrored target; to compare: the target and ten for each
    assert "the first 8 source images: 1 images a second" in line
    assert f"about {(searching + images) / 60:.1f} min, of which the search takes {searching / 60:.1f} min." in line


def test_of_an_approximate_search_no_time_is_said_and_one_recall(monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 8)
    monkeypatch.setattr(pictures, "READ", 8)
    said = []
    found_in(smooth(5, 1), smooth(64, 2), k=3, said=said, search="approximate", protect=[smooth(4, 3)])
    assert [line.endswith("without the search.") for line in said if line.startswith("Measured")] == [True]
    assert len([line for line in said if line.startswith("The approximate search found")]) == 1


@pytest.mark.parametrize(("is_leaking", "expected"), [(False, [64]), (True, [64, 63])])
def test_an_approximate_search_builds_an_index_once_for_the_same_source_images(monkeypatch, is_leaking, expected):
    built, index = [], finding.ApproximateIndex
    monkeypatch.setattr(finding, "ApproximateIndex", lambda rows, root: (built.append(len(rows)), index(rows, root))[1])
    source, protected = smooth(64, 2), smooth(4, 3)
    if is_leaking:
        source[5] = protected[1]
    found_in(smooth(5, 1), source, search="approximate", protect=[protected])
    assert built == expected


def test_near_duplicates_take_one_search_more(monkeypatch):
    """Of the mirrored target: what is nearest to the target as it is was searched before, if lists are long enough."""
    searched, search = [], finding.exact_neighbors
    monkeypatch.setattr(finding, "exact_neighbors", lambda *a, **o: (searched.append(o["k"]), search(*a, **o))[1])
    target, source = smooth(5, 1), smooth(40, 2)
    source[[4, 9]] = torch.stack([target[1], target[2].flip(2)])
    for k, expected in ((6, [6, 5]), (3, [3, 5, 5])):
        with pytest.warns(UserWarning, match="2 target images"):
            assert found_in(target, source, k=k).duplicates.tolist() == [[1, 4], [2, 9]]
        assert searched == expected
        searched.clear()


def test_duplicates_of_target_and_protected_are_told_apart():
    target, source = smooth(5, 1), smooth(40, 2)
    source[3], source[9] = target[0], target[1]
    with pytest.warns(UserWarning, match="1 target images"):
        selection = found_in(target, source, protect=[target[1:2]])
    assert selection.dropped.tolist() == [[0, 9]]
    assert selection.duplicates.tolist() == [[0, 3]]


def test_a_target_image_with_two_copies_counts_once():
    target, source = smooth(5, 1), smooth(40, 2)
    source[[4, 9]] = target[1]
    with pytest.warns(UserWarning, match="^1 target images"):
        assert found_in(target, source).duplicates.tolist() == [[1, 4], [1, 9]]


def test_source_images_too_large_to_count_are_refused():
    """The width of a count is the target's; a flat image of 300 pixels gives one number 65,536 times and more."""
    target, source = smooth(3, 1, side=32), [*smooth(3, 2, side=32), torch.full((3, 300, 300), 0.5)]
    with (
        pytest.warns(UserWarning, match="sides of about 32 pixels, source images of 153: .*Resize both to one size"),
        pytest.raises(lt.TransferConfigError, match="Images 0 to 3 have more positions .* Resize the source"),
    ):
        found_in(target, source, k=2, bank="gabor")


def test_a_bank_is_named_by_what_it_runs():
    """Not by a classifier behind it, which may be new in every process."""
    names = []
    for classes, seed, stride in ((5, 0, 1), (7, 0, 1), (5, 1, 1), (5, 0, 2)):
        torch.manual_seed(seed)
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=stride), torch.nn.Conv2d(4, 4, 3))
        network = torch.nn.Sequential(body, torch.nn.Flatten(), torch.nn.Linear(16, classes))
        names.append(lt.FilterBank.from_model(network, layers=["0.0"]).describe())
    assert names[0] == names[1]
    assert len({*names}) == 3


class Scaled(torch.nn.Module):
    """Runs what it registers last before its convolution, and has a number of its own."""

    def __init__(self, weight, gain):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(3)
        self.norm.weight.data.fill_(weight)
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, images):
        return self.conv(self.norm(images) * self.gain)


def test_a_bank_is_named_by_all_that_changes_its_responses():
    banks = [
        lt.FilterBank.from_model(Scaled(*given), layers=["conv"], normalize=False)
        for given in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0))
    ]
    names, image = [bank.describe() for bank in banks], torch.rand(1, 3, 8, 8)
    assert not torch.equal(banks[0](image)[0], banks[1](image)[0])
    assert names[0] == names[3]
    assert len({*names}) == 3
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3))
    of_normed = lt.FilterBank.from_model(torch.nn.Sequential(normed), layers=["0"], normalize=False)
    before = of_normed.describe()
    with torch.no_grad():
        of_normed.model[0].parametrizations.weight.original0.mul_(2)
    assert of_normed.describe() != before


def test_a_bank_whose_responses_are_not_numbers_is_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    network[0].weight.data[1] = torch.nan
    bank = lt.FilterBank.from_model(network, layers=["0"], normalize=False)
    with pytest.raises(lt.TransferConfigError, match="The bank's responses are not numbers"):
        found_in(smooth(3, 1, side=32), smooth(4, 2, side=32), k=2, bank=bank)
