"""Differently shaped modules of other people, unmodified: the first step's gradient is g_target + w * g_source.

The expected gradient comes from two explicit passes through a copy of the network. The README's table of modules is
this file's list.
"""

import copy
import warnings
from typing import NamedTuple

import lightning.pytorch as L
import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_transfer as lt
from tests import toys
from tests.methods import borrowed

SIZE = 16


def timm_resnet(num_classes=5):
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 8, 8, 16), stem_width=4, num_classes=num_classes)


class Base(L.LightningModule):
    """What the modules below share; `features` is the oracle's way to the head's input."""

    head_path = "model.fc"

    def __init__(self):
        super().__init__()
        self.model = timm_resnet()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def features(self, x):
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


class TimmClassifier(Base):
    """A timm classifier as `self.model`."""


class BackboneAndHead(Base):
    """`self.backbone` and `self.head` apart."""

    head_path = "head"

    def __init__(self):
        super().__init__()
        self.model = None
        self.backbone = timm_resnet(num_classes=0)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.backbone(x))

    def features(self, x):
        return self.backbone(x)


class SequentialOfChildren(Base):
    """`nn.Sequential(*children, Linear)`."""

    head_path = "model.9"

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*list(timm_resnet().children())[:-1], nn.Linear(16, 5))

    def features(self, x):
        return self.model[:-1](x)


class VisionTransformer(Base):
    """A vision transformer."""

    head_path = "model.head"

    def __init__(self):
        super().__init__()
        self.model = timm.models.VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
        )


class TorchvisionClassifier(Base):
    """A torchvision network whose classifier is a container."""

    head_path = "model.classifier.3"

    def __init__(self):
        super().__init__()
        self.model = torchvision.models.mobilenet_v3_small(num_classes=5, dropout=0.0)

    def features(self, x):
        return self.model.classifier[:3](self.model.avgpool(self.model.features(x)).flatten(1))


class DictStep(Base):
    """A `training_step` that returns a dict."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


class OneArgumentStep(Base):
    """`training_step(self, batch)` without `batch_idx`."""

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class PathImageLabel(Base):
    """`(path, image), label` batches."""

    def training_step(self, batch, batch_idx):
        (_, x), y = batch
        return F.cross_entropy(self(x), y)


class DictBatches(Base):
    """Dict batches, normalised in `on_after_batch_transfer`."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": batch["image"] / 2}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def features(self, x):
        return super().features(x / 2)


class TransformsOnDevice(Base):
    """Transforms of whole batches in `on_after_batch_transfer`."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 0.5, batch[1]]

    def features(self, x):
        return super().features(x * 0.5)


class CompiledSubmodule(Base):
    """A compiled submodule, `self.model = torch.compile(net)`."""

    head_path = "model._orig_mod.fc"

    def __init__(self):
        super().__init__()
        self.model = torch.compile(timm_resnet(), backend="aot_eager")

    def features(self, x):
        net = self.model._orig_mod
        return net.forward_head(net.forward_features(x), pre_logits=True)


class CompiledInPlace(Base):
    """A submodule compiled in place, `self.model.compile()`."""

    def __init__(self):
        super().__init__()
        self.model.compile(backend="aot_eager")


class ReturnsFeatures(Base):
    """`forward(self, x, return_features=False)`."""

    def forward(self, x, return_features=False):
        features = self.features(x)
        logits = self.model.fc(features)
        return (logits, features) if return_features else logits


class ForwardOfTuple(Base):
    """A forward that returns a tuple."""

    def forward(self, x):
        logits = self.model(x)
        return logits, logits.softmax(1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


class WithoutForward(Base):
    """No `forward`, only a `training_step`."""

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])


class ApartWithoutForward(BackboneAndHead):
    """`self.backbone` and `self.head` apart, without a `forward`."""

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


class UnusualNames(Base):
    """A `ModuleDict` and a head with an unusual name."""

    head_path = "net.to_classes"

    def __init__(self):
        super().__init__()
        self.model = None
        self.net = nn.ModuleDict({"to_classes": nn.Linear(16, 5), "to_features": timm_resnet(num_classes=0)})

    def forward(self, x):
        return self.net["to_classes"](self.features(x))

    def features(self, x):
        return self.net["to_features"](x)


class BuiltInConfigureModel(Base):
    """A network built in `configure_model`."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.model = None

    def configure_model(self):
        if self.model is None:
            torch.manual_seed(0)
            self.model = timm_resnet()


