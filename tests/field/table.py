"""What becomes of each method on each module: the one table that the tests and the guide are made of."""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import nn

from tests.field import shapes
from tests.field.runs import METHODS
from tests.field.shapes import SHAPES


@dataclass(frozen=True)
class Cell:
    """What is expected of a method on a module as it is.

    Attributes:
        kind: "works", "refused" (before the first optimizer step), "warned", or "senseless" (refused too).
        words: of the refusal or the warning; what cures it is among them.
        cure: options with which it works.
    """

    kind: str = "works"
    words: tuple[str, ...] = ()
    cure: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """In the guide's table."""
        if self.cure:
            return "with " + ", ".join(f"`{name}=`" for name in self.cure)
        return {"works": "yes", "senseless": "-"}.get(self.kind, self.kind)


WORKS = Cell()


def refused(*words, **cure):
    return Cell("refused", words, cure)


def warned(*words, **cure):
    return Cell("warned", words, cure)


def senseless(*words):
    return Cell("senseless", words)


def row(*, sourced=WORKS, **cells):
    """A row; the four methods with a source task share what is not said of each."""
    shared = dict.fromkeys(("soft", "auto", "selective", "joint"), sourced)
    return {**dict.fromkeys(METHODS, WORKS), **shared, **cells}


BCE = F.binary_cross_entropy_with_logits
FROZEN_BODY = warned("frozen", "requires_grad_(False)")
ONE_LAYER = senseless("only a patch embedding. The other methods", "GatedTransfer")


DICTS = refused("adapt=", adapt=lambda batch: (batch["image"], batch["label"]))
TRIPLES = refused("adapt=", adapt=lambda batch: (batch[0], batch[1]))
PATHS = refused("adapt=", adapt=lambda batch: (batch[0][1], batch[1]))
BY_MODEL = {"forward": lambda module, images: module.model(images)}
BY_SEEN = {"forward": lambda module, images: module(module.seen(images))}
OF_BATCH = refused("SourceTask(forward=", **BY_MODEL)
VIEWS = refused("adapt=", adapt=lambda batch: (batch[0][0] if isinstance(batch[0], list) else batch[0], batch[1]))
NUMBERS = refused("adapt=", "argmax(1)", adapt=lambda batch: (batch[0], batch[1].argmax(1)))
MIXED = warned("mixup")
SUM = refused("mean")
MEANT = warned("aux_weight=0", "labels=", labels=lambda batch: batch[1])
NO_LINEAR = senseless("before a Linear", "GatedTransfer is not for it")
PER_PIXEL = senseless("per-pixel heads are not supported")
NO_BATCHNORM = senseless("no BatchNorm layer with running statistics", "Leave it out")
NO_PARAMETER = warned("No parameter", "self.parameters()")


def criterion(loss):
    return warned("loss=", loss=loss)


