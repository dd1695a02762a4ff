"""Each planted problem is found, alone and where it is; nothing is found in clean projects, and all is as it was."""

import copy
import pickle
import random
import types
from typing import ClassVar

import lightning.pytorch as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

import lightning_transfer as lt
from lightning_transfer.__main__ import main
from tests import toys
from tests.doctor import projects
from tests.doctor.projects import CLASSES, NUM, Clean, Images, OldImages
from tests.field import shapes
from tests.field.runs import anatomy
from tests.methods import one

# name of the finding, where, what is said, and the project
PLANTED = {
    "a network in eval mode": (
        "eval mode",
        "model.bn1, model.layer1.0.bn1",
        "12 layers",
        lambda: [projects.evaluated("model")],
    ),
    "BatchNorm in eval mode": (
        "eval mode",
        "model.bn1, model.layer1.0.bn2",
        "BatchNorm",
        lambda: [projects.evaluated("model.bn1", "model.layer1.0.bn2")],
    ),
    "Dropout in eval mode before a trained head": (
        "eval mode",
        "drop",
        "Dropout is off",
        lambda: [projects.DropsNothing()],
    ),
    "frozen BatchNorm": (
        "frozen BatchNorm drifts",
        "model.bn1, model.layer1.0.bn1",
        "statistics change",
        lambda: [projects.frozen()],
    ),
    "a backbone in no optimizer": (
        "in no optimizer",
        "backbone.cls_token",
        "no optimizer holds them",
        lambda: [projects.OnlyTheHead()],
    ),
    "the other namespace's callback": (
        "two Lightning namespaces",
        "LearningRateMonitor",
        "these are of pytorch_lightning",
        lambda: [Clean(), Images(), toys.trainer([pl.callbacks.LearningRateMonitor()])],
    ),
    "the other namespace's Trainer": (
        "two Lightning namespaces",
        "Trainer",
        "OldNamespace is of pytorch_lightning, these are of lightning.pytorch",
        lambda: [shapes.OldNamespace(), OldImages(), toys.trainer()],
    ),
    "the other namespace's DataModule": (
        "two Lightning namespaces",
        "OldImages",
        "of lightning.pytorch",
        lambda: [Clean(), OldImages()],
    ),
    "a network among the hyperparameters": (
        "unsafe hyperparameters",
        "module.hparams: net, optimizer",
        "weights_only",
        lambda: [shapes.InjectedNetwork()],
    ),
    "a path among the hyperparameters": (
        "unsafe hyperparameters",
        "datamodule.hparams: folder",
        "weights_only",
        lambda: [Clean(), projects.ImagesWithPath()],
    ),
    "two optimizers": (
        "several optimizers",
        "configure_optimizers",
        "fit raises an error",
        lambda: [projects.TwoOptimizers()],
    ),
    "averaging before a method": (
        "order of callbacks",
        "SoftFinetuning",
        "StochasticWeightAveraging copies the module before",
        lambda: [
            Clean(),
            Images(),
            toys.trainer([L.callbacks.StochasticWeightAveraging(0.1), one(has_source=True).callback()]),
        ],
    ),
    "a test image that is trained on": (
        "leak",
        "the test images",
        "1 of 12 is also in the training data, equal or nearly equal, for example (3, 7)",
        lambda: [Clean(), Images(test=projects.copied(3, projects.first_image()))],
    ),
    "a test image that a sampler draws": (
        "leak",
        "the test images",
        "for example (3, 7)",
        lambda: [Clean(), projects.Sampled(test=projects.copied(3, projects.first_image()))],
    ),
    "a mirrored and darker validation image": (
        "leak",
        "the validation images",
        "for example (5, 7) (validation, training)",
        lambda: [Clean(), Images(val=projects.copied(5, projects.nearly(projects.first_image())))],
    ),
    "images from 0 to 1": (
        "images are not normalised",
        "model",
        "pixels run from 0 to 1; timm's weights of this ResNet expect -2.1 to 2.6",
        lambda: [projects.Pretrained(), projects.all_scaled(1.0)],
    ),
    "images from 0 to 255": (
        "images are not normalised",
        "model",
        "pixels run from 0 to 255; timm's",
        lambda: [projects.Pretrained(), projects.all_scaled(255.0)],
    ),
    "images with ImageNet's Normalize for a network that expects another": (
        "images are normalised otherwise",
        "model",
        "pixels run from -2.12 to 2.63; timm's weights of this ResNet expect -1 to 1",
        lambda: [projects.PretrainedOtherwise(), projects.all_normalised(*projects.IMAGENET)],
    ),
    "images that are normalised twice": (
        "images are normalised otherwise",
        "model",
        "timm's weights of this ResNet expect -2.1 to 2.6",
        lambda: [projects.Pretrained(), projects.all_normalised(*projects.IMAGENET, change=projects.normalised)],
    ),
    "test images that are scaled otherwise": (
        "images prepared in two ways",
        "the training and the test images",
        "those of the test images from 0 to 255",
        lambda: [Clean(), Images(test=projects.Scaled(255.0, 12, 3))],
    ),
    "validation images that are not normalised": (
        "images prepared in two ways",
        "the training and the validation images",
        "those of the validation images from 0 to 4",
        lambda: [Clean(), Images(val=projects.Scaled(4.0, 12, 3))],
    ),
    "a loss times the batch size": (
        "the loss is not a mean",
        "training_step",
        "twice",
        lambda: [shapes.LossTimesBatch()],
    ),
    "a sum with weights and smoothing": (
        "the loss is not a mean",
        "training_step",
        "twice",
        lambda: [projects.Summed()],
    ),
    "labels from 1": (
        "labels do not fit",
        "the training images, a Listed",
        "labels run from 1 to 5; 5 outputs know 0 to 4: labels count from 1",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: label + 1))],
    ),
    "labels from 1 in the first batch": (
        "labels do not fit",
        "cross_entropy in training_step",
        "labels run from 1 to 5",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: label or 5))],
    ),
    "labels from 1 that no list shows": (
        "labels do not fit",
        "cross_entropy in training_step",
        "labels run from 1 to 5; 5 outputs know 0 to 4: labels count from 1",
        lambda: [projects.CountsFromOne()],
    ),
    "labels from 1 and a larger head": (
        "labels do not fit",
        "the training images, a Listed",
        "output 0 of 6 is never right",
        lambda: [projects.OneTooMany(), Images(train=projects.numbered(lambda label: label + 1))],
    ),
    "a label of no step that is looked at": (
        "labels do not fit",
        "the training images",
        "labels run from 0 to 9; 5 outputs know 0 to 4",
        lambda: [Clean(), Images(train=projects.Listed([*[n % 5 for n in range(34)], *[9] * 5, 0]))],
    ),
    "labels of int32": (
        "labels do not fit",
        "cross_entropy in training_step",
        "torch.int32",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: torch.tensor(label, dtype=torch.int32)))],
    ),
    "labels of float": (
        "labels do not fit",
        "cross_entropy in training_step",
        "torch.float32",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: torch.tensor(float(label))))],
    ),
    "labels of a column": (
        "labels do not fit",
        "cross_entropy in training_step",
        "shape (8, 1)",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: torch.tensor([label])))],
    ),
    "labels 1 and 2 of one logit": (
        "labels do not fit",
        "binary_cross_entropy_with_logits",
        "labels run from 1 to 2",
        lambda: [shapes.OneLogit(), Images(train=projects.numbered(lambda label: label % 2 + 1))],
    ),
    "classes of few images": (
        "classes of few images",
        "the training images",
        "1 of 5 classes have fewer than 5 images: 0 (3)",
        lambda: [Clean(), Images(train=projects.rare())],
    ),
    "images in the order of their classes": (
        "images in the order of their classes",
        "the training images, a Listed",
        "batches of 8 of 40 images",
        lambda: [Clean(), projects.InOrder(train=projects.Listed(sorted(n % CLASSES for n in range(NUM))))],
    ),
    "a head of another task": (
        "outputs of no class",
        "the training images, a Listed",
        "labels run from 0 to 1, and the head has 5 outputs",
        lambda: [Clean(), Images(train=projects.numbered(lambda label: label % 2))],
    ),
    "a head of another task, counted from 1": (
        "outputs of no class",
        "the training images, a Listed",
        "labels run from 1 to 3, and the head has 20 outputs",
        lambda: [projects.KeepsItsHead(), Images(train=projects.numbered(lambda label: label % 3 + 1))],
    ),
    "a last batch of one image": (
        "a batch of one image",
        "model.bn1, model.layer1.0.bn1",
        "40 images in batches of 13 leave one",
        lambda: [Clean(), projects.LeavesOne()],
    ),
    "a learning rate that is far too high": (
        "the first step explodes",
        "configure_optimizers",
        "for the same images the loss is ",
        lambda: [projects.Steep()],
    ),
    "a softmax before the criterion": (
        "probabilities for logits",
        "cross_entropy in training_step",
        "as after a softmax",
        lambda: [shapes.SoftmaxAtTheEnd()],
    ),
    "a sigmoid before the criterion": (
        "probabilities for logits",
        "binary_cross_entropy_with_logits in training_step",
        "as after a sigmoid",
        lambda: [projects.TwiceSigmoid(), Images(projects.TwiceSigmoid)],
    ),
    "a sigmoid of one logit, squeezed": (
        "probabilities for logits",
        "binary_cross_entropy_with_logits in training_step",
        "as after a sigmoid",
        lambda: [projects.OneSigmoid(), Images(projects.OneSigmoid)],
    ),
    "no logarithm before the criterion": (
        "probabilities for logits",
        "nll_loss in training_step",
        "never above 0",
        lambda: [projects.NotLogged()],
    ),
    "one label that the criterion does not take": (
        "labels do not fit",
        "the training images, a Listed",
        "labels run from -1 to 4; 5 outputs know 0 to 4",
        lambda: [Clean(), Images(train=projects.Listed([*[index % 5 for index in range(59)], -1, 0, 1]))],
    ),
    "a step that returns nothing": (
        "training_step returns nothing",
        "training_step",
        "None for every batch",
        lambda: [projects.Nothing()],
    ),
    "no optimizer": (
        "fit fails",
        "Trainer.fit",
        "No `configure_optimizers()` method defined",
        lambda: [projects.WithoutOptimizer()],
    ),
    "statistics of a new network that are to be kept": (
        "fit fails",
        "Trainer.fit",
        "TransferConfigError: FrozenStatistics has nothing to keep",
        lambda: [Clean(), Images(), toys.trainer([lt.FrozenStatistics()])],
    ),
    "a learning rate that is far too high with kept statistics": (
        "the first step explodes",
        "configure_optimizers",
        "for the same images the loss is ",
        lambda: [projects.SteepFromStatistics(), Images(), toys.trainer([lt.FrozenStatistics()])],
    ),
    "a head in no optimizer, with steps by hand after four batches": (
        "in no optimizer",
        "model.fc.weight, model.fc.bias",
        "no optimizer holds them",
        lambda: [projects.AccumulatesAndForgets()],
    ),
    "a step that fails": ("training_step fails", "training_step", "RuntimeError: ", lambda: [projects.WrongShape()]),
    "a criterion of a network's two outputs": (
        "training_step fails",
        "training_step",
        "must be Tensor, not tuple",
        lambda: [projects.TwoOutputs()],
    ),
}


