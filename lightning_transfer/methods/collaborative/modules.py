"""Several networks as one: mean logits out, some of their layers frozen, and each to be had alone again."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_transfer.batches import is_right, kind_of
from lightning_transfer.errors import TransferConfigError, check_count, nearest
from lightning_transfer.methods.collaborative.depths import Depths, find_depths
from lightning_transfer.methods.collaborative.members import (
    Member,
    adapted,
    architecture,
    classifier,
    make_of,
    rebuilt,
)
from lightning_transfer.roles import Head, out_width
from lightning_transfer.surgery import Structure, replace_modules
from lightning_transfer.tracing import evaluating, images_and_labels


class Passes:
    """What each network said in the last pass that somebody follows; a copy, deep or pickled, begins empty."""

    def __init__(self) -> None:
        self.end()

    @contextmanager
    def followed(self) -> Iterator["Passes"]:
        """While it lasts, passes are written down."""
        try:
            self.begin()
            yield self
        finally:
            self.end()

    def begin(self, is_ours: Callable[[], bool] = lambda: True) -> None:
        """Write passes down from here on: the last one, and how many there are.

        Args:
            is_ours: whether a pass is one of those to follow; all by default.
        """
        self._is_ours = is_ours
        self.logits: Tensor | None = None
        self.number = 0
        self.is_followed = True

    def note(self, logits: Tensor) -> None:
        """One more pass."""
        if self._is_ours():
            self.logits = logits
            self.number += 1

    def end(self) -> None:
        """Let go of what was written down."""
        self.begin()
        self.is_followed = False

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return (Passes, ())


class RestingNorm(nn.Module):
    """Somebody's norm that neither training nor `train()` moves: it normalises by its running statistics.

    Its weights, statistics and modules are the norm's own, under the same names. It is no `_BatchNorm` and the norm is
    none of its modules, so whatever looks for those, to synchronize or to thaw them, finds nothing.

    Args:
        norm: what is to rest.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self.training = norm.training
        norm.training = False
        object.__setattr__(self, "norm", norm)

    def woken(self) -> nn.Module:
        """The norm, in the mode that it would be in."""
        norm: Any = self.norm
        norm.training = self.training
        return norm  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Normalised, as outside of training."""
        normalised: Tensor = self.norm(features)  # type: ignore[operator]
        return normalised


class CollaborativeEnsemble(Structure):
    """Networks side by side: the mean of their logits, which ranks classes as their sum does.

    Where timm's configurations of two networks differ, or what the user has put under `pretrained_cfg`, a network gets
    pictures that are normalised and sized as it knows them; the first takes them as they come.

    Args:
        members: networks by name, each giving (B, classes) logits.

    Raises:
        TransferConfigError: there is none, or one has no head or other classes.

    Example:
        >>> flat = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> ensemble = CollaborativeEnsemble({"first": flat(), "second": flat()})
        >>> ensemble(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 2])
    """

    callback = "CollaborativeFinetuning"
    composes = False  # a source head, or gates, are for one network

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not members:
            raise TransferConfigError("An ensemble of no networks; give it one at least.")
        first = next(iter(members.values()))
        self.members = nn.ModuleDict(
            {name: net if isinstance(net, Member) else adapted(net, first) for name, net in members.items()}
        )
        widths = {name: out_width(classifier(member.network, name).module) for name, member in self._named()}
        if len({*widths.values()}) > 1:
            raise TransferConfigError(f"The networks tell apart other numbers of classes: {widths}. Renew their heads.")
        self.passes = Passes()
        self.frozen: dict[str, int] = {}  # convolutions of each network, where any is
        self.accuracies: dict[str, float] = {}  # of each network, in the last validation
        self._stopped: list[nn.Parameter] = []
        self._makes = {name: make_of(member.network) for name, member in self._named()}
        self.training = self.members.training = first.training  # what is in the networks stays in its own mode

    def _named(self) -> Iterator[tuple[str, Member]]:
        return iter(cast(dict[str, Member], dict(self.members.items())).items())

    @property
    def names(self) -> list[str]:
        """Of the networks, in order."""
        return list(self.members)

    def heads_of_members(self) -> list[Head]:
        """Return the head of each network, in order, where `roles.find_heads` asks."""
        heads = ((name, classifier(member.network, name)) for name, member in self._named())
        return [Head(f"members.{name}.network.{head.path}", head.module) for name, head in heads]

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes) mean logits of (B, C, H, W) images."""
        logits = self.each(images)
        if self.passes.is_followed:
            self.passes.note(logits)
        return logits.mean(0)

    def each(self, images: Tensor) -> Tensor:
        """(N, B, classes) logits of every network."""
        logits = {name: member(images) for name, member in self.members.items()}
        for name, given in logits.items():
            if not isinstance(given, Tensor):
                raise TransferConfigError(
                    f"{name} gives a {type(given).__name__}; expected (B, classes) logits, in training too. Build it "
                    "without auxiliary classifiers: aux_logits=False."
                )
        return torch.stack(list(logits.values()))

    def depths(self, example: Any = None) -> dict[str, Depths]:
        """How deep each network can be frozen."""
        found = {}
        for name, member in self._named():
            network = getattr(member.network, "_orig_mod", member.network)
            found[name] = find_depths(network, example, head=classifier(network, name).path)
        return found

    def freeze(self, frozen: Mapping[str, int], example: Any = None) -> None:
        """Freeze the first convolutions of networks, and all that runs before the next one; in place of what was.

        Weights below the cut get no gradients, norms there keep their statistics, and no graph is built for them.

        Args:
            frozen: how many, by a network's name; 0 for those that are not named.
            example: a batch to find layers by, in place of a blank picture.

        Raises:
            TransferConfigError: there is no such network, or it has fewer convolutions.
        """
        depths = self.depths(example) if frozen else {}  # which runs every network
        for name, number in frozen.items():
            if name not in depths:
                raise TransferConfigError(f"frozen_layers: no network is called {name!r}. {nearest(name, depths)}")
            check_count(f"frozen_layers[{name!r}]", number, least=0)
            if number > depths[name].most:
                raise TransferConfigError(
                    f"frozen_layers[{name!r}]={number}; of its {len(depths[name].convs)} convolutions at most "
                    f"{depths[name].most} can be frozen."
                )
        self.thaw()
        for name, number in frozen.items():
            network = self._network(name)
            below = depths[name].below(number)
            above = {
                id(param) for path, layer in network.named_modules() if path not in below for param in _weights(layer)
            }
            params = [param for path in below for param in _weights(network.get_submodule(path))]
            self._stopped += [param for param in params if param.requires_grad and id(param) not in above]
            norms = {path: network.get_submodule(path) for path in below}
            norms = {path: norm for path, norm in norms.items() if isinstance(norm, _NormBase)}
            replace_modules(network, {path: RestingNorm(norm) for path, norm in norms.items()})
        for param in self._stopped:
            param.requires_grad = False
        self.frozen = {name: number for name, number in frozen.items() if number}

    def thaw(self) -> None:
        """Let everything learn that did before it was frozen."""
        _wake(self, self._stopped)
        self._stopped, self.frozen = [], {}

    def _network(self, name: str) -> nn.Module:
        network = self.members[name].network
        return cast(nn.Module, getattr(network, "_orig_mod", network))

    def member(self, name: str) -> nn.Module:
        """A copy of one network alone, nothing of it frozen; it takes the same pictures as the ensemble.

        Raises:
            TransferConfigError: there is none of that name.
        """
        self._check_name(name)
        inside = {id(param) for param in self.members[name].parameters()}
        stopped = [param for param in self._stopped if id(param) in inside]
        member, stopped = copy.deepcopy((cast(Member, self.members[name]), stopped))
        _wake(member, stopped)
        return member.network if member.is_plain else member

    def alone(self, name: str) -> nn.Module:
        """One network itself, out of the ensemble and with nothing of it frozen: what is left is not to be used."""
        self._check_name(name)
        self.thaw()
        member = cast(Member, self.members[name])
        return member.network if member.is_plain else member

    def best_member(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """The network that is right most often alone; a copy, nothing of it frozen.

        Args:
            loader: batches (images, labels) to measure by; the run's last validation by default.

        Raises:
            TransferConfigError: there was no validation, and no loader is given.
        """
        if loader is not None:
            self.accuracies = self.measure(loader)
        return self.member(self.best)

    @property
    def best(self) -> str:
        """The name of the network that was right most often in the last validation."""
        if not self.accuracies:
            raise TransferConfigError(
                "No validation has told the networks apart. Measure them: ensemble.best_member(loader), with batches "
                "(images, labels)."
            )
        return max(self.accuracies, key=self.accuracies.__getitem__)

    def _check_name(self, name: str) -> None:
        if name not in self.members:
            raise TransferConfigError(f"No network is called {name!r}. {nearest(name, self.members)}")

    def measure(self, loader: Iterable[Any]) -> dict[str, float]:
        """The accuracy of each network alone.

        Args:
            loader: batches (images, labels).
        """
        device = next(self.parameters()).device
        right, total, kind = torch.zeros(len(self.members)), 0, None
        with evaluating(self):
            for batch in loader:
                images, labels = images_and_labels(batch, device)
                logits = self.each(images)
                kind = kind or kind_of(labels, logits.shape[-1])
                right += is_right(logits, labels, kind).sum(1).cpu()
                total += len(labels)
        if not total:
            raise TransferConfigError("The loader gave no images.")
        return dict(zip(self.names, (right / total).tolist(), strict=True))

    def __getattr__(self, name: str) -> Any:
        """The first network's own, where somebody asks for its head or its features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            members = self.__dict__.get("_modules", {}).get("members")
            if not members:
                raise
            return getattr(next(iter(members.values())).network, name)

    def spec(self) -> dict[str, Any]:
        """Which networks, what they are made of, and how many layers are frozen."""
        members = [
            {"name": name, "make": self._makes[name], "timm": architecture(member.network), **member.describe()}
            for name, member in self._named()
        ]
        return {"members": members, "frozen": self.frozen}

    @classmethod
    def rebuild(cls, root: nn.Module, path: str, spec: dict[str, Any]) -> None:
        """Put a plain network among others as a spec says; the weights come with the state that the spec was read from.

        Raises:
            TransferConfigError: one of the others is of a make that a checkpoint cannot hold.
        """
        own = root.get_submodule(path)
        if not isinstance(own, CollaborativeEnsemble):
            members: dict[str, nn.Module] = {}
            for entry in spec["members"]:
                network = rebuilt(own, entry, spec) if members else own
                members[entry["name"]] = Member(
                    network, **{key: entry[key] for key in ("scale", "shift", "zoom", "size")}
                )
            own = cls(members)
            replace_modules(root, {path: own})
        if own.frozen != spec["frozen"]:
            own.freeze(spec["frozen"], getattr(root, "example_input_array", None))


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters(recurse=False))


def _wake(root: nn.Module, stopped: list[nn.Parameter]) -> None:
    """Norms in the place of those that rest, and gradients for the parameters that were stopped."""
    for param in stopped:
        param.requires_grad = True
    resting = {path: layer for path, layer in root.named_modules() if isinstance(layer, RestingNorm)}
    replace_modules(root, {path: layer.woken() for path, layer in resting.items()})