TABLE = {
    "TimmClassifier": row(),
    "BackboneAndHead": row(),
    "SequentialOfChildren": row(),
    "ThawedFromTheEnd": row(),
    "InjectedNetwork": row(),
    "ForwardOfBatch": row(
        probe=refused("ProbeStart(forward=", **BY_MODEL),
        soft=OF_BATCH,
        auto=OF_BATCH,
        selective=OF_BATCH,
        advise=refused("advise(..., forward=", **BY_MODEL),
    ),
    "ConvolutionalClassifier": row(
        statistics=NO_BATCHNORM, probe=senseless("plain nn.Linear"), gated=NO_LINEAR, aux=NO_LINEAR
    ),
    "GradientsSwitchedInForward": row(),
    "TransformerWithoutHead": row(
        statistics=NO_BATCHNORM, adafilter=ONE_LAYER, aux=refused("'backbone.blocks.0'", tap="backbone.blocks.0")
    ),
    "VisionTransformer": row(
        statistics=NO_BATCHNORM, adafilter=ONE_LAYER, aux=refused("'model.blocks.0'", tap="model.blocks.0")
    ),
    "TorchvisionClassifier": row(),
    "DictBatches": row(probe=DICTS, sourced=DICTS, advise=DICTS),
    "NormalizedInStep": row(
        probe=warned("ProbeStart(forward=", **BY_SEEN),
        sourced=warned("on_after_batch_transfer", **BY_SEEN),
        auto=WORKS,
        joint=warned("on_after_batch_transfer"),
        advise=refused("advise(..., forward=", **BY_SEEN),
    ),
    "TransformsOnDevice": row(),
    "HeadOnSequential": row(),
    "LinearProbe": row(
        sourced=NO_PARAMETER,
        auto=WORKS,
        adafilter=warned("self.parameters()"),
        aux=senseless("aux_weight=0"),
        several=FROZEN_BODY,
    ),
    "LayersOnTheModule": row(several=refused("backbone='block1'", backbone="block1")),
    "OneLogit": row(several=refused("loss=", loss=shapes.binary)),
    "OneHot": row(
        probe=NUMBERS,
        sourced=NUMBERS,
        auto=WORKS,
        aux=refused("labels=", labels=lambda batch: batch[1].argmax(1)),
        several=refused("labels=", "loss=", labels=lambda batch: batch[1], loss=BCE),
        advise=NUMBERS,
    ),
    "MultiLabel": row(
        probe=senseless("several labels"),
        sourced=refused("SourceTask(loss=", loss=BCE),
        auto=WORKS,
        selective=senseless("rounds=0"),
        aux=refused("labels="),
        several=refused("labels=", "loss=", labels=lambda batch: batch[1], loss=BCE),
        advise=senseless("class numbers"),
    ),
    "SigmoidAtTheEnd": row(
        probe=senseless("several labels"),
        sourced=refused("SourceTask(loss=", loss=BCE),
        auto=WORKS,
        selective=senseless("rounds=0"),
        aux=refused("labels="),
        several=refused("sigmoid"),
        advise=senseless("class numbers"),
    ),
    "MixupInTheStep": row(aux=warned("aux_weight=0"), several=MIXED),
    "MixupInTheHook": row(
        sourced=refused("batch_hooks=False", batch_hooks=False), auto=WORKS, aux=warned("aux_weight=0"), several=MIXED
    ),
    "LossTimesBatch": row(sourced=SUM, auto=WORKS, aux=SUM, several=refused("mean", "loss=", loss=shapes.times_batch)),
    "SoftmaxAtTheEnd": row(aux=MEANT, several=refused("softmax")),
    "ClassWeights": row(aux=MEANT, several=criterion(shapes.weighted())),
    "LabelSmoothing": row(aux=MEANT, several=criterion(nn.CrossEntropyLoss(label_smoothing=0.1))),
    "DictStep": row(),
    "OneArgumentStep": row(),
    "ThreeTuples": row(sourced=TRIPLES),
    "PathImageLabel": row(probe=PATHS, sourced=PATHS, advise=PATHS),
    "MetricLearning": row(
        probe=VIEWS,
        auto=VIEWS,
        selective=refused("adapt="),
        aux=senseless("aux_weight=0"),
        several=senseless("Run it once a step"),
        advise=senseless("adapt="),
    ),
    "Segmentation": row(
        probe=senseless("No classifier"),
        sourced=PER_PIXEL,
        gated=PER_PIXEL,
        aux=PER_PIXEL,
        several=PER_PIXEL,
        advise=PER_PIXEL,
    ),
    "FrozenConvNeXt": row(
        statistics=NO_BATCHNORM,
        sourced=warned("requires_grad"),
        auto=WORKS,
        adafilter=warned("requires_grad"),
        several=FROZEN_BODY,
    ),
    "ConvNeXt": row(statistics=NO_BATCHNORM),
    "ReturnsFeatures": row(joint=refused("forward='separate'"), several=refused("as self.model(images)")),
    "ForwardOfTuple": row(),
    "WithoutForward": row(),
    "ApartWithoutForward": row(),
    "UnusualNames": row(several=refused("backbone='net.to_features'", backbone="net.to_features")),
    "BuiltInConfigureModel": row(),
    "BuiltInSetup": row(),
    "OldNamespace": row(),
}


def cells():
    """Every cell: the module, the method and what is expected."""
    for shape, expected in TABLE.items():
        for method, cell in expected.items():
            yield SHAPES[shape], method, cell


TITLES = {
    "statistics": "`FrozenStatistics`",
    "probe": "`ProbeStart`",
    "soft": "soft",
    "auto": "soft, measured weight",
    "selective": "selective",
    "joint": '`forward="joint"`',
    "adafilter": "AdaFilter",
    "gated": "gated",
    "aux": "its auxiliary classifier",
    "several": "several networks",
    "advise": "`advise`",
}


def page():
    """The guide's table, and below it in how many of the modules a method works, of those in which it makes sense."""
    yield f"| your module | {' | '.join(TITLES[method] for method in METHODS)} |"
    yield "|---" * (1 + len(METHODS)) + "|"
    for shape, expected in TABLE.items():
        says = SHAPES[shape].__doc__.partition("\n")[0]
        yield f"| {says} | {' | '.join(expected[method].shown for method in METHODS)} |"
    shares = (f"{works} of {of}" for of, works, _ in counts().values())
    yield f"| **works, of those where it makes sense** | {' | '.join(shares)} |"


def counts():
    """By method: cells in which it makes sense, of these such that work, and such that work as they come."""
    found = {}
    for method in METHODS:
        mine = [expected[method] for expected in TABLE.values() if expected[method].kind != "senseless"]
        as_it_comes = sum(cell.kind == "works" for cell in mine)
        found[method] = (len(mine), as_it_comes + sum(bool(cell.cure) for cell in mine), as_it_comes)
    return found