def examined(module, data=None, trainer=None, **options):
    return lt.doctor(module, Images() if data is None else data, trainer, **options)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_problem_is_found_alone(name):
    kind, where, said, project = PLANTED[name]
    found = examined(*project())
    assert [each.name for each in found.findings] == [kind]
    finding = found.findings[0]
    assert where in finding.where
    assert said in finding.found
    assert finding.fix
    if kind == "outputs of no class":
        assert finding.fix.endswith("Leave it if these are the pretrained head's own class numbers")
    if kind == "images are not normalised":
        assert finding.fix.startswith("images / 255, and then transforms.Normalize(mean=(0.485,") == ("255" in name)
    if kind == "images are normalised otherwise":
        assert finding.fix.startswith("images from 0 to 1, and then transforms.Normalize(mean=(0.")
        assert "in place of yours, for training and validation images. Leave it if" in finding.fix
    if kind in ("fit fails", "training_step fails"):  # callbacks of the user's take no part in the step
        assert finding.fix.startswith("fit with your own Trainer and max_steps=1")
    page = str(found)
    assert page.startswith(f"1 finding in {found.subject}.")
    assert all(part in page for part in (finding.name, finding.where, finding.found, f"Fix: {finding.fix}"))


CLEAN = (
    shapes.TimmClassifier,
    shapes.TransformerWithoutHead,
    shapes.DictBatches,
    shapes.MixupInTheHook,
    shapes.OldNamespace,
    shapes.FrozenConvNeXt,
    shapes.BuiltInConfigureModel,
    shapes.OneLogit,
    projects.FrozenInEvalMode,
    projects.FrozenAsAdvised,
    projects.Compiled,
    projects.Drops,
    projects.ZeroAtFirst,
    projects.CountedFromOne,
    projects.Pretrained,
    projects.ReadsItsLoader,
)


