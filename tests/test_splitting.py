"""Images that are held out of training: of every class alike, groups together."""

import numpy as np
import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.datasets import groups_of
from lightning_transfer.reading import labels_of
from lightning_transfer.splitting import held_out
from tests import toys


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_every_class_gives_its_share(share, seed):
    labels = np.random.default_rng(seed).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    out = held_out(labels, share, seed=seed)
    assert out == sorted(set(out))
    for label in range(4):
        inside = [index for index in out if labels[index] == label]
        assert abs(len(inside) - share * labels.count(label)) <= 0.5
    assert out == held_out(labels, share, seed=seed)
    assert out != held_out(labels, share, seed=seed + 1)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides(seed):
    random = np.random.default_rng(seed)
    groups = random.integers(0, 40, 400).tolist()
    labels = [group % 5 for group in groups]
    out = set(held_out(labels, 0.25, groups=groups, seed=seed))
    assert not {groups[index] for index in out} & {groups[index] for index in range(400) if index not in out}
    for label in range(5):
        total = labels.count(label)
        assert 0.1 * total < sum(labels[index] == label for index in out) < 0.4 * total


def test_too_few_images_are_refused():
    with pytest.raises(lt.TransferConfigError, match="0 would be held out"):
        held_out([0, 1, 2], 0.2)
    with pytest.raises(lt.TransferConfigError, match="in 1 groups"):
        held_out([0] * 10, 0.2, groups=["a"] * 10)


def test_groups_follow_a_subset_and_are_one_for_each_image():
    class Grouped(torch.utils.data.TensorDataset):
        groups = "aabbcc"

    data = Grouped(torch.rand(6, 3), torch.zeros(6, dtype=torch.int64))
    assert groups_of(data) == list("aabbcc")
    assert groups_of(torch.utils.data.Subset(data, [5, 0])) == ["c", "a"]
    assert groups_of(toys.target_data()) is None
    both = torch.utils.data.ConcatDataset([data, toys.target_data(), data])
    assert groups_of(both)[:6] == groups_of(both)[-6:] == list("aabbcc")
    assert len({*groups_of(both)}) == 3 + 24
    assert groups_of(torch.utils.data.ConcatDataset([toys.target_data(), toys.target_data()])) is None
    Grouped.groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert groups_of(data) == [0, 0, 1, 1, 2, 2]
    both.groups = ["x"] * 36
    assert groups_of(both) == ["x"] * 36  # its own come first
    subset = torch.utils.data.Subset(data, [5, 0])
    subset.groups = ["y", "z"]
    assert groups_of(subset) == ["y", "z"]
    Grouped.groups = dict(enumerate("aabbcc"))
    with pytest.raises(lt.TransferConfigError, match=r"Grouped.groups is a dict for 6 images; give a list"):
        groups_of(data)
    Grouped.groups = "ab"
    with pytest.raises(lt.TransferConfigError, match="names 2 groups for 6 images"):
        groups_of(data)


def test_the_places_of_a_repeated_image_are_one_group():
    """As where a rare class is oversampled: otherwise a probe would be asked of images that it has seen."""
    data, other = toys.images(6, 2, seed=0), toys.images(3, 2, seed=1)
    rare = torch.utils.data.Subset(data, [4, 5])
    concat = torch.utils.data.ConcatDataset
    assert groups_of(torch.utils.data.Subset(data, [0, 1, 0, 5])) == [0, 1, 0, 2]
    assert groups_of(torch.utils.data.Subset(torch.utils.data.Subset(data, [3, 3, 2]), [2, 1, 0])) == [0, 1, 1]
    assert groups_of(concat([data, rare, rare])) == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    assert groups_of(concat([data, other, torch.utils.data.Subset(other, [2])])) == [*range(9), 8]
    endless = torch.utils.data.Dataset()  # which has no length
    assert groups_of(torch.utils.data.Subset(endless, [7, 3, 7])) == [0, 1, 0]
    twice = torch.utils.data.Subset(data, [5, 5, 0])
    assert groups_of(concat([torch.utils.data.Subset(data, [0, 0, 1]), twice])) == [0, 0, 1, 2, 2, 0]
    assert groups_of(concat([twice, data])) == [0, 0, 1, 1, 2, 3, 4, 5, 0]
    assert groups_of(concat([twice, torch.utils.data.Subset(other, [2, 2])])) == [0, 0, 1, 2, 2]
    other.groups = ["x", "y", "y"]
    assert len({*groups_of(concat([other, twice, data]))}) == 2 + 6
    found = groups_of(concat([data, other, rare]))
    assert found[6:9] == ["x", "y", "y"]
    assert found[9:] == found[4:6]
    assert len({*found}) == 6 + 2
    assert groups_of(concat([rare, torch.utils.data.Subset(data, [0, 1])])) is None


class Unlisted(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.inner = dataset

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


def test_labels_are_those_listed_or_loaded():
    data = toys.target_data()
    expected = data.tensors[1].tolist()
    assert labels_of(data) == labels_of(Unlisted(data)) == expected
    assert labels_of(torch.utils.data.Subset(data, [3, 1])) == [expected[3], expected[1]]
    with pytest.raises(lt.TransferConfigError, match=r"Image 0 .* is Tensor\(3,\); expected \(image, class number\)"):
        labels_of(Unlisted(torch.rand(4, 3)))


@pytest.mark.parametrize(("domain", "label"), [(0, 2), (np.int64(0), torch.tensor(2))], ids=["int", "tensor"])
def test_of_an_unlisted_triple_no_entry_is_taken_for_the_label(domain, label):
    def triples(*rest):
        return Unlisted([(torch.rand(3), *rest)] * 4)

    both = r"\(batch\[0\], batch\[1\]\).*or .*\(batch\[0\], batch\[2\]\)"
    with pytest.raises(lt.TransferConfigError, match=rf"Image 0 .*Entries \[1, 2\].*{both}.*dataset.targets"):
        labels_of(triples(domain, label))
    assert labels_of(triples("a.png", label)) == labels_of(triples(label, "a.png")) == [2] * 4
    assert labels_of(triples(domain, label), lambda sample: (None, [sample[2]])) == [2] * 4


class Mapped(torch.utils.data.Dataset):
    """Lists raw numbers, and gives others."""

    def __init__(self, samples):
        self.targets = [10 * index for index in range(6)]
        self.samples = samples

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.samples(index)


def test_labels_that_samples_map_are_read_from_the_samples():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert labels_of(Mapped(lambda index: (torch.rand(2), index % 3))) == [0, 1, 2, 0, 1, 2]
    assert labels_of(Mapped(lambda index: (torch.zeros(2), 10 * index))) == [0, 10, 20, 30, 40, 50]
    assert labels_of(Mapped(lambda index: (torch.zeros(2), 0, 10 * index))) == [0, 10, 20, 30, 40, 50]
    read = labels_of(Mapped(lambda index: {"label": index % 2}), lambda sample: (None, torch.tensor([sample["label"]])))
    assert read == [0, 1, 0, 1, 0, 1]
    torch.manual_seed(3)
    labels_of(Mapped(lambda index: (torch.rand(2), 10 * index)))
    assert torch.equal(torch.get_rng_state(), before)
