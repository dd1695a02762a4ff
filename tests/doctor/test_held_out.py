"""Labels of validation and test images are found if they are not the training's or the head's; others are not."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import lightning_transfer as lt
from tests.doctor import projects
from tests.doctor.projects import CLASSES, NUM, Clean, Images, Listed, Named, Unlisted, named


def examined(data, module=None, **options):
    return lt.doctor(Clean() if module is None else module, data, **options)


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        for place in range(5):
            pixels = np.random.default_rng([ord(name[0]), len(str(root)), place]).integers(
                0, 256, (32, 32, 3), np.uint8
            )
            Image.fromarray(pixels).save(root / name / f"{place}.png")
    return ImageFolder(root, transforms.ToTensor())


def test_a_class_folder_that_only_validation_has_shifts_its_labels_and_the_fix_is_one(tmp_path):
    train = folders(tmp_path / "train", ["bee", "cat", "dog"])
    val = folders(tmp_path / "validation", ["ant", "bee", "cat", "dog"])
    test = projects.Scaled(1.0, 12, 3)
    (finding,) = examined(Images(train=train, val=val, test=test)).findings
    assert finding.name == "classes with other numbers"
    assert finding.where == "the training and the validation images"
    assert finding.found == (
        "classes of the training images are 0 (bee), 1 (cat), 2 (dog); those of the validation images are 0 (ant), "
        "1 (bee), 2 (cat), 3 (dog)"
    )
    assert "def find_classes(self, directory): return train.classes, train.class_to_idx" in finding.fix

    class Fixed(ImageFolder):
        def find_classes(self, directory):
            return train.classes, train.class_to_idx

    fixed = Fixed(tmp_path / "validation", val.transform)
    assert examined(Images(train=train, val=fixed, test=test)).findings == ()


@pytest.mark.parametrize(
    ("val", "found"),
    [
        (lambda: Named("Xabcd"), "0 (X), 1 (a), 2 (b), 3 (c), 4 (d)"),
        (lambda: Subset(Named("Xabcd"), range(10)), "0 (X), 1 (a), 2 (b), 3 (c), 4 (d)"),
        (lambda: Named("abde"), "2 (d), 3 (e)"),  # a class is missing
        (lambda: Named("abcdX"), "4 (X)"),
        (lambda: Named("abcde", a=1, b=0, c=2, d=3, e=4), "0 (b), 1 (a)"),
        (lambda: Named("vwxyz"), "0 (v), 1 (w), 2 (x), 3 (y), 4 (z)"),
    ],
)
def test_classes_with_other_numbers_are_found(val, found):
    (finding,) = examined(named(val())).findings
    assert finding.name == "classes with other numbers"
    assert finding.found.endswith(f"those of the validation images are {found}")


@pytest.mark.parametrize(
    "val",
    [
        lambda: Named("abcde"),
        lambda: Named("abcd"),  # the last class is missing
        lambda: Named("acde", a=0, c=2, d=3, e=4),
        lambda: Named("abXcde", a=0, b=1, X=1, c=2, d=3, e=4),  # two folders of one class
        lambda: Named("abcdef"),  # a class of its own, without an image
        lambda: projects.Mapped("Xabcd"),
    ],
)
def test_classes_with_the_same_numbers_are_not(val):
    assert str(examined(named(val()))) == "No findings in Clean."


def test_folders_of_one_class_may_differ():
    data = named(Named("abcde", a=0, young_b=1, b=1, c=2, d=3, e=4))
    data.train.class_to_idx = {"a": 0, "b": 1, "old_b": 1, "c": 2, "d": 3, "e": 4}
    assert str(examined(data)) == "No findings in Clean."


@pytest.mark.parametrize(
    "odd",
    [
        {"target_transform": int},
        {"target_transform": int, "class_to_idx": {"X": 0, "a": 1}},
        {"classes": 5},
        {"class_to_idx": {"a": None}, "classes": "b"},
    ],
)
def test_names_are_not_compared_if_a_transform_maps_the_labels_or_if_they_are_no_names(odd):
    data = named(Named("Xabcd"))
    vars(data.val).update(odd)
    assert str(examined(data)) == "No findings in Clean."


@pytest.mark.parametrize(
    ("labels", "said", "fix"),
    [
        ([1 + n % CLASSES for n in range(12)], "labels run from 1 to 5; 5 outputs know 0 to 4: labels", "labels - 1"),
        ([*[n % CLASSES for n in range(11)], 9], "labels run from 0 to 9; 5 outputs know 0 to 4", "of the training im"),
        ([*[n % CLASSES for n in range(11)], -1], "labels run from -1 to 4; 5 outputs know 0 to 4", "ignore_index=-1"),
    ],
)
@pytest.mark.parametrize("kind", [Listed, Unlisted])
@pytest.mark.parametrize("name", ["val", "test"])
def test_held_out_labels_that_do_not_fit_are_found(labels, said, fix, kind, name):
    (finding,) = examined(Images(**{name: kind(labels, seed=2)})).findings
    assert finding.name == "labels do not fit"
    assert finding.where.startswith("the validation images, a" if name == "val" else "the test images, a")
    assert finding.found.startswith(said)
    assert fix in finding.fix


def test_held_out_labels_of_a_dictionary_are_found():
    shape = projects.shapes.DictBatches
    data = Images(shape)
    data.val.labels = data.val.labels + 1
    (finding,) = examined(data, shape(), adapt=lambda batch: (batch["image"], batch["label"])).findings
    assert finding.found.startswith("labels run from 1 to 5")


def test_a_label_that_the_criterion_ignores_fits():
    data = Images(train=Listed([*[n % CLASSES for n in range(43)], *[255] * 5]), val=Listed([0, 4, 255] * 4, seed=2))
    assert examined(data, projects.Ignores()).findings == ()


def test_images_without_a_label_may_be_left_out_by_the_step_or_have_none():
    some, none = [*[n % CLASSES for n in range(11)], -1], [-1] * 12
    assert examined(Images(val=Listed(some, seed=2)), projects.LeavesOut()).findings == ()
    assert examined(Images(test=Listed(none, seed=2))).findings == ()


def test_labels_that_fit_nowhere_are_one_finding():
    data = Images(
        train=projects.numbered(lambda label: label + 1), val=Listed([1 + n % CLASSES for n in range(12)], seed=2)
    )
    (finding,) = examined(data).findings
    assert "training" in finding.where


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("cat", "the labels of the validation images: Image 0 of the data, an Unlisted, is ("),
        (OSError("truncated"), "the labels of the validation images: OSError: truncated"),
        (torch.ones(3), "the labels of the validation images: Image 0 of the data"),
    ],
)
def test_labels_that_cannot_be_read_are_named(label, said):
    found = examined(Images(val=Unlisted([label] * 12)))
    assert found.findings == ()
    assert said in str(found)


def test_labels_of_many_images_are_not_read_one_by_one(monkeypatch):
    monkeypatch.setattr("lightning_transfer.examining.images.MOST", NUM)
    found = examined(Images(val=Unlisted([0] * (NUM + 1))))
    assert f"the labels of the validation images: {NUM + 1} images do not list them" in str(found)


class Raises(Listed):
    @property
    def class_to_idx(self):
        raise RuntimeError("not prepared")


def test_a_list_of_classes_that_raises_is_named():
    found = examined(Images(val=Raises([n % CLASSES for n in range(12)], seed=2)))
    assert found.not_checked == ("the labels of the validation images: RuntimeError: not prepared",)
