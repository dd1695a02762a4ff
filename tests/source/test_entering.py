"""Images that a training step changes before the network takes them: source images are not changed in the same way."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from tests import toys

pytestmark = pytest.mark.filterwarnings("ignore:The kept source head starts")
SAID = r"SourceTask: (training_step|the module) changes images .*, and source images are not changed. Do it in"


class Step(toys.LitToy):
    """Changes images in its step, in its forward or in a hook."""

    def __init__(self, images, where="step"):
        super().__init__()
        self.images, self.where = images, where

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (self.images(batch[0]), *batch[1:]) if self.where == "hook" else batch

    def forward(self, images):
        return self.model(self.images(images) if self.where == "forward" else images)

    def training_step(self, batch, batch_idx):
        images = self.images(batch[0]) if self.where == "step" else batch[0]
        return F.cross_entropy(self(images), batch[1])


def normalized(images):
    return (images - 0.45) / 0.225


def bright(dataset, change=lambda images: images):
    images, labels = dataset.tensors
    return TensorDataset(change(images.sigmoid()), labels)


def fit(module, forward, **options):
    source = lt.SourceTask(bright(toys.source_data(), **options), head=toys.source_head(), forward=forward)
    toys.fit(module, [lt.SoftFinetuning(source, weight=1.0)], loader=DataLoader(bright(toys.target_data()), 4))


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("images", [normalized, lambda images: images / 255])
def test_a_step_that_changes_images_is_warned_of(images, forward):
    with pytest.warns(UserWarning, match=SAID) as said:
        fit(Step(images), forward)
    assert len([each for each in said if "source images are not changed" in str(each.message)]) == 1


def test_a_joint_pass_goes_around_the_modules_forward():
    with pytest.warns(UserWarning, match="the module changes images .*Do it in on_after_batch_transfer or in"):
        fit(Step(normalized, "forward"), "joint")


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: Step(normalized, "hook"), {}),
        (lambda: Step(normalized), {"change": normalized}),  # the source's transform does the same
        (lambda: Step(lambda images: images.flip(3)), {}),
        (lambda: Step(lambda images: 0.5 * images + 0.5 * images.roll(1, 0)), {}),  # as MixUp
    ],
    ids=["hook", "transform", "flipped", "mixed"],
)
def test_images_that_enter_alike_or_are_augmented_are_not_warned_of(module, options, forward):
    fit(module(), forward, **options)  # warnings are errors


def test_a_separate_pass_goes_through_the_modules_forward():
    fit(Step(normalized, "forward"), "separate")  # warnings are errors


def test_no_hook_is_left_and_only_the_first_step_listens():
    class Listened(Step):
        counts = ()

        def training_step(self, batch, batch_idx):
            self.counts += (len(self.model.conv._forward_pre_hooks),)
            return super().training_step(batch, batch_idx)

    module = Listened(lambda images: images)
    fit(module, "separate")
    assert module.counts == (1,) + (0,) * 11
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    assert torch.isfinite(module.model.fc.weight).all()
