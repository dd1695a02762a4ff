"""METHODS: one row a method. Every promise in tests/contracts runs over this table."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from examples.your_own_method.delta import DELTA
from examples.your_own_method.l2_sp import L2SP
from tests import toys
from tests.reference import held, layers, soft


class SoftByHand(lt.SourceTaskMixin, L.LightningModule):
    """Soft fine-tuning in manual optimization."""

    def __init__(self, source, **options):
        super().__init__()
        self.automatic_optimization = False
        self.model = toys.toy_net()
        self.add_source_task(source, **options)

    def forward(self, pixels):
        return self.model(pixels)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(self.joint_loss(loss))
        optimizer.step()

    configure_optimizers = toys.ToySteps.configure_optimizers


@dataclass(frozen=True, eq=False)
class MethodCase:
    """What the contract suite needs to know about a method.

    Attributes:
        name: shown in test ids.
        has_source: whether it trains on source images beside the target's.
        is_joint: whether one forward takes both.
        changes_layers: whether it leaves other layers in the user's network.
        adds_loss: whether it adds a term to the loss.
        tolerance: how far the weights may be from the hand-written loop's; 0 is to the bit.
        callback: makes the callback, effective on a `ToySteps` module, from a source dataset and a kept head.
        off: makes the same callback with everything turned off.
        always: makes the same callback with another weight.
        mixin: makes a LightningModule that does the same by hand, or None.
        monitored: a value that it logs, other in each step.
        options: some of those that loggers get.
        mixin_options: the same of the mixin's.
        mixin_loss: the mixin's method that takes the loss and returns the joint one.
        reference: trains the same network by a hand-written loop.
        of_weights: whether the term that it adds is of weights alone, not of images.
        plain: takes out of a module what stays in it after a fit.
        other: makes the same callback with options that change layers in another way.
        head: what the weight of the user's head is called, in changed layers.
        load: builds a changed module from a checkpoint.
    """

    name: str
    has_source: bool
    is_joint: bool
    changes_layers: bool
    adds_loss: bool
    tolerance: float
    callback: Callable[..., Any]
    off: Callable[..., Any]
    always: Callable[..., Any]
    mixin: Callable[..., Any] | None
    reference: Callable[..., Any]
    monitored: str
    options: dict[str, Any]
    mixin_options: dict[str, Any] = field(default_factory=dict)
    mixin_loss: str = ""
    of_weights: bool = False
    plain: Callable[[Any], object] = lambda module: None
    other: Callable[..., Any] | None = None
    head: str = "model.fc.weight"
    load: Callable[..., Any] = lt.load_from_checkpoint

    @property
    def has_mixin(self) -> bool:
        return self.mixin is not None

    def __str__(self) -> str:
        return self.name


UNTIL = 5  # optimizer steps until the source weight is 0


class SelectiveByHand(SoftByHand):
    """Selective joint fine-tuning in manual optimization."""


def _source(data=None, **options):
    options = {"batch_size": 4, **options}
    return lt.SourceTask(toys.source_data() if data is None else data, head=toys.source_head(), **options)


def _soft(forward, mix):
    schedule = lt.Schedule(until_steps=UNTIL)
    return MethodCase(
        name=f"soft-{forward}-{mix}",
        has_source=True,
        is_joint=forward == "joint",
        changes_layers=False,
        adds_loss=True,
        tolerance=0.0,
        callback=lambda data=None, **options: lt.SoftFinetuning(
            _source(data, forward=forward, **options), weight=schedule, mix=mix
        ),
        off=lambda data=None: lt.SoftFinetuning(_source(data, forward=forward), weight=lt.Schedule(0, 0), mix=mix),
        always=lambda weight, data=None, **options: lt.SoftFinetuning(
            _source(data, forward=forward, **options), weight=weight, mix=mix
        ),
        mixin=lambda data=None: SoftByHand(_source(data, forward=forward), weight=schedule, mix=mix),
        reference=lambda **run: soft.train(forward=forward, mix=mix, until=UNTIL, **run),
        monitored="transfer/target_loss",
        options={"weight/start": 1.0, "weight/until_steps": 5, "source/batch_size": 4, "head": "auto"},
        mixin_options={"weight/until_steps": 5, "source/batch_size": 4, "head": "auto", "borrow": None},
        mixin_loss="joint_loss",
    )


def toy_bank() -> lt.FilterBank:
    """Four filters for pictures of 6 pixels, which a Gabor bank could not take."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


def borrowed(**options):
    """A few neighbors for each target image, and a round in mid run in which some are hard."""
    every = 2 if options.get("rounds", 1) else None
    return lt.Neighbors(**{"k": 6, "bank": toy_bank(), "rounds": 1, "every": every, **options})