@pytest.mark.parametrize("shape", CLEAN, ids=lambda shape: shape.__name__)
def test_nothing_is_found_in_a_clean_project(shape):
    is_old = shape is shapes.OldNamespace
    adapt = (lambda batch: (batch["image"], batch["label"])) if shape is shapes.DictBatches else None
    trainer = toys.trainer(namespace=pl if is_old else L)
    found = examined(shape(), (OldImages if is_old else Images)(shape), trainer, adapt=adapt)
    assert str(found) == f"No findings in {shape.__name__}."


@pytest.mark.parametrize(
    ("module", "data", "trainer"),
    [
        (Clean, lambda: projects.InOrder(train=projects.numbered(int)), None),  # mixed already
        (Clean, lambda: Images(train=projects.Listed(sorted(n % CLASSES for n in range(NUM)))), None),  # shuffled
        (Clean, lambda: Images(train=projects.numbered(lambda label: label % 3)), None),  # two classes are missing
        (projects.KeepsItsHead, lambda: Images(train=projects.numbered(lambda label: label % 3 + 4)), None),  # its own
        (Clean, projects.DropsTheLast, None),
        (Clean, projects.MixesWhenCollated, None),
        (Clean, lambda: projects.all_scaled(1.0), None),  # a network that is not pretrained
        (projects.Pretrained, projects.all_bright, None),
        (Clean, lambda: projects.all_normalised(*projects.IMAGENET), None),
        (projects.PretrainedOtherwise, lambda: projects.all_normalised(*projects.HALVES), None),
        (projects.PretrainedOtherwise, lambda: projects.all_normalised(*projects.HALVES, change=projects.erased), None),
        (projects.PretrainedOtherwise, lambda: projects.all_normalised(*projects.HALVES, change=projects.noisy), None),
        (projects.FrozenAsAdvised, projects.LeavesOne, None),
        (shapes.ConvNeXt, lambda: projects.LeavesOne(shapes.ConvNeXt), None),  # no BatchNorm
        (Clean, projects.LeavesOne, {"limit_train_batches": 2}),
        (projects.FromStatistics, Images, {"callbacks": [lt.FrozenStatistics()]}),
        (projects.SteepFromStatistics, Images, {"callbacks": [lt.FrozenStatistics(gradient_clip_val=1e-8)]}),
    ],
)
def test_nothing_is_found_near_a_problem(module, data, trainer):
    found = examined(module(), data(), trainer and toys.trainer(**trainer))
    assert found.findings == ()


