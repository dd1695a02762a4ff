"""The rows of the transfer matrix: each a way to fine-tune, in an ordinary LightningModule."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import cross_val_predict  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transfer_data import Pictures, Target, normalised

import lightning_transfer as lt
from lightning_transfer.source.gap import SOURCE_IMAGES, TARGET_IMAGES
from lightning_transfer.tracing import evaluating

BATCH, NEIGHBORS = 32, 100
ALWAYS = lt.Schedule(1.0, 1.0)
LOOKS = 6  # of the learning curve
L2SP_WEIGHT = 0.01  # its authors' for the body
THAWED = 0.2  # of training, at which BackboneFinetuning lets the body learn
# where a processor only emulates bfloat16, a step in it takes ten times as long as one in full precision
PRECISION = "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def small_resnet(num_classes: int) -> ResNet:
    """A timm ResNet for images of 32 pixels, .32 million parameters."""
    block: Any = BasicBlock  # timm asks for a class and is typed as for an instance
    network = ResNet(block, (1, 1, 1, 1), channels=(16, 32, 64, 128), stem_type="deep", stem_width=8)
    stem = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16), "maxpool": nn.Identity()}
    for name, layer in stem.items():
        setattr(network, name, layer)
    network.reset_classifier(num_classes)
    return network


class Classifier(L.LightningModule):
    """Anybody's project: SGD with momentum, whose rate falls to zero along a cosine."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.model = network
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """All that is trained."""
        params = [param for param in self.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    @property
    def backbone(self) -> nn.Module:
        """For Lightning's own callback."""
        return nn.ModuleList(child for name, child in self.model.named_children() if name != "fc")


class Probe(L.Callback):
    """A linear probe: the body rests."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing but the head has gradients."""
        for name, param in pl_module.named_parameters():
            param.requires_grad = ".fc." in name

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """No statistics move."""
        pl_module.eval()


class L2SP(L.Callback):
    """Weights are drawn to where they began, in place of zero (arXiv 1802.01483)."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where."""
        body = [param for name, param in pl_module.named_parameters() if ".fc." not in name]
        self.start = [(param, param.detach().clone()) for param in body]

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """The penalty's gradient; the weight decay that the optimizer has for the body is taken back."""
        for param, start in self.start:
            if param.grad is not None:
                param.grad += L2SP_WEIGHT * (param.detach() - start) - 5e-4 * param.detach()


@dataclass(frozen=True)
class Setting:
    """What one training is given.

    Attributes:
        target: its images.
        source: the images that the networks were pretrained on.
        network: pretrained, with its classifier.
        second: another one.
        folder: for what is selected.
        name: of the target's draw.
        steps: how many a row has.
    """

    target: Target
    source: Pictures
    network: nn.Module
    second: nn.Module
    folder: Path
    name: str
    steps: int

    def task(self, images: Pictures | None = None) -> lt.SourceTask:
        """The source, with the classifier that was pretrained on it."""
        images = images or self.source
        augmented = Pictures(images.pixels, images.targets, augmented=True, mirrored=images.mirrored)
        head = copy.deepcopy(self.network.fc)
        return lt.SourceTask(augmented, head=head, forward="joint", unaugmented=images)  # type: ignore[arg-type]

    def seen(self) -> Pictures:
        """The target's images without augmentation."""
        return Pictures(self.target.train.pixels, self.target.train.targets)

    def bank(self, kind: str) -> Any:
        """Filters to select by."""
        if kind == "gabor":
            return kind
        return lt.FilterBank.from_model(self.network, layers=["conv1", "layer1.0.conv1"], normalize=False)

    def selective(
        self, kind: str = "gabor", *, weight: Any = ALWAYS, forward: Any = "joint", **options: Any
    ) -> lt.SelectiveJointFinetuning:
        """Selective joint fine-tuning."""
        neighbors = lt.Neighbors(bank=self.bank(kind), **{"k": NEIGHBORS, **options})
        words = "-".join(str(getattr(neighbors, name)) for name in ("k", "bins", "rounds"))
        cache = self.folder / f"{self.name}-{kind}-{words}.safetensors"
        given: Any = {"neighbors": neighbors, "target": self.seen(), "cache": str(cache), "weight": weight}
        return lt.SelectiveJointFinetuning(replace(self.task(), forward=forward), **given)

    def num_borrowed(self) -> int:
        """How many source images selection borrows at first."""
        cache = self.folder / f"{self.name}-size.safetensors"
        scan = lt.Scan(cache=str(cache), say=lambda line: None)
        chosen = lt.select_neighbors(self.seen(), self.source, k=NEIGHBORS, scan=scan)
        return len(chosen.indices[:, :NEIGHBORS].unique())

    def random_source(self) -> Pictures:
        """As many source images as selection borrows, drawn at random."""
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(1))
        return self.source.only(order[: self.num_borrowed()])

    def taken_for_target(self) -> Pictures:
        """As many source images as selection borrows: those which a classifier most takes for the target's."""
        sides = [features(self.network, images).numpy() for images in (self.seen(), self.source)]
        labels = np.repeat([1, 0], [len(side) for side in sides])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300))
        scores = cross_val_predict(classifier, np.concatenate(sides), labels, cv=5, method="decision_function")
        return self.source.only(torch.from_numpy(scores[labels == 0]).argsort(descending=True)[: self.num_borrowed()])

    def gap(self) -> float:
        """The domain gap, by as many images as the package takes."""
        sides = []
        for images, most in ((self.seen(), TARGET_IMAGES), (self.source, SOURCE_IMAGES)):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            sides.append(features(self.network, images.only(order[:most])))
        return lt.functional.domain_gap(*sides)


