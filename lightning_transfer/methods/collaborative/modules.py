"""Join several networks into one module, which gives the mean of their logits."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_transfer.compiling import uncompiled
from lightning_transfer.errors import TransferConfigError, check_count, nearest
from lightning_transfer.methods.collaborative.depths import Depths, find_depths
from lightning_transfer.methods.collaborative.freezing import freeze_below, unfreeze
from lightning_transfer.methods.collaborative.heads import classifier
from lightning_transfer.methods.collaborative.members import OWN, Member, adapted, make_of, rebuilt
from lightning_transfer.methods.collaborative.passes import Passes
from lightning_transfer.naming import a_class
from lightning_transfer.networks import timm_name
from lightning_transfer.roles import Head, has_forward, out_width
from lightning_transfer.surgery import Structure, find_all, replace_modules
from lightning_transfer.tracing import evaluating, shares_right

ONE_NETWORK = "Or hold both in one network, self.model = torch.nn.Sequential(backbone, torch.nn.Flatten(), head)."


class CollaborativeEnsemble(Structure):
    """Returns the mean of the logits of several networks, which ranks classes as their sum does.

    If the networks' timm configurations differ (or the `pretrained_cfg` that the user assigned), each of the others
    gets images that are normalised as in its pretraining, and resized by the ratio of the two input sizes, or to its
    own size if that is fixed; the first network takes them unchanged.

    If a head is apart from its backbone, the ensemble takes the place of the head: it takes features, the head turns
    them into logits, and the other networks take the images that entered the backbone.

    Args:
        members: networks by name, each giving (B, classes) logits; for a network whose head is apart, its head.
        apart: the module that holds the first network, and the dotted name of its backbone, if the head is apart.

    Raises:
        TransferConfigError: the mapping is empty, a head is not found, or the numbers of classes differ.

    Example:
        >>> flat = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> ensemble = CollaborativeEnsemble({"first": flat(), "second": flat()})
        >>> ensemble(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 2])
    """

    callback, remove = "CollaborativeFinetuning", "remove_collaborative"
    composes = False  # a source head, or gates, are for one network

    def __init__(self, members: Mapping[str, nn.Module], *, apart: tuple[nn.Module, str] | None = None) -> None:
        super().__init__()
        self._apart = apart  # in a tuple, so that the module is not registered as a child of the ensemble
        if not members:
            raise TransferConfigError("An ensemble needs at least one network.")
        first = next(iter(members.values()))
        self.members = nn.ModuleDict(
            {name: net if isinstance(net, Member) else adapted(net, first) for name, net in members.items()}
        )
        widths = {name: out_width(self.head_of(name).module) for name in self.names}
        if len({*widths.values()}) > 1:
            raise TransferConfigError(
                f"The networks give logits of different numbers of classes: {widths}. Renew heads."
            )
        self.passes = Passes()
        self.frozen: dict[str, int] = {}  # convolutions of each network, if not 0
        self.accuracies: dict[str, float] = {}  # of each network, in the last validation
        self._stopped: list[nn.Parameter] = []
        self._handles: list[RemovableHandle] = []  # of the hooks that let images in
        self._makes = {name: make_of(member.network) for name, member in self._networks.items()}
        self.training = self.members.training = first.training  # modules inside the networks keep their own mode

    @property
    def _networks(self) -> dict[str, Member]:
        return cast(dict[str, Member], self.members)

    @property
    def names(self) -> list[str]:
        """Return the names of the networks, in order."""
        return list(self.members)

    def heads_of_members(self) -> list[Head]:
        """Return the head of each network, in order, for `roles.find_heads`."""
        heads = ((name, self.head_of(name)) for name in self.names)
        return [Head(f"members.{name}.network.{head.path}".rstrip("."), head.module) for name, head in heads]

    @property
    def is_apart(self) -> bool:
        """Return whether the user's head is apart from its backbone, so that hooks let images in."""
        return self._apart is not None

    def head_of(self, name: str) -> Head:
        """Return the classifier of a network."""
        network = self._networks[name].network
        return Head("", network) if self.is_apart and name == OWN else classifier(network, name)

    def layers_of(self, name: str) -> nn.Module:
        """Return the network that takes the images; if its head is apart, the backbone."""
        if self._apart is not None and name == OWN:
            network = self._apart[0].get_submodule(self._apart[1])
        else:
            network = self._networks[name].network
        return uncompiled(network)  # type: ignore[no-any-return]

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what the user's code lists here: the parameters of the head, if it is apart."""
        listed: Any = super() if self._apart is None else self._networks[OWN].network
        yield from listed.named_parameters(*args, **options)

    def forward(self, images: Tensor | None = None, *others: Any, **named: Any) -> Tensor:
        """Return (B, classes) mean logits of (B, C, H, W) images, or of the features that a head apart takes."""
        if images is None or others or named:
            raise TransferConfigError(
                f"The network is called with {', '.join(named) or f'{len(others) + 1} arguments'}; of several, each "
                "takes the images alone. Put yours into a module whose forward(self, images) returns its logits, and "
                "call that: self.model(images)."
            )
        logits = self.each(images)
        if self.passes.is_followed:
            self.passes.note(logits)
        return logits.mean(0)

    def each(self, images: Tensor) -> Tensor:
        """Return (N, B, classes) logits of every network."""
        shown = images if self._apart is None or len(self.members) == 1 else self._entered(images)
        logits = {name: member(images if name == OWN else shown) for name, member in self.members.items()}
        for name, given in logits.items():
            if not isinstance(given, Tensor):
                raise TransferConfigError(
                    f"{name} gives {a_class(given)}; expected (B, classes) logits, in training too. Build it "
                    "without auxiliary classifiers: aux_logits=False."
                )
            if shown is not images and given.ndim != 2:
                raise TransferConfigError(
                    f"{name} gives {tuple(given.shape)}; expected (B, classes) logits. {ONE_NETWORK}"
                )
        return torch.stack(list(logits.values()))

    def _entered(self, features: Tensor) -> Tensor:
        """Return the images that these features were computed from."""
        images, number = self.passes.leave()
        # `len` would fix the batch size of an exported network
        if number != 1 or not isinstance(images, Tensor) or images.shape[:1] != features.shape[:1]:
            assert self._apart is not None  # its callers check
            last = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TransferConfigError(
                f"The other networks take the images that enter {self._apart[1]!r}. It ran {number} times before its "
                f"head took {len(features)} features{f', last on {last}' if number else ''}. Run both once on every "
                f"batch of images, and do not checkpoint the head alone. {ONE_NETWORK}"
            )
        return images

    def depths(self, example: Any = None) -> dict[str, Depths]:
        """Return how deep each network can be frozen."""
        return {name: find_depths(self.layers_of(name), example, head=self.head_of(name).path) for name in self.names}

    def freeze(self, frozen: Mapping[str, int], example: Any = None) -> None:
        """Freeze the first convolutions of networks and all that runs before the next one; unfreeze all others.

        Weights below the cut get no gradients, norms there keep their statistics, and no graph is built for them.

        Args:
            frozen: how many, by the name of a network; 0 for networks that are not named.
            example: a batch to find layers with, instead of a picture of noise.

        Raises:
            TransferConfigError: no network has this name, or it has fewer convolutions.
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
            self._stopped += freeze_below(self.layers_of(name), depths[name].below(number))
        for param in self._stopped:
            param.requires_grad = False
        self.frozen = {name: number for name, number in frozen.items() if number}

    def thaw(self) -> None:
        """Unfreeze what `freeze` has frozen."""
        for name in self.names:
            unfreeze(self.layers_of(name), self._stopped)
        self._stopped, self.frozen = [], {}

    def member(self, name: str) -> nn.Module:
        """Return a copy of one network with nothing of it frozen; it takes the same images as the ensemble.

        Of a network whose head is apart, return a copy of the whole module.

        Raises:
            TransferConfigError: no network has this name.
        """
        self._check_name(name)
        if self._apart is not None and name == OWN:
            root = copy.deepcopy(self._apart[0])
            for path, twin in find_all(root, CollaborativeEnsemble).items():
                replace_modules(root, {path: twin.alone(OWN)})
            return root
        inside = {id(param) for param in self.members[name].parameters()}
        stopped = [param for param in self._stopped if id(param) in inside]
        member, stopped = copy.deepcopy((self._networks[name], stopped))
        unfreeze(member, stopped)
        return member.network if member.is_plain else member

    def alone(self, name: str) -> nn.Module:
        """Take one network out, with nothing of it frozen; do not use the ensemble afterwards."""
        self._check_name(name)
        if self._apart is not None and name != OWN:
            raise TransferConfigError(
                f"{name!r} is one network, and your module holds a backbone and its head apart. Keep your own, or take "
                f"ensemble.member({name!r})."
            )
        self.thaw()
        for handle in self._handles:
            handle.remove()
        member = self._networks[name]
        return member.network if member.is_plain else member

    def best_member(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """Return a copy of the most accurate network, with nothing of it frozen.

        Args:
            loader: batches (images, labels) to measure by; by default the run's last validation counts.

        Raises:
            TransferConfigError: there was no validation, and no loader is given.
        """
        if loader is not None:
            self.accuracies = self.measure(loader)
        return self.member(self.best)

    @property
    def best(self) -> str:
        """Return the name of the most accurate network in the last validation."""
        if not self.accuracies:
            raise TransferConfigError(
                "No validation has measured the networks. Measure them: ensemble.best_member(loader), with batches "
                "(images, labels)."
            )
        return max(self.accuracies, key=self.accuracies.__getitem__)

    def _check_name(self, name: str) -> None:
        if name not in self.members:
            raise TransferConfigError(f"No network is called {name!r}. {nearest(name, self.members)}")

    def measure(self, loader: Iterable[Any]) -> dict[str, float]:
        """Return the accuracy of each network alone.

        Args:
            loader: batches (images, labels).
        """
        device = next(self.parameters()).device
        with evaluating(self if self._apart is None else self._apart[0]):
            return dict(zip(self.names, shares_right(self.ask, loader, device), strict=True))

    def ask(self, images: Tensor, root: nn.Module | None = None) -> Tensor:
        """Return every network's logits of images, outside a training step.

        Args:
            images: (B, C, H, W).
            root: the module that holds the ensemble; its forward runs if it has one.
        """
        self.check_forward()
        root = root if self._apart is None else self._apart[0]
        if root is None or not has_forward(root):
            return self.each(images)
        with self.passes.followed() as passes:
            root(images)
            assert passes.logits is not None  # the networks have run
            return passes.logits

    def check_forward(self) -> None:
        """Raise if the head is apart, and the module that holds it has no forward that runs backbone and head."""
        if self._apart is not None and not has_forward(self._apart[0]):
            raise TransferConfigError(
                f"{type(self._apart[0]).__name__} has no forward to run images through its backbone and its head. Add "
                "it: def forward(self, images)."
            )

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the first network, for code that asks for its head or its features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            members = self.__dict__.get("_modules", {}).get("members")
            if not members:
                raise
            return getattr(next(iter(members.values())).network, name)

    def spec(self) -> dict[str, Any]:
        """Return the names and makes of the networks, and how many layers are frozen."""
        members = [
            {"name": name, "make": self._makes[name], "timm": timm_name(member.network), **member.describe()}
            for name, member in self._networks.items()
        ]
        entry = {} if self._apart is None else {"entry": self._apart[1]}
        return {"members": members, "frozen": self.frozen, **entry}

    def put(self, root: nn.Module, path: str) -> None:
        """Take the place of the user's network or of its head, and let images in."""
        replace_modules(root, {path: self})
        if self._apart is not None and len(self.members) > 1:
            entry, passes = root.get_submodule(self._apart[1]), self.passes
            self._handles = [
                entry.register_forward_pre_hook(passes.enter, with_kwargs=True),
                root.register_forward_pre_hook(passes.start),
            ]

    @classmethod
    def rebuild(cls, root: nn.Module, path: str, spec: dict[str, Any]) -> None:
        """Put other networks beside a plain one as a spec records; the weights are loaded later.

        Raises:
            TransferConfigError: one of the others cannot be rebuilt from a checkpoint.
        """
        own = root.get_submodule(path)
        if not isinstance(own, CollaborativeEnsemble):
            members: dict[str, nn.Module] = {}
            apart = (root, spec["entry"]) if "entry" in spec else None
            body, head = (own, None) if apart is None else (root.get_submodule(spec["entry"]), Head(path, own))
            for entry in spec["members"]:
                network = rebuilt(body, entry, spec, head=head) if members else own
                members[entry["name"]] = Member(
                    network, **{key: entry[key] for key in ("scale", "shift", "zoom", "size")}
                )
            own = cls(members, apart=apart)
            own.put(root, path)
        if own.frozen != spec["frozen"]:
            own.freeze(spec["frozen"], getattr(root, "example_input_array", None))