class BuiltInSetup(BuiltInConfigureModel):
    """A network built in `setup`."""

    configure_model = L.LightningModule.configure_model

    def setup(self, stage):
        BuiltInConfigureModel.configure_model(self)


class OldNamespace(pl.LightningModule):
    """A `pytorch_lightning` module."""

    head_path = "model.fc"
    forward, features = Base.forward, Base.features
    training_step, configure_optimizers = Base.training_step, Base.configure_optimizers

    def __init__(self):
        super().__init__()
        self.model = timm_resnet()


class Case(NamedTuple):
    module: type
    joint: bool = True
    layout: str = "tuple"


class Laid(Dataset):
    """Samples in the layout that a project's own dataset has."""

    def __init__(self, num, num_classes, seed, layout):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(0, num_classes, (num,), generator=generator)
        self.layout = layout
        self.loaded = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.loaded.append(index)
        image, label = self.images[index], int(self.labels[index])
        layouts = {
            "tuple": (image, label),
            "path": ((f"{index}.png", image), label),
            "dict": {"image": image, "label": label},
        }
        return layouts[self.layout]


CASES = [
    Case(TimmClassifier),
    Case(BackboneAndHead),
    Case(SequentialOfChildren),
    Case(VisionTransformer),
    Case(TorchvisionClassifier),
    Case(DictStep),
    Case(OneArgumentStep),
    Case(PathImageLabel, layout="path"),
    Case(DictBatches, layout="dict"),
    Case(TransformsOnDevice),
    Case(CompiledSubmodule),
    Case(CompiledInPlace),
    Case(ReturnsFeatures, joint=False),
    Case(ForwardOfTuple),
    Case(WithoutForward),
    Case(ApartWithoutForward),
    Case(UnusualNames, joint=False),
    Case(BuiltInConfigureModel),
    Case(BuiltInSetup),
    Case(OldNamespace),
]


def adapt(layout):
    return {
        "tuple": None,
        "path": lambda batch: (batch[0][1], batch[1]),
        "dict": lambda batch: (batch["image"], batch["label"]),
    }[layout]


def gradients(module):
    return {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and "transfer" not in name
    }


class Keep:
    """Keeps the first step's gradients; made a Callback of the module's namespace below."""

    found = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found = self.found or gradients(module)


def expected_gradients(module, target, source, indices, head, head_path, forward):
    """Two losses, one sum, by hand."""
    target_images, source_images = target.images[:4], source.images[indices]
    if forward == "joint":
        both = module.features(torch.cat([target_images, source_images]))
        target_features, source_features = both[:4], both[4:]
    else:
        target_features, source_features = module.features(target_images), module.features(source_images)
    target_loss = F.cross_entropy(module.get_submodule(head_path)(target_features), target.labels[:4])
    (target_loss + 0.5 * F.cross_entropy(head(source_features), source.labels[indices])).backward()
    return gradients(module)


def runs():
    for case in CASES:
        yield pytest.param(case, "separate", id=f"{case.module.__name__}-separate")
        if case.joint:
            yield pytest.param(case, "joint", id=f"{case.module.__name__}-joint")


DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own tracing


@DYNAMO
@pytest.mark.parametrize(("case", "forward"), list(runs()))
def test_first_gradient_is_the_sum_of_both_tasks(case, forward):
    torch.manual_seed(0)
    module = case.module()
    twin = copy.deepcopy(module)
    target, source = Laid(8, 5, 1, case.layout), Laid(12, 7, 2, case.layout)
    task = lt.SourceTask(
        source, num_classes=7, forward=forward, adapt=adapt(case.layout), batch_hooks=case.layout != "path"
    )
    callback = lt.SoftFinetuning(task, weight=lt.Schedule(0.5, 0.5))
    namespace = pl if isinstance(module, pl.LightningModule) else L
    keep = type("KeepGradients", (Keep, namespace.Callback), {})()
    runner = toys.trainer([callback, keep], namespace=namespace, max_epochs=1)
    source.loaded.clear()
    runner.fit(module, DataLoader(target, batch_size=4))
    assert callback.part.head_path == case.module.head_path
    drawn = source.loaded[-8:-4]

    if hasattr(twin, "configure_model"):
        torch.manual_seed(0)
        twin.setup("fit")
        twin.configure_model()
    head = task.make_head(twin.get_submodule(case.module.head_path), "")
    expected = expected_gradients(twin, target, source, drawn, head, case.module.head_path, forward)
    assert keep.found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (keep.found[name] - value).abs().max() <= 1e-5 * scale, name