@pytest.mark.parametrize("shape", [projects.ByHand, projects.Toggles, projects.Accumulates])
def test_nothing_is_found_in_a_step_by_hand_and_what_it_hides_is_named(shape):
    found = examined(shape())
    assert found.findings == ()
    assert "whether the loss is a mean" in " ".join(found.not_checked)


def test_optimizers_that_take_no_step_are_named():
    found = examined(projects.NeverSteps())
    assert found.findings == ()
    assert "no optimizer took a step in 32 batches" in str(found)


@pytest.mark.parametrize(
    "together",
    [
        lambda one, two: {"one": one, "two": two},
        lambda one, two: [one, two],
        lambda one, two: CombinedLoader({"one": one, "two": two}, "min_size"),
    ],
    ids=["a dictionary", "a list", "a CombinedLoader"],
)
def test_loaders_may_give_their_batches_together(together):
    data = together(Images().train_dataloader(), Images().val_dataloader())
    toys.trainer(max_steps=1).fit(projects.ReadsTwoLoaders(), data)
    assert lt.doctor(projects.ReadsTwoLoaders(), data).findings == ()


def test_a_module_may_be_compiled_as_a_whole():
    assert str(examined(torch.compile(Clean(), backend=projects.never))) == "No findings in Clean."


def test_pixels_that_are_not_numbers_are_not_a_wrong_normalize():
    data = projects.all_normalised(*projects.HALVES, change=lambda image: image * float("nan"))
    assert "images are normalised otherwise" not in str(examined(projects.PretrainedOtherwise(), data))


