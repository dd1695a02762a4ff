"""Define the rows of the regime benchmark: each a way to tune a pretrained network, in an ordinary LightningModule."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from regime_data import Draw, Photos
from regime_network import DECAY, ByAdam, Rates, Tuning, answers, body, features
from sklearn.linear_model import LogisticRegressionCV  # type: ignore[import-untyped]
from torch import Tensor, nn

import lightning_transfer as lt
from lightning_transfer.tracing import evaluating

BATCH, NEIGHBORS = 24, 20
ALWAYS, TO_THE_END = lt.Schedule(1.0, 1.0), lt.Schedule(until=1.0)
L2SP_WEIGHT = 0.01  # the default of the authors' script
FIRST_LAYERS = ["conv_stem", "blocks.0.0.conv_dw"]
PENALTIES, FOLDS = (1e-3, 1e-2, 1e-1, 1.0, 10.0), 5  # of the probe: scikit-learn's C, a small one is a strong penalty
WARM_UP = 0.2  # share of training for which callbacks freeze the backbone, if they can


@dataclass(frozen=True)
class Setting:
    """The inputs of one training.

    Attributes:
        draw: the target's images.
        source: what the networks were pretrained on, as far as it is available.
        network: pretrained, with its classifier.
        second: loads another one.
        folder: for what is selected and for probes.
        steps: of training.
    """

    draw: Draw
    source: Photos
    network: Any
    second: Callable[[], nn.Module]
    folder: Path
    steps: int

    @property
    def epochs(self) -> float:
        """Return how many passes over the target training makes."""
        return self.steps / max(1, len(self.draw.train) // BATCH)

    def task(self) -> lt.SourceTask:
        """Return the source, with the classifier that was pretrained on it."""
        augmented = Photos(self.source.pixels, self.source.targets, augmented=True)
        return lt.SourceTask(augmented, head=copy.deepcopy(self.network.classifier), unaugmented=self.source)

    def selective(self, kind: str = "gabor") -> lt.SelectiveJointFinetuning:
        """Return selective joint fine-tuning by one of two banks of filters."""
        bank: Any = kind
        if kind == "network":
            bank = lt.FilterBank.from_model(self.network, layers=FIRST_LAYERS, normalize=False)
        neighbors, cache = lt.Neighbors(NEIGHBORS, bank=bank), self.folder / f"{self.draw.name}-{kind}.safetensors"
        return lt.SelectiveJointFinetuning(
            self.task(), neighbors=neighbors, target=self.draw.train, cache=cache, weight=ALWAYS
        )

    def nearest(self) -> Tensor:
        """Return the places of the source images that are selected at first."""
        scan = lt.Scan(cache=self.folder / f"{self.draw.name}-size.safetensors", say=lambda line: None)
        chosen = lt.select_neighbors(self.draw.train, self.source, k=NEIGHBORS, scan=scan)
        places: Tensor = chosen.indices[:, :NEIGHBORS].unique()
        return places

    def random_source(self) -> lt.SourceTask:
        """Return a task of random source images, as many as are selected at first."""
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(1))
        return replace(self, source=self.source.only(order[: len(self.nearest())])).task()

    def start(self) -> lt.ProbeStart:
        """Return the callback that starts every head of a network, or of several, as the probe of what it takes."""
        return lt.ProbeStart(unaugmented=self.draw.train)

    def probe(self) -> nn.Linear:
        """Return a linear classifier of the pretrained features, with a cross-validated penalty; fitted once."""
        path, head = self.folder / f"{self.draw.name}-probe.pt", nn.Linear(1, 1)
        if not path.exists():
            torch.save(fitted(features(self.network, self.draw.train), self.draw.train.targets), path)
        weight, bias = torch.load(path, weights_only=True)
        head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
        head.out_features, head.in_features = weight.shape
        return head


def fitted(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (classes, width) and bias of logistic regression with a cross-validated penalty."""
    folds = min(FOLDS, int(labels.bincount().min()))
    options = {"Cs": PENALTIES, "cv": folds, "max_iter": 300, "scoring": "neg_log_loss", "use_legacy_attributes": False}
    found = LogisticRegressionCV(l1_ratios=(0.0,), **options).fit(inputs.numpy(), labels.numpy())
    return torch.from_numpy(found.coef_).float(), torch.from_numpy(found.intercept_).float()


class L2SP(L.Callback):
    """Decay weights towards their pretrained values instead of zero (arXiv 1802.01483)."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the pretrained values."""
        self.start = [(param, param.detach().clone()) for param in body(pl_module)]

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Add the penalty's gradient, and subtract the optimizer's weight decay of the backbone."""
        for param, start in self.start:
            if param.grad is not None:
                param.grad += L2SP_WEIGHT * (param.detach() - start) - DECAY * param.detach()


class Nudge(L.Callback):
    """Make the first layer's weights a millionth larger, which changes what comes after by its rounding alone."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Change them."""
        pl_module.model.conv_stem.weight.data.mul_(1 + 1e-6)