@DYNAMO
@pytest.mark.parametrize(("case", "forward"), list(runs()))
def test_the_gap_to_the_source_is_measured(case, forward):
    """What nobody asks for, every one of them goes through."""
    torch.manual_seed(0)
    module = case.module()
    hooks = {"adapt": adapt(case.layout), "batch_hooks": case.layout != "path"}
    task = lt.SourceTask(Laid(12, 7, 2, case.layout), num_classes=7, forward=forward, **hooks)
    callback = lt.SoftFinetuning(task)
    runner = toys.trainer([callback], namespace=pl if isinstance(module, pl.LightningModule) else L, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.NoEffectWarning)
        runner.fit(module, DataLoader(Laid(8, 5, 1, case.layout), batch_size=4))
    assert 0 <= callback.part.gap <= 1


class AskToo:
    """Asks the network by hand in front of the second step; made a Callback of the module's namespace below."""

    def __init__(self, images, head_path):
        self.images, self.head_path = images, head_path

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            module.eval()
            with torch.no_grad():
                self.logits = module.get_submodule(self.head_path)(module.features(self.images))
            module.train()


@DYNAMO
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module.__name__)
def test_a_round_asks_the_network_what_its_owner_would(case):
    torch.manual_seed(0)
    module = case.module()
    target, source = Laid(8, 5, 1, case.layout), Laid(40, 7, 2, case.layout)
    task = lt.SourceTask(source, num_classes=7, adapt=adapt(case.layout), batch_hooks=case.layout != "path")
    neighbors = borrowed(k=3, rounds=1, every=1, hard_entropy=1.5)
    callback = lt.SelectiveJointFinetuning(task, neighbors=neighbors)
    namespace = pl if isinstance(module, pl.LightningModule) else L
    ask = type("Ask", (AskToo, namespace.Callback), {})(target.images, case.module.head_path)
    toys.trainer([callback, ask], namespace=namespace, max_epochs=1).fit(module, DataLoader(target, batch_size=4))
    probabilities = ask.logits.softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1)
    is_right = ask.logits.argmax(1) == target.labels
    expected = [
        3 if right and sure < 1.5 else 9 if right else 15 for right, sure in zip(is_right, entropy, strict=True)
    ]
    assert callback.part.chooser.budget.tolist() == expected


@DYNAMO
def test_a_whole_compiled_module():
    torch.manual_seed(0)
    plain, compiled = TimmClassifier(), TimmClassifier()
    compiled.load_state_dict(plain.state_dict())
    source = Laid(12, 7, 2, "tuple")
    found = []
    for module in (plain, torch.compile(compiled, backend="aot_eager")):
        keep = type("KeepGradients", (Keep, L.Callback), {})()
        runner = toys.trainer([lt.SoftFinetuning(lt.SourceTask(source, num_classes=7)), keep], max_epochs=1)
        runner.fit(module, DataLoader(Laid(8, 5, 1, "tuple"), batch_size=4))
        found.append(keep.found)
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize("module", [ReturnsFeatures, UnusualNames])
def test_joint_refuses_by_name_what_it_cannot_split(module):
    torch.manual_seed(0)
    task = lt.SourceTask(Laid(12, 7, 2, "tuple"), num_classes=7, forward="joint")
    with pytest.raises(lt.TransferConfigError, match="Use forward='separate'"):
        toys.fit(module(), [lt.SoftFinetuning(task)], loader=DataLoader(Laid(8, 5, 1, "tuple"), batch_size=4))


@DYNAMO
@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "compiled-before"])
def test_a_compiled_network_follows_the_whole_schedule(forward, warm):
    """Graphs are traced with source images, without them, in validation, and before we came: never a stale one."""

    class Learning(TimmClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def validation_step(self, batch, batch_idx):
            self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        module = Learning()
        if compiled:
            module.model.compile(backend="aot_eager")
        if warm:
            module(torch.zeros(4, 3, SIZE, SIZE))
        task = lt.SourceTask(Laid(12, 7, 2, "tuple"), num_classes=7, forward=forward)
        loader = DataLoader(Laid(8, 5, 1, "tuple"), batch_size=4)
        runner = toys.trainer([lt.SoftFinetuning(task, weight=lt.Schedule(until_steps=5))], max_epochs=4)
        runner.fit(module, loader, loader)
        results.append(toys.weights(module))
    toys.assert_same({k.replace("_orig_mod.", ""): v for k, v in results[1].items()}, results[0], tolerance=1e-5)
