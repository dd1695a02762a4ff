"""Define the rows of the transfer matrix: each a way to fine-tune, in an ordinary LightningModule."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import cross_val_predict  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import nn
from transfer_data import Pictures, Target
from transfer_networks import features

import lightning_transfer as lt
from lightning_transfer.source.gap import SOURCE_IMAGES, TARGET_IMAGES

BATCH, NEIGHBORS = 32, 100
ALWAYS = lt.Schedule(1.0, 1.0)
HALF: dict[str, Any] = {"gate_bias": 0.0}  # AdaFilter starts with half of its filters tuned
L2SP_WEIGHT = 0.01  # the default of the authors' script
THAWED = 0.2  # share of training after which BackboneFinetuning trains the backbone


class Probe(L.Callback):
    """A linear probe: the backbone is frozen."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freeze everything except the head."""
        for name, param in pl_module.named_parameters():
            param.requires_grad = ".fc." in name

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep BatchNorm's statistics."""
        pl_module.eval()


class KeptStatistics(L.Callback):
    """Freeze BatchNorm's statistics; its weight and bias are trained."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep BatchNorm's statistics."""
        for layer in pl_module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class GateRate(L.Callback):
    """Give AdaFilter's gates their own learning rate."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Set the rate before the optimizer is made."""
        pl_module.gate_lr = self.rate


class L2SP(L.Callback):
    """Decay weights towards their pretrained values instead of zero (arXiv 1802.01483)."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the pretrained values."""
        body = [param for name, param in pl_module.named_parameters() if ".fc." not in name]
        self.start = [(param, param.detach().clone()) for param in body]

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Add the penalty's gradient, and subtract the optimizer's weight decay of the backbone."""
        for param, start in self.start:
            if param.grad is not None:
                param.grad += L2SP_WEIGHT * (param.detach() - start) - 5e-4 * param.detach()


@dataclass(frozen=True)
class Setting:
    """The inputs of one training.

    Attributes:
        target: its images.
        source: the images that the networks were pretrained on.
        network: pretrained, with its classifier.
        second: another one.
        folder: for selections.
        name: of the target's draw.
        steps: of plain fine-tuning.
    """

    target: Target
    source: Pictures
    network: nn.Module
    second: nn.Module
    folder: Path
    name: str
    steps: int

    def task(self, images: Pictures | None = None) -> lt.SourceTask:
        """Return the source, with the classifier that was pretrained on it."""
        images = images or self.source
        augmented = Pictures(images.pixels, images.targets, augmented=True, mirrored=images.mirrored)
        head = copy.deepcopy(self.network.fc)
        return lt.SourceTask(augmented, head=head, forward="joint", unaugmented=images)  # type: ignore[arg-type]

    def seen(self) -> Pictures:
        """Return the target's images without augmentation."""
        return Pictures(self.target.train.pixels, self.target.train.targets)

    def bank(self, kind: str) -> Any:
        """Return the filters to select by."""
        if kind == "gabor":
            return kind
        return lt.FilterBank.from_model(self.network, layers=["conv1", "layer1.0.conv1"], normalize=False)

    def selective(
        self, kind: str = "gabor", *, weight: Any = ALWAYS, forward: Any = "joint", **options: Any
    ) -> lt.SelectiveJointFinetuning:
        """Return selective joint fine-tuning."""
        neighbors = lt.Neighbors(bank=self.bank(kind), **{"k": NEIGHBORS, **options})
        words = "-".join(str(getattr(neighbors, name)) for name in ("k", "bins", "rounds"))
        cache = self.folder / f"{self.name}-{kind}-{words}.safetensors"
        given: Any = {"neighbors": neighbors, "target": self.seen(), "cache": str(cache), "weight": weight}
        return lt.SelectiveJointFinetuning(replace(self.task(), forward=forward), **given)

    def num_borrowed(self) -> int:
        """Return how many source images selection borrows at first."""
        cache = self.folder / f"{self.name}-size.safetensors"
        scan = lt.Scan(cache=str(cache), say=lambda line: None)
        chosen = lt.select_neighbors(self.seen(), self.source, k=NEIGHBORS, scan=scan)
        return len(chosen.indices[:, :NEIGHBORS].unique())

    def random_source(self) -> Pictures:
        """Return as many source images as selection borrows, drawn at random."""
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(1))
        return self.source.only(order[: self.num_borrowed()])

    def taken_for_target(self) -> Pictures:
        """Return as many source images as selection borrows: those most similar to the target's by a classifier."""
        sides = [features(self.network, images).numpy() for images in (self.seen(), self.source)]
        labels = np.repeat([1, 0], [len(side) for side in sides])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300))
        scores = cross_val_predict(classifier, np.concatenate(sides), labels, cv=5, method="decision_function")
        return self.source.only(torch.from_numpy(scores[labels == 0]).argsort(descending=True)[: self.num_borrowed()])

    def gap(self) -> float:
        """Return the domain gap, measured on as many images as the package uses."""
        drawn = []
        for images, most in ((self.target.train, TARGET_IMAGES), (self.source, SOURCE_IMAGES)):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            drawn.append(images.only(order[:most]))
        mine, theirs = (features(self.network, images) for images in drawn)
        return lt.functional.domain_gap(mine, theirs, target_groups=drawn[0].groups)


