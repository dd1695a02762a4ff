"""A copy of the network from before its layers change is named, and one from after the change is not."""

import copy
import warnings
import weakref

import lightning.pytorch as L
import pytest
from timm.utils import ModelEmaV3
from torch import nn

import lightning_transfer as lt
from tests import toys
from tests.toys import LitToy, fit


def averaged(ema, net):
    """Update an average as people write it, and return the names that were paired."""
    pairs = list(zip(ema.named_parameters(), net.named_parameters(), strict=False))
    for (_, average), (_, param) in pairs:
        average.data.lerp_(param.data, 0.1)
    return [(one, other) for (one, _), (other, _) in pairs]


class Averaging(LitToy):
    """Keeps a plain average of the network's weights."""

    def on_train_batch_end(self, *_):
        assert all(one == other for one, other in averaged(self.ema, self.model))
        assert len(list(self.ema.parameters())) == len(list(self.model.parameters()))


class InInit(LitToy):
    def __init__(self):
        super().__init__()
        self.ema = copy.deepcopy(self.model).requires_grad_(requires_grad=False)


class InConfigureModel(toys.Late):
    def configure_model(self):
        super().configure_model()
        self.ema = copy.deepcopy(self.model)


class InAList(LitToy):
    def __init__(self):
        super().__init__()
        self.ema = [copy.deepcopy(self.model)]  # so that it is neither saved nor trained


class Wrapped(LitToy):
    def __init__(self):
        super().__init__()
        self.ema = ModelEmaV3(self.model)


class ByName(LitToy):
    def __init__(self):
        super().__init__()
        self.ema = {name: param.detach().clone() for name, param in self.named_parameters()}


class ByNameInTheNetwork(LitToy):
    def __init__(self):
        super().__init__()
        self.ema = {name: param.detach().clone() for name, param in self.model.named_parameters()}