Callbacks = Callable[[Setting], Sequence[Any]]


@dataclass(frozen=True)
class Row:
    """A way to fine-tune.

    Attributes:
        callbacks: what it adds to a Trainer.
        length: of training, in those of plain fine-tuning.
        pretrained: whether it begins from the pretrained network.
        tuned_as: the row whose learning rate it takes; its own is chosen where there is none.
        members: how many of the pretrained networks are trained so, each for itself, to be asked together.
    """

    callbacks: Callbacks = field(default=lambda setting: [])
    length: float = 1.0
    pretrained: bool = True
    tuned_as: str = ""
    members: int = 1


def _soft(weight: Any, images: Callable[[Setting], Pictures | None] = lambda setting: None, tuned_as: str = "") -> Row:
    return Row(lambda setting: [lt.SoftFinetuning(setting.task(images(setting)), weight=weight)], tuned_as=tuned_as)


def _selective(**options: Any) -> Row:
    return Row(lambda setting: [setting.selective(**options)], tuned_as="selective")


def _adafilter(**options: Any) -> Row:
    return Row(lambda setting: [lt.AdaFilter(**options)], tuned_as="AdaFilter")


def _gated(**options: Any) -> Row:
    return Row(lambda setting: [lt.GatedTransfer(tap="model.layer3", **options)], tuned_as="gated transfer")