def _selective(forward):
    schedule = lt.Schedule(until_steps=UNTIL)

    def make(data=None, *, weight=schedule, neighbors=None, target=None, **options):
        return lt.SelectiveJointFinetuning(
            _source(data, forward=forward, unaugmented=toys.source_data(), **options),
            neighbors=neighbors or borrowed(),
            target=target or toys.target_data(),
            weight=weight,
        )

    return MethodCase(
        name=f"selective-{forward}",
        has_source=True,
        is_joint=forward == "joint",
        changes_layers=False,
        adds_loss=True,
        tolerance=0.0,
        callback=make,
        off=lambda data=None: make(data, weight=lt.Schedule(0, 0)),
        always=lambda weight, data=None, **options: make(data, weight=weight, **options),
        mixin=lambda data=None: SelectiveByHand(
            _source(data, forward=forward, unaugmented=toys.source_data()),
            weight=schedule,
            borrow=lt.Borrowing(borrowed(), target=toys.target_data()),
        ),
        reference=lambda **run: soft.train(forward=forward, mix="add", until=UNTIL, **run),
        monitored="transfer/target_loss",
        options={"neighbors/k": 6, "neighbors/rounds": 1, "weight/end": 0.0},
        mixin_options={"weight/until_steps": 5, "source/batch_size": 4, "head": "auto", "borrow/neighbors/k": 6},
        mixin_loss="joint_loss",
    )


class SourceData(torch.utils.data.TensorDataset):
    """The source dataset as a YAML file names it."""

    def __init__(self) -> None:
        super().__init__(*toys.source_data().tensors)


class TargetData(torch.utils.data.TensorDataset):
    """The target dataset as a YAML file names it."""

    def __init__(self) -> None:
        super().__init__(*toys.target_data().tensors)


class GatedFilters(lt.AdaFilterMixin, toys.ToySteps, L.LightningModule):
    """AdaFilter in a module of one's own."""

    def __init__(self, **options):
        super().__init__()
        self.add_adafilter(**options)


class GatedFeatures(lt.GatedTransferMixin, toys.ToySteps, L.LightningModule):
    """The gated transfer network in manual optimization."""

    def __init__(self, **options):
        super().__init__()
        self.automatic_optimization = False
        self.add_gated_transfer(**options)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.gated_loss(super().training_step(batch, batch_idx)))
        optimizer.step()


def _adafilter():
    options = {"gated": "model.conv", "gate_width": 4, "gate_bias": 0.0}  # half of the gates are open

    def reference(dtype=torch.float32, **run):
        gated = toys.LitToy()
        lt.functional.apply_adafilter(gated, **options)
        network = layers.Adafilter(gated.model.adafilter.gate.state_dict(), dtype)
        return network, layers.train(network, dtype=dtype, **run)

    return MethodCase(
        name="adafilter",
        has_source=False,
        is_joint=False,
        changes_layers=True,
        adds_loss=False,
        tolerance=5e-5,
        callback=lambda data=None, **_: lt.AdaFilter(**options),
        off=lambda data=None: lt.AdaFilter(gated="model.conv", estimator="all_tuned"),
        always=lambda weight, data=None, **_: lt.AdaFilter(**options),
        mixin=lambda data=None: GatedFilters(**options),
        reference=reference,
        monitored="transfer/tuned",
        options={"gate_width": 4, "gated": "model.conv", "estimator": "straight_through"},
        mixin_options={"gate_width": 4, "gated": "model.conv", "estimator": "straight_through"},
        plain=lt.functional.remove_adafilter,
        other=lambda: lt.AdaFilter(gated="model.other", gate_width=4),
        head="model.fc.weight",
    )


def _gated():
    options = {"tap": "model.bn", "ratio": 2, "gate_dropout": 0.0, "dropout": 0.0}

    def reference(dtype=torch.float32, **run):
        module = toys.LitToy()
        callback = lt.GatedTransfer(**options)
        callback.change_layers(None, module)
        part = callback.make_part(module)
        network = layers.GatedTransfer(module.model.fc.transfer.state_dict(), part.classifier.state_dict(), dtype)
        return network, layers.train(network, dtype=dtype, **run)

    return MethodCase(
        name="gated",
        has_source=False,
        is_joint=False,
        changes_layers=True,
        adds_loss=True,
        tolerance=5e-5,
        callback=lambda data=None, **_: lt.GatedTransfer(**options),
        off=lambda data=None: lt.GatedTransfer(ratio=None, dropout=0.0, aux_weight=0),
        always=lambda weight, data=None, **_: lt.GatedTransfer(**options),
        mixin=lambda data=None: GatedFeatures(**options),
        reference=reference,
        monitored="transfer/aux_loss",
        options={"ratio": 2, "tap": "model.bn", "aux_weight": 0.2, "labels": "find_labels"},
        mixin_options={"ratio": 2, "tap": "model.bn", "aux_weight": 0.2, "labels": "find_labels"},
        mixin_loss="gated_loss",
        plain=lt.functional.remove_gated_transfer,
        other=lambda: lt.GatedTransfer(head="model.x", ratio=2),
        head="model.fc.head.weight",
    )