def test_training_images_may_have_the_scale_of_others_with_or_without_augmentation():
    plain, raw = projects.Listed([n % CLASSES for n in range(NUM)]), projects.Scaled(255.0)
    erased = projects.Listed(plain.labels, images={3: 9 * torch.randn_like(plain[3][0])})

    def names(train, **options):
        return [each.name for each in examined(Clean(), Images(train=train), **options).findings]

    for wide in (erased, raw):
        assert "images prepared in two ways" in names(wide)
        assert "images prepared in two ways" not in names(wide, unaugmented=plain)
        assert "images prepared in two ways" not in names(plain, unaugmented=wide)


def test_images_without_a_label_may_be_left_out_by_the_step():
    found = examined(projects.LeavesOut(), Images(train=projects.Listed([*[n % 5 for n in range(59)], -1, 0, 1])))
    assert str(found) == "No findings in LeavesOut."


@pytest.mark.parametrize(
    ("shape", "callbacks"), [(projects.HeadFirst, [projects.Finetunes()]), (projects.HeadFirstByItself, [])]
)
def test_what_a_callback_trains_later_is_not_a_finding(shape, callbacks):
    found = examined(shape(), Images(), toys.trainer(callbacks))
    assert found.findings == ()
    assert "Finetunes changes what is trained" in str(found)


def test_pictures_of_little_detail_are_not_copies():
    found = examined(Clean(), Images(val=projects.alike()))
    assert found.findings == ()
    assert "leaks of 6 validation images" in str(found)


def test_a_column_of_labels_is_flattened():
    found = examined(Clean(), Images(train=projects.numbered(lambda label: torch.tensor([label]))))
    assert found.findings[0].fix == "labels.flatten()"


def test_whole_batches_are_no_images():
    found = lt.doctor(Clean(), DataLoader(projects.Whole(), batch_size=None))
    assert found.findings == ()
    assert "the dataset gives whole batches" in str(found)


def test_test_images_that_cannot_be_set_up_are_named():
    found = examined(Clean(), projects.Untested())
    assert found.findings == ()
    assert found.not_checked == ("the test images: FileNotFoundError: test.csv",)


def test_held_out_images_may_be_missing():
    found = examined(Clean(), projects.Few())
    assert found.findings == ()
    assert found.not_checked == ("the test images: there are none.",)


def test_the_datamodule_is_set_up_as_a_copy():
    data = projects.Keeping()
    examined(Clean(), data)
    assert data.stages == []


def test_a_module_may_load_its_images_itself():
    module = projects.Own()
    assert str(lt.doctor(module, module)) == "No findings in Own."
    assert module._trainer is None


def states(data):
    return torch.get_rng_state(), data.generator.get_state(), pickle.dumps((random.getstate(), np.random.get_state()))


def test_module_data_and_random_state_are_as_they_were(tmp_path):
    train = projects.Noisy([index % CLASSES for index in range(NUM)])
    module, data, trainer = projects.evaluated("model.bn1"), Images(train=train), toys.trainer()
    weights, found, held = toys.weights(module), anatomy(module), dict(vars(data))
    before, given = states(data), copy.copy(vars(trainer))
    assert len(examined(module, data, trainer).findings) == 1
    toys.assert_same(toys.weights(module), weights)
    assert anatomy(module) == found
    assert all(param.grad is None for param in module.parameters())
    assert vars(data) == held
    assert vars(trainer) == given
    now = states(data)
    assert torch.equal(now[0], before[0])
    assert torch.equal(now[1], before[1])
    assert now[2] == before[2]
    assert [*tmp_path.iterdir()] == []


class Splitting(Images):
    """Splits at random."""

    splits: ClassVar = []

    def setup(self, stage):
        if stage == "fit":
            self.train, self.val = random_split(projects.Listed([index % CLASSES for index in range(NUM)]), [28, 12])
            self.splits.append(self.train.indices)