class Nested(LitToy):
    """One part holds the network and its copy."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"net": toys.toy_net(), "ema": toys.toy_net()})

    def forward(self, images):
        return self.model["net"](images)


class Shadow(L.Callback):
    def setup(self, trainer, module, stage):
        self.kept = copy.deepcopy(module)


def callback(method, net="model"):
    if method == "AdaFilter":
        return lt.AdaFilter(backbone=net, gated=f"{net}.conv", gate_width=4)
    if method == "GatedTransfer":
        return lt.GatedTransfer(head=f"{net}.fc", ratio=2)
    return lt.CollaborativeFinetuning([toys.OtherNet()], backbone=net)


METHODS = pytest.mark.parametrize("name", ["AdaFilter", "GatedTransfer", "CollaborativeFinetuning"])


@METHODS
@pytest.mark.parametrize(
    "make", [InInit, InConfigureModel, InAList, Wrapped, ByName, ByNameInTheNetwork], ids=lambda kind: kind.__name__
)
def test_a_copy_from_before_is_named_once(name, make):
    with pytest.warns(
        UserWarning, match=f"{name} has changed .* and ema holds a copy .*in the module's setup"
    ) as found:
        fit(make(), [callback(name)], max_steps=2)
    assert sum("holds a copy" in str(warning.message) for warning in found) == 1


@METHODS
def test_a_copy_in_another_callback_or_beside_the_network_is_named(name):
    with pytest.warns(UserWarning, match="and Shadow holds a copy"):
        fit(LitToy(), [Shadow(), callback(name)], max_steps=1)
    with pytest.warns(UserWarning, match=r"and model\.ema holds a copy"):
        fit(Nested(), [callback(name, "model.net")], max_steps=1)


class InSetup(Averaging):
    def setup(self, stage):
        self.ema = copy.deepcopy(self.model)


class AtFitStart(toys.Late):
    on_train_batch_end = Averaging.on_train_batch_end

    def on_fit_start(self):
        self.ema = copy.deepcopy(self.model)


class WrappedAtFitStart(Averaging):
    def on_fit_start(self):
        self.wrapper = ModelEmaV3(self.model)
        self.ema = self.wrapper.module


class ByNameAtFitStart(LitToy):
    def on_fit_start(self):
        self.start = {name: param.detach().clone() for name, param in self.named_parameters()}

    def on_train_batch_end(self, *_):
        users = (name for name, _ in self.named_parameters() if not name.startswith("lightning_transfer"))
        assert all(name in self.start for name in users)


class Teacher(LitToy):
    """Holds another network of the same make, and a copy of the head alone."""

    def __init__(self):
        super().__init__()
        self.teacher = toys.ToyNet()
        self.start = copy.deepcopy(self.model.fc)
        self.saved = {"fc": self.model.fc.weight.detach().clone()}


@METHODS
@pytest.mark.parametrize(
    "make", [InSetup, AtFitStart, WrappedAtFitStart, ByNameAtFitStart, Teacher, LitToy], ids=lambda kind: kind.__name__
)
def test_a_copy_from_after_the_change_is_right(name, make):
    fit(make(), [callback(name)], max_steps=2)  # warnings are errors


@METHODS
@pytest.mark.parametrize(
    "other",
    [
        lambda: L.callbacks.WeightAveraging(),
        lambda: L.callbacks.EMAWeightAveraging(),
        lambda: L.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1),
    ],
    ids=["average", "ema", "swa"],
)
def test_copies_that_lightning_makes_are_right(name, other):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds a copy")
        warnings.filterwarnings("ignore", message=".*(lr_scheduler|swa|SWA)")
        fit(LitToy(), [callback(name), other()], max_epochs=2)


@pytest.mark.filterwarnings("ignore:The kept source head starts at a loss")
def test_copies_of_other_methods_are_right():
    pretrained = toys.toy_net()
    source = lt.SourceTask(toys.images(20, toys.TARGET_CLASSES, seed=2), head=copy.deepcopy(pretrained.fc))
    fit(LitToy(), [callback("GatedTransfer"), lt.SoftFinetuning(source, weight=0.1)], max_steps=1)
    pretrained.fc, module = toys.source_head(), LitToy()
    module.knowledge = lt.SourceKnowledge(pretrained)
    fit(module, [callback("AdaFilter"), lt.SoftFinetuning(module.knowledge, weight=0.1)], max_steps=1)


class Evaluated(InInit):
    """Validates the average in place of the network."""

    def forward(self, images):
        return (self.model if self.training else self.ema)(images)


def test_of_a_network_and_its_copy_the_one_to_gate_has_to_be_named():
    with pytest.raises(lt.TransferConfigError, match=r"equal weights, 'model' and 'ema'.*backbone='model'"):
        fit(Evaluated(), [lt.AdaFilter(gated="*.conv", gate_width=4)])
    module = Evaluated()
    with pytest.warns(UserWarning, match="and ema holds a copy"):
        fit(module, [callback("AdaFilter")], max_steps=1)
    assert type(module.model.conv) is lt.nn.GatedConv2d
    assert type(module.ema.conv) is nn.Conv2d
    wrong = Evaluated()
    wrong.ema.requires_grad_()
    with pytest.warns(UserWarning, match="and model holds a copy.*If 'model' is the network to train, name it"):
        fit(wrong, [callback("AdaFilter", "ema")], max_steps=1)


class TwoStreams(InInit):
    """Both networks run, so both are gated."""

    def forward(self, images):
        return self.model(images) + self.ema(images.flip(3))


def test_two_equal_networks_that_both_run_are_gated_together():
    report = lt.functional.apply_adafilter(TwoStreams(), gated="*.conv", gate_width=4)
    assert report.replaced == ("model.conv", "ema.conv")


def test_a_weak_proxy_of_what_is_gone_is_left_alone():
    class Watching(L.Callback):
        def __init__(self):
            self.seen = weakref.proxy(toys.toy_net())

    fit(LitToy(), [lt.GatedTransfer(ratio=2, aux_weight=0), Watching()], max_steps=1)