class Collaborating(lt.CollaborativeMixin, toys.ToySteps, L.LightningModule):
    """Two networks in manual optimization."""

    def __init__(self, **options):
        super().__init__()
        self.automatic_optimization = False
        self.add_sources([toys.OtherNet()], **options)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.collaborative_loss(super().training_step(batch, batch_idx)))
        optimizer.step()


def _collaborative(name="collaborative", place="model", **options):
    """Two networks, at the place of the user's, or of the head that stands apart from what images enter."""
    options = {"frozen_layers": {"source1": 1}, **options}

    def load(cls, path):
        """A checkpoint cannot build a network of one's own make beside the first, so it is given."""
        with pytest.raises(lt.TransferConfigError, match=r"source1.*apply_collaborative.*frozen_layers={'source1': 1}"):
            lt.load_from_checkpoint(cls, path)
        module = cls()
        lt.functional.apply_collaborative(module, [toys.OtherNet()], **options)
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        return module

    def reference(dtype=torch.float32, **run):
        module = toys.LitToy()
        lt.functional.apply_collaborative(module, [toys.OtherNet()], **options)
        other = module.get_submodule(f"{place}.members.source1.network")
        network = layers.Collaborative(other.state_dict(), dtype, place)
        return network, layers.train(network, dtype=dtype, **run)

    return MethodCase(
        name=name,
        has_source=False,
        is_joint=False,
        changes_layers=True,
        adds_loss=True,
        tolerance=5e-5,
        callback=lambda data=None, **_: lt.CollaborativeFinetuning([toys.OtherNet()], **options),
        off=lambda data=None: lt.CollaborativeFinetuning([], **{**options, "frozen_layers": None}),
        always=lambda weight, data=None, **_: lt.CollaborativeFinetuning([toys.OtherNet()], **options),
        mixin=lambda data=None: Collaborating(**options),
        reference=reference,
        monitored="transfer/disagreement",
        options={"weight": 0.2, "frozen_layers/source1": 1, "sources/0": "OtherNet"},
        mixin_options={"sources/0": "OtherNet", "weight": 0.2},
        mixin_loss="collaborative_loss",
        plain=lt.functional.remove_collaborative,
        other=lambda: lt.CollaborativeFinetuning([toys.OtherNet()], **{**options, "frozen_layers": None}),
        head="model.fc.weight".replace(place, f"{place}.members.own.network"),
        load=load,
    )


def _held(name, make, network, of_weights, **options):
    """A method of examples/your_own_method, which only adds a term of the target's images or of the weights."""

    def reference(dtype=torch.float32, **run):
        net = network(dtype)
        return net, layers.train(net, dtype=dtype, **run)

    return MethodCase(
        name=name,
        has_source=False,
        is_joint=False,
        changes_layers=False,
        adds_loss=True,
        tolerance=0.0,
        callback=lambda data=None, **_: make(**options),
        off=lambda data=None: make(**{key: 0 if "weight" in key else value for key, value in options.items()}),
        always=lambda weight, data=None, **_: make(**options),
        mixin=None,
        reference=reference,
        monitored=f"transfer/{name}",
        options={key: value for key, value in options.items() if "weight" in key},
        of_weights=of_weights,
    )


def _knowledge():
    def make(weight):
        pretrained = toys.toy_net()
        pretrained.fc = toys.source_head()
        return lt.SoftFinetuning(lt.SourceKnowledge(pretrained), weight=weight)

    row = _held("knowledge_loss", make, held.Knowledge, of_weights=False, weight=0.5)
    return replace(row, options={"weight/start": 0.5, "source/temperature": 2.0})


METHODS = [
    _soft("separate", "add"),
    _soft("joint", "convex"),
    _selective("separate"),
    _selective("joint"),
    _adafilter(),
    _gated(),
    _collaborative(),
    _collaborative("collaborative-apart", "model.fc", backbone="model.conv"),
    _held("l2_sp_distance", L2SP, held.Weights, of_weights=True, weight=0.1, head_weight=0.01),
    _held("delta_loss", DELTA, held.Maps, of_weights=False, layers=["model.bn"], weight=0.01),
    _knowledge(),
]


def chosen(**flags: bool | str) -> list[MethodCase]:
    """Return the rows whose flags are these."""
    return [row for row in METHODS if all(getattr(row, name) == value for name, value in flags.items())]


def each(**flags: bool | str) -> pytest.MarkDecorator:
    """Run a test for every row, or for those whose flags are these."""
    return pytest.mark.parametrize("method", chosen(**flags), ids=str)


def one(**flags: bool | str) -> MethodCase:
    """Return the first of these rows, for what does not depend on the method."""
    return chosen(**flags)[0]