def test_the_split_that_is_looked_at_is_the_next_fits():
    module, data, trainer = Clean(), Splitting(), toys.trainer(max_steps=1)
    examined(module, data, trainer)
    trainer.fit(module, data)
    looked_at, fitted = Splitting.splits
    assert looked_at == fitted


class Stream(IterableDataset):
    def __iter__(self):
        return iter(projects.numbered(int))


class Opened(Stream):
    def __init__(self):
        self.lines = (line for line in range(NUM))


def test_what_cannot_be_checked_is_named():
    loader = DataLoader(Stream(), batch_size=8)
    assert "a DataLoader does not show its dataset" in str(examined(Clean(), loader))
    labels = [index % CLASSES for index in range(NUM)]
    leaked = Images(train=projects.Noisy(labels), test=projects.copied(3, projects.first_image()))
    found = examined(Clean(), leaked)
    assert found.findings == ()
    assert "Call doctor(..., unaugmented=) with a dataset that has none" in str(found)
    found = examined(Clean(), leaked, unaugmented=projects.Listed(labels))
    assert [each.name for each in found.findings] == ["leak"]
    assert found.not_checked == ()
    found = examined(shapes.DictBatches(), Images(shapes.DictBatches))
    assert found.findings == ()
    assert "Pass adapt=" in str(found)


def test_images_read_from_one_place_are_a_leak_whatever_their_augmentation(tmp_path):
    noisy = projects.Noisy([index % CLASSES for index in range(NUM)])
    shares = Images(train=Subset(noisy, range(30)), val=Subset(noisy, range(28, NUM)))
    (leak,) = examined(Clean(), shares).findings
    assert leak.found.startswith(f"2 of {NUM - 28} are also in the training data, read from the same place")
    assert "(0, 28), (1, 29)" in leak.found
    for label in range(3):
        (tmp_path / f"class{label}").mkdir()
        Image.fromarray(np.full((32, 32, 3), 80 * label, np.uint8)).save(tmp_path / f"class{label}" / "one.png")
    augmented, plain = transforms.Compose([transforms.ToTensor(), transforms.RandomErasing(1.0)]), transforms.ToTensor()
    folders = Images(train=ImageFolder(tmp_path, augmented), val=ImageFolder(tmp_path, plain))
    found = examined(Clean(), folders)
    assert "3 of 3 are also in the training data" in found.findings[-1].found


def test_copies_are_found_beside_images_of_the_same_place():
    labels = [index % CLASSES for index in range(NUM)]
    train, copies = projects.Listed(labels), projects.Listed(labels[:12], {3: projects.first_image()}, seed=2)
    place, copy = examined(Clean(), Images(train=train, val=Subset(train, [5]) + copies)).findings
    assert place.found.startswith("1 of 13 is also in the training data, read from the same place, for example (0, 5)")
    assert copy.found.startswith("1 of 13 is also in the training data, equal or nearly equal, for example (4, 7)")


def test_a_leak_by_place_is_found_beside_unaugmented_images_too():
    labels = [index % CLASSES for index in range(NUM)]
    noisy, clean = projects.Noisy(labels), Subset(projects.Listed(labels), range(30))
    shares = Images(train=Subset(noisy, range(30)), val=Subset(noisy, range(28, NUM)))
    (leak,) = examined(Clean(), shares, unaugmented=clean).findings
    assert leak.found.startswith(f"2 of {NUM - 28} are also in the training data, read from the same place")


@pytest.mark.parametrize("of", [lambda place: (f"{place:04}.png", 0), lambda place: ()], ids=["names", "nothing"])
def test_samples_that_are_not_files_are_not_taken_for_places(of):
    data = Images()
    for dataset in (data.train, data.val, data.test):
        dataset.samples = [of(place) for place in range(len(dataset))]  # each in a folder of its own
    assert examined(Clean(), data).findings == ()


def test_one_dataset_to_validate_and_to_test_gives_one_finding():
    copied = projects.copied(3, projects.first_image())
    (leak,) = examined(Clean(), Images(val=copied, test=copied)).findings
    assert leak.where == "the validation and test images"


