"""A source task says at construction what cannot be right."""

import pickle

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.datasets import known_labels
from lightning_transfer.naming import nesting
from tests import toys


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((DataLoader(toys.source_data()),), {"num_classes": 7}, r"SourceTask\(loader.dataset"),
        ((Stream(),), {"num_classes": 7}, r"Stream, has no length.*list\(stream\)"),
        (([],), {"num_classes": 7}, "dataset list is empty"),
        (("imagenet/train",), {"num_classes": 7}, r"'imagenet/train' is a path; load it"),
        ((toys.source_data(),), {"head": "fc"}, r"head='fc' is not a module; .*SourceTask\(head=model.fc\)"),
        ((toys.source_data(),), {}, r"head=pretrained_classifier.*from_timm"),
        ((toys.source_data(),), {"num_classes": 1}, "num_classes=1"),
        ((toys.source_data(),), {"num_classes": 7, "head": nn.Linear(8, 6)}, "num_classes=7, but head has 6"),
        ((toys.source_data(),), {"head": nn.Identity()}, r"Identity has no Linear.*reset_classifier"),
        ((toys.source_data(),), {"num_classes": 7, "batch_size": 0}, "batch_size=0"),
        ((toys.source_data(),), {"num_classes": 7, "num_workers": -1}, "num_workers=-1"),
        ((toys.source_data(),), {"num_classes": 7, "seed": 0.5}, "seed=0.5"),
        ((toys.source_data(),), {"num_classes": 7, "forward": "jiont"}, "Did you mean 'joint'"),
        ((toys.source_data(),), {"num_classes": 7, "batchnorm": "frozen"}, "Known: 'protect', 'update'"),
    ],
)
def test_refused_at_construction(arguments, options, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.SourceTask(*arguments, **options)


def test_the_pretrained_classifier_is_kept_as_a_copy():
    model = timm.create_model("resnet10t", num_classes=7)
    task = lt.SourceTask.from_timm(model, toys.source_data(), batch_size=2)
    assert (task.head.weight == model.fc.weight).all()
    model.fc.weight.data.zero_()
    assert task.head.weight.abs().sum() > 0
    assert task.batch_size == 2


def test_a_name_is_loaded_with_pretrained_weights(monkeypatch):
    asked = {}

    def create_model(name, **options):
        asked.update(name=name, **options)
        return toys_timm()

    def toys_timm():
        return real("resnet10t", num_classes=7)

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    lt.SourceTask.from_timm("resnet10t", toys.source_data())
    assert asked == {"name": "resnet10t", "pretrained": True}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "has no get_classifier"),
        (
            toys.source_data(),
            r"model is a TensorDataset; write SourceTask.from_timm\(network, dataset\)",
        ),
        (timm.create_model("resnet10t", num_classes=0), "from_timm"),
        (timm.create_model("deit_tiny_distilled_patch16_224", img_size=32), "2 classifiers"),
    ],
)
def test_models_without_one_classifier_are_refused(model, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.SourceTask.from_timm(model, toys.source_data())


def test_a_new_head_is_drawn_from_the_seed_alone():
    heads = []
    for program_seed, seed in ((1, 0), (2, 0), (2, 3)):
        torch.manual_seed(program_seed)
        heads.append(
            lt.SourceTask(toys.source_data(), num_classes=7, seed=seed).make_head(nn.Linear(8, 2), "fc").weight
        )
    assert (heads[0] == heads[1]).all()
    assert (heads[1] != heads[2]).any()


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_convolution_that_is_kept_gives_one_row_an_image(is_whole):
    pictures, conv = torch.randn(3, 8, 4, 4), nn.Conv2d(8, 7, 1)
    kept = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1)) if is_whole else conv
    task = lt.SourceTask(toys.source_data(), head=kept)
    target_head = nn.Sequential(nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1))
    found = task.make_head(target_head, "classifier")(pictures)
    by_hand = torch.einsum("nchw,kc->nkhw", pictures, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    torch.testing.assert_close(found, (by_hand.relu() if is_whole else by_hand).mean((2, 3)))


def test_pickles():
    task = pickle.loads(pickle.dumps(lt.SourceTask(toys.source_data(), head=toys.source_head())))
    assert task.num_images == 20


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (TensorDataset(torch.rand(3, 1), torch.tensor([4, 5, 6])), [4, 5, 6]),
        (Subset(TensorDataset(torch.rand(3, 1), torch.tensor([4, 5, 6])), [2, 0]), [6, 4]),
        (ConcatDataset([TensorDataset(torch.rand(3, 1), torch.tensor([4, 5, 6]))]), None),
        ([(0, 1)], None),
    ],
)
def test_labels_that_a_dataset_lists(dataset, labels):
    found = known_labels(dataset)
    assert labels == (None if found is None else found.tolist())


@pytest.mark.parametrize(
    ("labels", "num_classes", "kind", "message"),
    [
        (
            [0, 1, 2, 3, 6, 5],
            3,
            lt.TransferConfigError,
            "label 3; .* num_classes=3 .* pass num_classes=7 if",
        ),
        ([0, -1, 2], 3, lt.TransferConfigError, r"sample 1 has label -1; .*num_classes=3 .*Drop unlabelled samples\.$"),
        ([0, 6, 3], 1000, UserWarning, "num_classes=1000, but source labels run to 6. Pass num_classes=7."),
        ([0, 1, 2, 3], 5, None, ""),  # a subset may lack the last class
    ],
)
def test_a_number_of_classes_that_the_labels_contradict_is_named(labels, num_classes, kind, message):
    data = TensorDataset(torch.rand(len(labels), 3), torch.tensor(labels))
    task, kept = (
        lt.SourceTask(data, **given) for given in ({"num_classes": num_classes}, {"head": nn.Linear(8, 1000)})
    )
    if kind is None:
        task.check_all_labels(num_classes)
    else:
        with pytest.warns(kind, match=message) if kind is UserWarning else pytest.raises(kind, match=message):
            task.check_all_labels(num_classes)
    if min(labels) == 0:
        kept.check_all_labels(1000)  # a pretrained head may know more classes


def test_a_label_above_a_kept_head_names_the_likely_cause():
    data = TensorDataset(torch.rand(2, 3), torch.tensor([0, 3]))
    with pytest.raises(lt.TransferConfigError, match="label 3; .* knows 0 to 2.*If you called reset_classifier"):
        lt.SourceTask(data, head=nn.Linear(8, 3)).check_all_labels(3)


def test_listed_labels_of_the_torchvision_kind():
    class Listed(list):
        targets = (0, 1)
        target_transform = None

    assert known_labels(Listed([0, 1])).tolist() == [0, 1]
    Listed.target_transform = int
    assert known_labels(Listed([0, 1])) is None
    Listed.target_transform, Listed.targets = None, ["cat", "dog"]
    assert known_labels(Listed([0, 1])) is None


def test_structure_shows_nesting():
    assert nesting((torch.zeros(2), [1] * 6, {"a": None})) == "(Tensor(2,), [int, int, int, int, ...], {'a': NoneType})"