def _thawing(setting: Setting) -> list[Any]:
    epochs = setting.steps / -(-len(setting.target.train) // BATCH)
    return [BackboneFinetuning(unfreeze_backbone_at_epoch=max(1, round(THAWED * epochs)), verbose=False)]


ROWS = {
    "fine-tuning": Row(),
    "linear probe": Row(lambda setting: [Probe()]),
    "from scratch": Row(pretrained=False),
    "soft": _soft(lt.Schedule()),
    "joint, random source": _soft(ALWAYS, Setting.random_source),
    "selective": Row(lambda setting: [setting.selective()]),
    "gated transfer": Row(lambda setting: [lt.GatedTransfer(tap="model.layer3")]),
    "AdaFilter": Row(lambda setting: [lt.AdaFilter()]),
    "collaborative": Row(lambda setting: [lt.CollaborativeFinetuning([setting.second])]),
    "ensemble of two": Row(lambda setting: [lt.CollaborativeFinetuning([setting.second], weight=0.0)]),
    "soft, measured weight": _soft("auto"),
    "selective, measured weight": Row(lambda setting: [setting.selective(weight="auto")]),
    "joint, all of the source": _soft(ALWAYS),
    "fine-tuning, twice as long": Row(length=2.0),
    "L2-SP": Row(lambda setting: [L2SP()]),
    "BackboneFinetuning": Row(_thawing),
    "selective, filters of the network": Row(lambda setting: [setting.selective("network")]),
    "selective, no rounds": Row(lambda setting: [setting.selective(rounds=0)]),
    "selective and gated transfer": Row(
        lambda setting: [setting.selective(), lt.GatedTransfer(tap="model.layer3")], tuned_as="selective"
    ),
    "AdaFilter, all tuned": Row(lambda setting: [lt.AdaFilter(estimator="all_tuned")]),
    "AdaFilter, all frozen": Row(lambda setting: [lt.AdaFilter(estimator="all_frozen")]),
    "AdaFilter, random gates": Row(lambda setting: [lt.AdaFilter(estimator="random")]),
    "transfer module alone": Row(lambda setting: [lt.GatedTransfer(tap="model.layer3", aux_weight=0)]),
    "auxiliary classifier alone": Row(lambda setting: [lt.GatedTransfer(tap="model.layer3", ratio=None, dropout=0.0)]),
    "dropout alone": Row(lambda setting: [lt.GatedTransfer(ratio=None, aux_weight=0)]),
    "two networks, each selective": Row(lambda setting: [setting.selective()], members=2, tuned_as="selective"),
    "selective and AdaFilter": Row(lambda setting: [setting.selective(), lt.AdaFilter()], tuned_as="selective"),
}


TRIED = {  # in search of better defaults, at the learning rate of the row that is varied
    "soft, start .3": _soft(lt.Schedule(0.3), tuned_as="soft"),
    "soft, start .1": _soft(lt.Schedule(0.1), tuned_as="soft"),
    "soft, until the end": _soft(lt.Schedule(until=1.0), tuned_as="soft"),
    "joint, taken for the target's": _soft(ALWAYS, Setting.taken_for_target, tuned_as="joint, random source"),
    "selective, separate passes": _selective(forward="separate"),
    "selective, weight .3": _selective(weight=lt.Schedule(0.3, 0.3)),
    "selective, annealed": _selective(weight=lt.Schedule()),
    "selective, 30 neighbors": _selective(k=30),
    "selective, 300 neighbors": _selective(k=300),
    "selective, 10 bins": _selective(bins=10),
    "selective, 100 bins": _selective(bins=100),
    "selective, least sure quarter": _selective(hard_entropy="75%"),
    "AdaFilter, gate bias 1": _adafilter(gate_bias=1.0),
    "AdaFilter, gate bias 2": _adafilter(gate_bias=2.0),
    "AdaFilter, gate rate .001": _adafilter(gate_lr=0.001),
    "AdaFilter, gate rate .1": _adafilter(gate_lr=0.1),
    "gated transfer, dropout .2": _gated(dropout=0.2, gate_dropout=0.2),
    "gated transfer, no dropout": _gated(dropout=0.0, gate_dropout=0.0),
    "gated transfer, warm-up": _gated(warmup_epochs=10),
}
EVERY = {**ROWS, **TRIED}


class Looking(L.Callback):
    """Accuracy on validation images in the course of training."""

    def __init__(self, images: Pictures, every: int) -> None:
        self.images, self.every = images, every
        self.curve: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Now and then."""
        if trainer.global_step % self.every == 0:
            self.curve.append(accuracy(pl_module.model, self.images))


def accuracy(network: nn.Module, images: Pictures) -> float:
    """Share of images that are right."""
    right = 0
    with evaluating(network), torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISION != "32-true"):
        for pixels, labels in zip(images.pixels.split(500), images.targets.split(500), strict=True):
            right += int((network(normalised(pixels)).argmax(1) == labels).sum())
    torch.clear_autocast_cache()
    return right / len(images)


def features(network: Any, images: Pictures) -> Tensor:
    """(n, 128) what a network gives its head."""
    with evaluating(network):  # and then in the mode that it was in: Lightning's Trainer would leave it in this
        some = [network.forward_features(normalised(pixels)) for pixels in images.pixels.split(500)]
        return torch.cat([network.forward_head(each, pre_logits=True) for each in some])


def discrimination(network: nn.Module, images: Pictures) -> float:
    """How well features tell apart classes that neither task has shown."""
    metric = lt.metrics.GeneralDiscrimination()
    metric.update(features(network, images), images.targets)
    return float(metric.compute())


class Together(nn.Module):
    """What networks say on average."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes) the mean of their probabilities."""
        return torch.stack([network(images).float().softmax(1) for network in self.networks]).mean(0)


def train(
    row: Row, setting: Setting, *, seed: int, lr: float, is_final: bool, unseen: Pictures | None
) -> dict[str, Any]:
    """One training, or one of each network; the seed decides new heads, the order of images and their augmentation.

    Returns:
        Accuracy on the validation part, its curve, CPU seconds; of a final run also that on the test split.
    """
    members = [setting, replace(setting, network=setting.second, second=setting.network)][: row.members]
    began = time.process_time()
    runs = [_fit(row, each, seed=seed, lr=lr) for each in members]
    networks = [module.model for module, _, _ in runs]
    network = networks[0] if row.members == 1 else Together(networks)
    found: dict[str, Any] = {
        "validation": accuracy(network, setting.target.validation),
        "curve": np.mean([curve for _, curve, _ in runs], 0).tolist(),
        "seconds": time.process_time() - began,
    }
    if stopped := "; ".join(reason for _, _, reason in runs if reason):
        found["stopped"] = stopped
    if is_final:
        found["test"] = accuracy(network, setting.target.test)
        if unseen is not None:
            found["discrimination"] = discrimination(networks[0], unseen)
    return found


def _fit(row: Row, setting: Setting, *, seed: int, lr: float) -> tuple[Classifier, list[float], str]:
    """A module, its accuracy in the course of training, and why that has stopped early, if it has."""
    torch.manual_seed(seed)
    network: Any = copy.deepcopy(setting.network) if row.pretrained else small_resnet(1)
    torch.manual_seed(seed)
    network.reset_classifier(setting.target.num_classes)
    steps = round(row.length * setting.steps)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(setting.target.train, batch_size=BATCH, shuffle=True, generator=order)
    module, looking = Classifier(network, lr), Looking(setting.target.validation, steps // LOOKS)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: Any = {"accelerator": "cpu", "precision": PRECISION, **dict.fromkeys(quiet, False)}
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, callbacks=[*row.callbacks(setting), looking], **options)
    try:
        trainer.fit(module, loader)
    except FloatingPointError as error:  # a source loss that is not finite, at too high a rate; scored as it was left
        curve = [*looking.curve, *[0.0] * (LOOKS - len(looking.curve))]
        return module, curve, str(error).partition(":")[0]
    return module, looking.curve, ""