class Clipped(Tuning):
    """Fine-tune with the norm of the gradient clipped to 1."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip it."""
        self.clip_gradients(optimizer, gradient_clip_val=1.0)


class KeptHead(Tuning, ABC):
    """Fine-tuning that also trains the kept classifier on soft labels of the target's images; abstract.

    Args:
        network: pretrained, with a new head.
        rates: of the backbone, which the kept classifier shares, and of the new head.
        kept: the pretrained classifier.
        weight: of the second loss.
    """

    temperature = 1.0

    def __init__(self, network: Any, rates: Rates, *, kept: nn.Module, weight: lt.Schedule) -> None:
        super().__init__(network, rates)
        self.kept = copy.deepcopy(kept)
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of both heads; the kept one's is against soft labels."""
        images, labels = batch
        inputs = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        said = self.kept(inputs) / self.temperature
        second = self.temperature**2 * F.cross_entropy(said, self.wanted(images, labels))
        weight = self.weight(self.trainer.global_step / self.trainer.max_steps)
        return F.cross_entropy(self.model.classifier(inputs), labels) + weight * second

    @abstractmethod
    def wanted(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the soft labels (B, source classes)."""


class WithoutForgetting(KeptHead):
    """Learning without forgetting (arXiv 1606.09282): the kept head predicts what the pretrained network predicts.

    The pretrained network is in eval mode, so the two normalise by other statistics, as in the usual code.
    """

    temperature = 2.0

    def __init__(self, network: Any, rates: Rates, *, teacher: nn.Module, **options: Any) -> None:
        super().__init__(network, rates, **options)
        self._teacher = [teacher]  # in a list, it is not a part of the module and not trained

    def wanted(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the teacher's probabilities."""
        teacher = self._teacher[0].to(images.device)
        with evaluating(teacher):
            said: Tensor = teacher(images)
        return (said / self.temperature).softmax(1)


class CoTuning(KeptHead):
    """Co-Tuning (NeurIPS 2020): the kept head predicts which source classes the target class resembles.

    Args:
        network: pretrained, with a new head.
        rates: of the backbone and the head.
        relation: (target classes, source classes) mean probabilities of the pretrained network, its authors' "direct"
            way to learn them.
        options: of `KeptHead`.
    """

    def __init__(self, network: Any, rates: Rates, *, relation: Tensor, **options: Any) -> None:
        super().__init__(network, rates, **options)
        self.register_buffer("relation", relation)

    def wanted(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the source classes of each label."""
        return self.get_buffer("relation")[labels]


def relation(setting: Setting) -> Tensor:
    """Return the mean probabilities (target classes, source classes) of the pretrained network on each target class."""
    said, labels = answers(setting.network, setting.draw.train).softmax(1), setting.draw.train.targets
    return torch.stack([said[labels == label].mean(0) for label in range(setting.draw.num_classes)])


Callbacks = Callable[[Setting], Sequence[Any]]
Module = Callable[[Setting, nn.Module, Rates], Tuning]


@dataclass(frozen=True)
class Row:
    """A way to tune.

    Attributes:
        callbacks: what it adds to a Trainer.
        module: makes the module of a network with a new head.
        from_probe: whether the new head starts as the linear probe.
        is_trained: False for the linear probe itself.
        tuned_as: the row whose rates it takes; if empty, its own are chosen.
    """

    callbacks: Callbacks = field(default=lambda setting: [])
    module: Module = field(default=lambda setting, network, rates: Tuning(network, rates))
    from_probe: bool = False
    is_trained: bool = True
    tuned_as: str = ""


def _soft(weight: lt.Schedule, task: Callable[[Setting], lt.SourceTask] = Setting.task, **options: Any) -> Row:
    return Row(lambda setting: [lt.SoftFinetuning(task(setting), weight=weight)], **options)


def _without_forgetting(weight: lt.Schedule) -> Row:
    def module(setting: Setting, network: nn.Module, rates: Rates) -> Tuning:
        mine = setting.network
        return WithoutForgetting(network, rates, teacher=mine, kept=mine.classifier, weight=weight)

    return Row(module=module, tuned_as=PLAIN)


def _cotuning(setting: Setting, network: nn.Module, rates: Rates) -> Tuning:
    return CoTuning(network, rates, relation=relation(setting), kept=setting.network.classifier, weight=ALWAYS)


def _several(weight: float, **options: Any) -> Row:
    return Row(lambda setting: [lt.CollaborativeFinetuning([setting.second()], weight=weight)], **options)


def _unclipped() -> lt.FrozenStatistics:  # for rows with rates of their own, which are low enough
    return lt.FrozenStatistics(gradient_clip_val=None)


def _clipped(other: Callable[[Setting], Any]) -> Row:
    """Return a row of another callback beside ProbeStart and FrozenStatistics, all as they come."""
    return Row(
        lambda setting: [other(setting), setting.start(), lt.FrozenStatistics()], from_probe=True, tuned_as=PLAIN
    )


def _by_adam(setting: Setting, network: nn.Module, rates: Rates) -> Tuning:
    return ByAdam(network, rates)


def _warm_up(setting: Setting) -> int:
    return max(1, round(WARM_UP * setting.epochs))


PLAIN, PROBE, FROZEN = "fine-tuning", "linear probe", "LP-FT, frozen statistics"
CLIPPED = f"{FROZEN}, clipped"
STATISTICS = "frozen statistics, clipped"
ROWS = {  # the most informative first
    PLAIN: Row(),
    PROBE: Row(is_trained=False),
    "LP-FT": Row(from_probe=True),
    CLIPPED: Row(lambda setting: [lt.FrozenStatistics()], from_probe=True, tuned_as=PLAIN),
    "soft": _soft(lt.Schedule()),
    "knowledge": Row(lambda setting: [lt.SoftFinetuning(lt.SourceKnowledge(setting.network))], tuned_as=PLAIN),
    "LWF": _without_forgetting(ALWAYS),
    "gated transfer": Row(lambda setting: [lt.GatedTransfer()]),
    "selective": Row(lambda setting: [setting.selective()], tuned_as="soft"),
    FROZEN: Row(lambda setting: [_unclipped()], from_probe=True),
    f"{FROZEN}, two networks": Row(
        lambda setting: [lt.CollaborativeFinetuning([setting.second()], weight=0.0), setting.start(), _unclipped()],
        from_probe=True,
        tuned_as=FROZEN,
    ),
    f"{CLIPPED}, two networks": _clipped(lambda setting: lt.CollaborativeFinetuning([setting.second()], weight=0.0)),
    f"{CLIPPED}, gated transfer": _clipped(lambda setting: lt.GatedTransfer()),
    f"{CLIPPED}, AdaFilter": _clipped(lambda setting: lt.AdaFilter()),
    f"{FROZEN}, knowledge": Row(
        lambda setting: [_unclipped(), lt.SoftFinetuning(lt.SourceKnowledge(setting.network))],
        from_probe=True,
        tuned_as=FROZEN,
    ),
    f"{FROZEN}, soft": Row(
        lambda setting: [_unclipped(), lt.SoftFinetuning(setting.task(), weight=lt.Schedule())],
        from_probe=True,
        tuned_as=FROZEN,
    ),
    STATISTICS: Row(lambda setting: [lt.FrozenStatistics()], tuned_as=PLAIN),
    "fine-tuning, clipped": Row(module=lambda setting, network, rates: Clipped(network, rates), tuned_as=PLAIN),
    "fine-tuning, nudged": Row(lambda setting: [Nudge()], tuned_as=PLAIN),
    "Co-Tuning": Row(module=_cotuning, tuned_as=PLAIN),
    "two networks": _several(0.0, tuned_as=PLAIN),
    "collaborative": _several(0.2, tuned_as=PLAIN),
    "AdaFilter": Row(lambda setting: [lt.AdaFilter()], tuned_as=PLAIN),
    "AdaFilter, half tuned at first": Row(lambda setting: [lt.AdaFilter(gate_bias=0.0)], tuned_as=PLAIN),
    "gated transfer, warm-up": Row(
        lambda setting: [lt.GatedTransfer(warmup_epochs=_warm_up(setting))], tuned_as="gated transfer"
    ),
    "joint, random source": _soft(ALWAYS, Setting.random_source, tuned_as="soft"),
    "soft, to the end": _soft(TO_THE_END, tuned_as="soft"),
    "selective, filters of the network": Row(lambda setting: [setting.selective("network")], tuned_as="soft"),
    "LWF, annealed": _without_forgetting(lt.Schedule()),
    "L2-SP": Row(lambda setting: [L2SP()], tuned_as=PLAIN),
    "LP-FT, L2-SP": Row(lambda setting: [L2SP()], from_probe=True, tuned_as="LP-FT"),
    "LP-FT, two networks": Row(
        lambda setting: [lt.CollaborativeFinetuning([setting.second()], weight=0.0), setting.start()],
        from_probe=True,
        tuned_as="LP-FT",
    ),
    "rate falls with depth": Row(
        module=lambda setting, network, rates: Tuning(network, rates, depth_decay=0.75), tuned_as=PLAIN
    ),
    "BackboneFinetuning": Row(
        lambda setting: [BackboneFinetuning(unfreeze_backbone_at_epoch=_warm_up(setting), verbose=False)],
        tuned_as=PLAIN,
    ),
    f"{PLAIN}, AdamW": Row(module=_by_adam),
    f"{STATISTICS}, AdamW": Row(lambda setting: [lt.FrozenStatistics()], _by_adam, tuned_as=f"{PLAIN}, AdamW"),
}