Callbacks = Callable[[Setting], Sequence[Any]]


@dataclass(frozen=True)
class Row:
    """A way to fine-tune.

    Attributes:
        callbacks: what it adds to a Trainer.
        length: of training, in multiples of plain fine-tuning.
        pretrained: whether it starts from the pretrained network.
        tuned_as: the row whose learning rate it takes; if empty, its own is chosen.
        members: how many pretrained networks are trained like this, separately, and averaged.
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


def _adafilter(tuned_as: str = "AdaFilter", **options: Any) -> Row:
    return Row(lambda setting: [lt.AdaFilter(**{**HALF, **options})], tuned_as=tuned_as)


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
    "AdaFilter": _adafilter(""),
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
    "selective and AdaFilter": Row(lambda setting: [setting.selective(), lt.AdaFilter(**HALF)], tuned_as="selective"),
}


TRIED = {  # in search of better defaults, at the learning rate of the row that is varied or that it starts as
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
    "AdaFilter, gate bias .05": _adafilter("fine-tuning", gate_bias=0.05),  # all filters start as tuned, some are shut
    "AdaFilter, gate bias 1": _adafilter("fine-tuning", gate_bias=1.0),  # all are tuned and stay so
    "AdaFilter, gate bias 2": _adafilter("fine-tuning", gate_bias=2.0),
    "AdaFilter, gate rate .001": Row(lambda setting: [lt.AdaFilter(**HALF), GateRate(0.001)], tuned_as="AdaFilter"),
    "AdaFilter, gate rate .1": Row(lambda setting: [lt.AdaFilter(**HALF), GateRate(0.1)], tuned_as="AdaFilter"),
    "AdaFilter, first two stages": _adafilter(gated=["model.layer1.*", "model.layer2.*"]),
    "AdaFilter, statistics kept": Row(lambda setting: [lt.AdaFilter(**HALF), KeptStatistics()], tuned_as="AdaFilter"),
    "fine-tuning, statistics kept": Row(lambda setting: [KeptStatistics()], tuned_as="fine-tuning"),
    "gated transfer, dropout .2": _gated(dropout=0.2, gate_dropout=0.2),
    "gated transfer, no dropout": _gated(dropout=0.0, gate_dropout=0.0),
    "gated transfer, warm-up": _gated(warmup_epochs=10),
    "collaborative, weight .05": Row(
        lambda setting: [lt.CollaborativeFinetuning([setting.second], weight=0.05)], tuned_as="collaborative"
    ),
}
EVERY = {**ROWS, **TRIED}
