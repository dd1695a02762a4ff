"""What cannot start as a probe is refused before the first step, by name, with what to write; nothing has moved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights

PIXELS, LABELS = toys.target_data().tensors


class Cosine(nn.Linear):
    def forward(self, features):
        return F.linear(F.normalize(features), F.normalize(self.weight)) * 8


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(toys.WIDTH, toys.TARGET_CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, features):
        return super().forward(features[:, :, None, None])


def pruned():
    head = nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)
    prune.l1_unstructured(head, "weight", 0.3)
    return head


HEADS = {
    "no bias": (lambda: nn.Linear(toys.WIDTH, toys.TARGET_CLASSES, bias=False), r"'model.fc' has no bias.*bias=True"),
    "cosine": (lambda: Cosine(toys.WIDTH, toys.TARGET_CLASSES), r"'model.fc', a Cosine, gives something else.*cosine"),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)),
        "'model.fc' has a weight that is computed",
    ),
    "pruned": (pruned, "'model.fc' has a weight that is computed"),
    "convolution": (Convolution, "'model.fc.0' ends in a Conv2d"),
    "an embedding": (lambda: nn.Linear(toys.WIDTH, 32), "name 5 of the 32 classes.*leave ProbeStart out"),
    "a kept head": (
        lambda: nn.Linear(toys.WIDTH, 1000),
        r"5 of the 1000 .*kept.*network\.reset_classifier\(num_classes\)",
    ),
    "too few outputs": (
        lambda: nn.Linear(toys.WIDTH, 3),
        "labels run from 0 to 4, and the head 'model.fc' gives 3.*Give the head at least 5 outputs",
    ),
}
TASKS = {
    "one-hot": (F.one_hot(LABELS, 5).float(), "one-hot|One-hot.*argmax"),
    "several labels": (torch.ones(24, 5), "several labels for each image"),
    "soft labels": (torch.full((24, 5), 0.2), "soft labels"),
    "regression": (torch.randn(24), r"type torch.float32.*leave ProbeStart out"),
    "several numbers": (torch.randn(24, 5), r"shape \(5, 5\).*leave ProbeStart out"),
    "not labelled": (LABELS - 1, "labels run from -1 to .*Leave images without a class out"),
    "counted from one": (
        LABELS + 1,
        r"labels run from 1 to 5.*If classes count from 1: .*\(batch\[0\], batch\[1\] - 1\)",
    ),
    "one class": (LABELS * 0, "name 1 of the 5 classes"),
}


def refused(module, data, match, callback=None):
    before, training = weights(module), [child.training for child in module.modules()]
    loader = data if isinstance(data, DataLoader | list) else DataLoader(data, batch_size=5)
    with pytest.raises(lt.TransferConfigError, match=f"(?s){match}"):
        fit(module, [callback or lt.ProbeStart()], loader=loader)
    assert module.losses == []
    assert_same(weights(module), before)
    assert [child.training for child in module.modules()] == training
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_not_a_linear_of_classes(name):
    make, match = HEADS[name]
    module = LitToy()
    module.model.fc = make()
    refused(module, toys.target_data(), match)


@pytest.mark.parametrize("name", TASKS)
def test_labels_that_are_not_class_numbers(name):
    labels, match = TASKS[name]
    refused(LitToy(), TensorDataset(PIXELS, labels), match)


def test_one_number_to_regress():
    module = LitToy()
    module.model.fc = nn.Linear(toys.WIDTH, 1)
    for labels in (torch.rand(24), torch.rand(24, 1), LABELS.float()):
        refused(module, TensorDataset(PIXELS, labels), r"gives 1 numbers; a probe learns class numbers")


class Stream(IterableDataset):
    def __iter__(self):
        yield from toys.target_data()


def test_batches_and_loaders_that_do_not_show_images_and_labels():
    refused(LitToy(), TensorDataset(PIXELS, LABELS % 2, LABELS), r"adapt=lambda batch: \(batch\[0\], batch\[2\]\)")
    refused(LitToy(), DataLoader(Stream(), batch_size=5), "no length and random access")
    refused(LitToy(), [toys.target_data()[:5]], "a list, does not show its dataset")
    other = lt.ProbeStart(unaugmented=toys.images(20, 5, seed=1))
    refused(LitToy(), toys.target_data(), "unaugmented has 20 images, the train loader's dataset 24", other)


def dropped(samples):
    return default_collate(samples[1:])


def paired(samples):
    images, labels = default_collate(samples)
    return images, (labels, labels.roll(1), 0.5)


def test_loaders_that_mix_drop_or_stream_images_are_named():
    data = toys.target_data()
    mixing = DataLoader(data, batch_size=5, collate_fn=paired)
    refused(LitToy(), mixing, r"If a collate_fn has mixed the images: ProbeStart\(unaugmented=DataLoader")
    for loader, said in (
        (DataLoader(data, collate_fn=dropped), "made 4 images of 5 samples; expected one of each"),
        (DataLoader(Stream(), batch_size=5), "no length and random access"),
    ):
        refused(LitToy(), DataLoader(data, batch_size=5), said, lt.ProbeStart(unaugmented=loader))


def test_an_adapt_that_fails_or_gives_something_else_is_named():
    images_alone = lt.ProbeStart(adapt=lambda batch: batch[0])
    refused(LitToy(), toys.target_data(), "adapt= returned Tensor.*; expected", images_alone)
    with pytest.raises(KeyError) as error:
        fit(LitToy(), [lt.ProbeStart(adapt=lambda batch: {}["img"])])
    assert any(note.startswith("This happened in ProbeStart(adapt=) with a batch ") for note in error.value.__notes__)


def test_features_that_are_not_finite_and_a_head_that_runs_twice():
    pixels = PIXELS.clone()
    pixels[7, 0, 0, 0] = torch.nan
    refused(LitToy(), TensorDataset(pixels, LABELS), r"Features of the training images \[7\] are not finite")

    class Twice(LitToy):
        def forward(self, pixels):
            return super().forward(pixels) + super().forward(pixels.flip(3))

    refused(Twice(), toys.target_data(), "'model.fc' ran 2 times on 5 images")


def test_options_that_do_not_fit():
    for option in ("forward", "adapt"):
        with pytest.raises(lt.TransferConfigError, match=f"{option}='x'; it takes a function"):
            lt.ProbeStart(**{option: "x"})
    for data in (5, "images/train"):
        with pytest.raises(lt.TransferConfigError, match=f"unaugmented={data!r}; .* as loader.dataset or ImageFolder"):
            lt.ProbeStart(unaugmented=data)
    with pytest.raises(lt.TransferConfigError, match="The Trainer has 2 ProbeStart of the same head. Leave one"):
        fit(LitToy(), [lt.ProbeStart(), lt.ProbeStart()])
    refused(LitToy(), toys.target_data(), "head='fc' is not a module.*model.fc", lt.ProbeStart(head="fc"))


def test_a_head_that_shares_its_weight_is_refused():
    class Tied(LitToy):
        def __init__(self):
            super().__init__()
            self.model.fc = nn.Sequential(
                nn.Linear(toys.WIDTH, toys.WIDTH), nn.ReLU(), nn.Linear(toys.WIDTH, toys.WIDTH)
            )
            self.model.fc[2].weight = self.model.fc[0].weight

    with pytest.raises(lt.TransferConfigError, match=r"shares its numbers with model\.fc\.0\.weight"):
        fit(Tied(), [lt.ProbeStart()])


def test_a_head_that_shares_memory_under_another_parameter_is_refused():
    module = LitToy()
    module.other = nn.Linear(toys.WIDTH, toys.TARGET_CLASSES)
    module.other.weight.data = module.model.fc.weight.data
    with pytest.raises(lt.TransferConfigError, match=r"shares its numbers with other\.weight"):
        fit(module, [lt.ProbeStart()])


def test_weights_that_the_precision_cannot_hold_are_refused():
    class Small(LitToy):
        def __init__(self):
            super().__init__()
            self.half()

        def forward(self, images):
            features = self.model.features(images.half())
            return self.model.fc(features * 3e-6)

    with pytest.raises(
        lt.TransferConfigError, match=r"torch\.float16 cannot hold, because the features of 'model\.fc'"
    ):
        fit(Small(), [lt.ProbeStart()])


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores / 0.07,
        lambda scores: {"logits": (scores + torch.ones_like(scores).cumsum(1)) / 2},
        lambda scores: scores.tanh() * 30,
    ],
)
def test_scores_that_the_module_changes_are_refused(change):
    class Changed(LitToy):
        def forward(self, images):
            return change(super().forward(images))

    refused(Changed(), toys.target_data(), r"changes the scores of the head 'model\.fc'.*forward=lambda")
    assert starts(Changed, lt.ProbeStart(forward=lambda module, images: module.model(images)))


@pytest.mark.parametrize(
    "shown",
    [
        lambda scores: scores.softmax(1),
        lambda scores: (scores.log_softmax(1), scores.argmax(1)),
        lambda scores: {"probabilities": scores.sigmoid(), "features": torch.zeros(1)},
        lambda scores: None,
    ],
)
def test_scores_that_the_module_shows_in_another_form_are_taken(shown):
    class Shown(LitToy):
        def forward(self, images):
            return shown(super().forward(images))

    assert starts(Shown, lt.ProbeStart())


def starts(kind, start):
    class Trained(kind):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Trained()
    before = module.model.fc.weight.detach().clone()
    fit(module, [start], max_epochs=1)
    return not torch.equal(module.model.fc.weight, before)


def test_a_head_with_a_second_name_is_not_shared():
    class Named(LitToy):
        def __init__(self):
            super().__init__()
            self.network, self.classifier = self.model, self.model.fc

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, before = Named(), LitToy().model.fc.weight.detach().clone()
    fit(module, [lt.ProbeStart()], max_epochs=1)
    assert not torch.equal(module.model.fc.weight, before)


class Regression(LitToy):
    def __init__(self):
        super().__init__()
        self.model.fc = nn.Linear(toys.WIDTH, 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0])[:, 0], batch[1].float())


def test_numbers_of_a_regression_are_refused_or_warned_of():
    """What is 0 or 1 may be a class, so only the loss shows that it is not."""

    def run(labels):
        fit(Regression(), [lt.ProbeStart()], loader=DataLoader(TensorDataset(PIXELS, labels), batch_size=4))

    with pytest.raises(
        lt.TransferConfigError, match=r"gives 1 numbers; a probe learns class numbers, .* image\. If the"
    ):
        run(LABELS)  # a hint to make class numbers of them would make the same ones
    with pytest.warns(UserWarning, match="0 and 1 are the numbers of a regression and not classes"):
        run((LABELS > 1).float())


def test_no_head_is_set_if_the_precision_of_one_cannot_hold_its_weights():
    class Small(toys.OtherNet):
        def forward(self, images):
            features = F.relu(self.conv2(F.relu(self.bn1(self.conv1(images))))).mean((2, 3))
            return self.fc(features.half() * 3e-6).float()

    class Halved(LitToy):
        def on_fit_start(self):
            self.model.members["source1"].network.fc.half()
            self.own = self.model.members["own"].network.fc
            self.before = self.own.weight.detach().clone()

    module = Halved()
    with pytest.raises(lt.TransferConfigError, match=r"torch\.float16 cannot hold.*'model\.members\.source1"):
        fit(module, [lt.ProbeStart(), lt.CollaborativeFinetuning([Small()])])
    assert torch.equal(module.own.weight, module.before)