def test_a_number_of_leaks_is_a_least_one_if_images_are_augmented():
    train = projects.NoisyButOne([index % CLASSES for index in range(NUM)])
    (leak,) = examined(Clean(), Images(train=train, test=projects.copied(3, projects.first_image()))).findings
    assert leak.found.startswith("At least 1 of 12")


def test_a_datamodule_in_place_of_the_module_is_refused():
    with pytest.raises(lt.TransferConfigError, match=r"The first argument is an? Images; expected the LightningModule"):
        lt.doctor(Images(), Clean())


@pytest.mark.parametrize(
    "data",
    [None, Images, Images().train, types.SimpleNamespace(train_dataloader=list)],
    ids=["nothing", "a class", "a dataset", "another object"],
)
def test_data_that_is_none_is_refused(data):
    with pytest.raises(lt.TransferConfigError, match=r"expected a DataModule or a train loader: doctor\(module, "):
        lt.doctor(Clean(), data)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (list, "a list of no batch"),
        (lambda: DataLoader([], batch_size=8), "a DataLoader of no batch"),
        (lambda: (batch for batch in [1]), "The train loader is a generator; expected"),
        (projects.Loadless, "Loadless has no train_dataloader"),
        (lambda: DataLoader(Opened(), batch_size=8), "cannot be copied .* Open files in __iter__ of its dataset"),
    ],
)
def test_data_that_has_no_batch_to_look_at_is_refused(make, said):
    with pytest.raises(lt.TransferConfigError, match=said):
        lt.doctor(Clean(), make())


CONFIG = """
seed_everything: true
model: {class_path: tests.doctor.projects.%s}
data: {class_path: tests.doctor.projects.Images}
trainer: {accelerator: cpu, devices: 1, logger: false, max_epochs: 2}
"""


@pytest.mark.parametrize(("name", "code"), [("Clean", None), ("Summed", 1)])
def test_the_command_examines_a_configuration(name, code, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG % name)
    arguments = ["doctor", str(tmp_path / "config.yaml")]
    if code is None:
        main(arguments)
    else:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code
    assert f"{'No findings' if code is None else '1 finding'} in {name}." in capsys.readouterr().out


OPTIMIZER = "optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}\n"
SCHEDULE = "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1}}\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("WithoutOptimizer", lambda text: text + OPTIMIZER),
        ("WithoutOptimizer", lambda text: text + OPTIMIZER + SCHEDULE),
        ("Own", lambda text: text.replace("data: {class_path: tests.doctor.projects.Images}", "")),
        ("Clean", lambda text: text + "ckpt_path: null\nweights_only: null\n"),
        ("Clean", lambda text: "fit:" + (text + "ckpt_path: null\n").replace("\n", "\n  ")),
    ],
    ids=["optimizer", "schedule", "no data", "saved", "fit"],
)
def test_nothing_is_found_in_a_clean_configuration(name, change, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(change(CONFIG % name))
    main(["doctor", str(tmp_path / "config.yaml")])
    assert f"No findings in {name}.\n" == capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "damage", "said"),
    [
        (Clean, None, "No findings"),
        (shapes.InjectedNetwork, None, "unsafe checkpoint"),
        (Clean, "model.fc.bias", "1 of "),
    ],
)
def test_the_command_examines_a_checkpoint(shape, damage, said, tmp_path, capsys):
    module = shape()
    if damage:
        module.state_dict()[damage][0] = float("nan")
    trainer = toys.trainer(max_epochs=0)
    trainer.fit(module, Images())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    if said.startswith("No"):
        main(["doctor", str(tmp_path / "last.ckpt")])
    else:
        with pytest.raises(SystemExit, match="1"):
            main(["doctor", str(tmp_path / "last.ckpt")])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "model: {class_path: no_such_project.Lit}", "model: {class_path: torch.nn.Linear}"]
)
def test_a_file_that_is_neither_is_one_message(text, tmp_path):
    for name in ("config.yaml", "last.ckpt"):
        (tmp_path / name).write_text(text if name == "config.yaml" else "")
        with pytest.raises(SystemExit, match=f"lightning-transfer doctor: .*{name}") as end:
            main(["doctor", str(tmp_path / name)])
        assert "}}" not in end.value.code
        assert name == "last.ckpt" or "Linear" not in text or "not a LightningModule" in end.value.code
