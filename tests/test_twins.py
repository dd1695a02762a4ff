"""Copies of a module that trials train: as a module of the same code would be, and the original stays as it is."""

import copy
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

import lightning_transfer as lt
from lightning_transfer.advising.candidates import Candidate
from lightning_transfer.advising.reading import Reading
from lightning_transfer.advising.trials import PairedTrials
from lightning_transfer.glue.entering import first_layer
from lightning_transfer.glue.trials import trials_of
from lightning_transfer.roles import find_head
from lightning_transfer.tracing import trace
from lightning_transfer.twins import copied
from tests import toys

QUIET = {"accelerator": "cpu"}
SGD = "{class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}"


class Toy(toys.LitToy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Unoptimized(toys.LitToy):
    configure_optimizers = L.LightningModule.configure_optimizers


def of_cli(kind):
    """A module whose optimizer LightningCLI has made; it binds configure_optimizers to the parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(kind, run=False, save_config_callback=None, args=[f"--optimizer={SGD}"])
    return cli.model


class Lambda(Toy):
    """Runs its network by a function in an attribute."""

    def __init__(self):
        super().__init__()
        self.run = lambda images: self.model(images)

    def forward(self, images):
        return self.run(images)


class Compiled(Toy):
    def __init__(self):
        super().__init__()
        self.run = torch.compile(self.model.forward, backend="eager")

    def forward(self, images):
        return self.run(images)


def assert_untouched(module, before):
    toys.assert_same(toys.weights(module), before)
    assert all(param.grad is None for param in module.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def is_right(module, **reading):
    given = trials_of(module, toys.target_loader(), QUIET, unaugmented=None)
    paired = PairedTrials(module, given, Reading(**reading), clock=lambda: 0.0, deadline=1e9)
    paired.steps = 12
    return paired.train(Candidate("fine-tuning", "", list), 0)["fine-tuning"].right


def test_an_optimizer_of_lightningcli_trains_the_copy_and_not_the_original():
    module = of_cli(Unoptimized)
    before = copy.deepcopy(toys.weights(module))
    assert torch.equal(is_right(module), is_right(Toy()))
    assert_untouched(module, before)
    (held,) = module.configure_optimizers().param_groups
    assert [*map(id, held["params"])] == [*map(id, module.parameters())]
    assert not module.configure_optimizers().state


def test_a_copys_method_that_holds_the_module_holds_the_copy():
    module = of_cli(Unoptimized)
    twin = copied(copied(module))  # as a search does
    (group,) = twin.configure_optimizers().param_groups
    assert [*map(id, group["params"])] == [*map(id, twin.parameters())]


def test_a_search_with_an_optimizer_of_lightningcli_is_a_search_with_the_modules_own():
    def searching():
        return lt.CollaborativeFinetuning([toys.OtherNet()], search=lt.LayerSearch(particles=2, iterations=1))

    own, bound = searching(), searching()
    module = of_cli(Unoptimized)
    toys.fit(Toy(), [own])
    toys.fit(module, [bound])
    assert own.plan == bound.plan


@pytest.mark.parametrize("kind", [Lambda, Compiled])
def test_a_copy_that_runs_the_original_is_refused_and_the_original_unchanged(kind):
    module = kind()
    before = copy.deepcopy(toys.weights(module))
    with pytest.raises(lt.TransferConfigError, match=f"A copy of {kind.__name__} is run here.*Write a method"):
        is_right(module)
    assert_untouched(module, before)
    found = lt.doctor(module, toys.target_loader())
    assert [each.name for each in found.findings] == ["classes of few images"]
    assert "A copy of" in found.not_checked[0]
    assert_untouched(module, before)
    toys.fit(module)  # and it trains


def test_a_search_for_a_module_that_runs_the_original_leaves_it_unchanged():
    module = Lambda()
    toys.fit(Lambda(), [])
    statistics, norm = module.model.bn.running_mean.clone(), module.model.bn
    search = lt.LayerSearch(particles=2, iterations=1)
    with pytest.warns(lt.NoEffectWarning, match="all failed: RunsOriginalError"):
        toys.fit(module, [lt.CollaborativeFinetuning([toys.OtherNet()], backbone="model", search=search)], max_steps=0)
    assert torch.equal(norm.running_mean, statistics)


def test_an_optimizer_of_the_original_is_refused():
    module = toys.LitToy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(lt.TransferConfigError, match="optimizer of the original's parameters"):
        is_right(module)


class Shared(nn.BatchNorm2d):
    """A layer that copies share on purpose."""

    def __deepcopy__(self, memo):
        return self


class Sharing(Toy):
    def __init__(self):
        super().__init__()
        self.shared = Shared(3, affine=False)

    def forward(self, images):
        return self.model(self.shared(images))


def test_layers_that_a_copy_shares_on_purpose_may_run():
    module = Sharing()
    assert len(is_right(module)) > 0
    assert module.shared.num_batches_tracked > 0


class LastLambda(Toy):
    """Runs its last layer by a function in an attribute."""

    def __init__(self):
        super().__init__()
        self.last = lambda features: self.model.fc(features)

    def forward(self, images):
        return self.last(self.model.bn(self.model.conv(images)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Lambda, LastLambda])
def test_looking_for_layers_does_not_run_the_original(kind):
    module = kind()
    before = copy.deepcopy(toys.weights(module))
    with pytest.raises(lt.TransferConfigError, match=f"^A copy of {kind.__name__} is run here"):
        trace(module)
    assert_untouched(module, before)


def test_compiled_modules_are_not_listened_to():
    module, whole = toys.LitToy(), from_compiled(torch.compile(toys.LitToy(), backend="eager"))
    module.model = torch.compile(module.model, backend="eager")
    assert first_layer(module, find_head(module, "model.fc")) == ()
    assert first_layer(whole, find_head(whole)) == ()
    plain = toys.LitToy()
    assert first_layer(plain, find_head(plain)) == (plain.model.conv,)


class Harmless(Toy):
    """Keeps functions of a criterion, of an augmentation and of a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.criterion, self.flip = nn.CrossEntropyLoss(torch.ones(toys.TARGET_CLASSES)), nn.Identity()
        self.teacher = toys.toy_net().eval().requires_grad_(requires_grad=False)
        self.loss = lambda logits, labels: self.criterion(logits, labels)
        self.prepare = lambda images: self.flip(images)
        self.teach = lambda images: self.teacher(images)

    def training_step(self, batch, batch_idx):
        logits = self(self.prepare(batch[0]))
        return self.loss(logits, batch[1]) + (logits - self.teach(batch[0])).square().mean()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self


def test_what_a_run_does_not_change_may_run():
    assert len(is_right(Harmless(), head="model.fc")) > 0
