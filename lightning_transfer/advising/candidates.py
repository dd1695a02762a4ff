"""List what is compared with plain fine-tuning: the methods of this package, or the user's own candidates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.adafilter.callback import AdaFilter
from lightning_transfer.methods.gated.callback import GatedTransfer
from lightning_transfer.methods.probe.callback import ProbeStart
from lightning_transfer.methods.selective.callback import SelectiveJointFinetuning
from lightning_transfer.methods.soft.callback import SoftFinetuning
from lightning_transfer.methods.soft.knowledge import SourceKnowledge
from lightning_transfer.methods.statistics.callback import FrozenStatistics
from lightning_transfer.naming import a_class
from lightning_transfer.source.task import SourceTask

PLAIN, PROBE = "fine-tuning", "linear probe"
STATISTICS = FrozenStatistics.__name__  # gained most in the benchmarks with an ImageNet network
COST = 2.0  # of a candidate that has not been trained yet, in trainings of fine-tuning


@dataclass(frozen=True)
class Candidate:
    """Makes the callbacks of one candidate.

    Attributes:
        name: in the table.
        line: what to write to use it; empty for the user's own.
        make: makes its callbacks.
        cost: what it may cost, in trainings of fine-tuning, before this is known.
        clean: by which argument `make` takes the images that are trained on, without augmentation; empty for none.
        may_repair: whether it may do well where fine-tuning falls far short of the probe.
    """

    name: str
    line: str
    make: Callable[..., Sequence[Any]]
    cost: float = COST
    clean: str = ""
    may_repair: bool = False
    _made: WeakSet[Any] = field(default_factory=WeakSet, init=False, repr=False)

    def callbacks(self, images: AnyDataset | None = None) -> list[Any]:
        """Make its callbacks, new ones each time.

        Args:
            images: that are trained on, without augmentation.

        Raises:
            TransferConfigError: they are not callbacks, or the same as before.
        """
        made = self.make(**({self.clean: images} if self.clean else {}))
        if not isinstance(made, list | tuple) or not all(hasattr(each, "on_train_start") for each in made):
            raise TransferConfigError(
                f"candidates[{self.name!r}] makes {a_class(made)}; expected a list of callbacks: "
                "lambda: [lt.GatedTransfer(ratio=8)]."
            )
        if any(each in self._made for each in made):
            raise TransferConfigError(
                f"candidates[{self.name!r}] makes the same callback twice, which would bring one training's state into "
                "the next. Make it inside: lambda: [lt.GatedTransfer(ratio=8)]."
            )
        self._made.update(made)
        return [*made]


def usual(
    source: SourceTask | SourceKnowledge | None,
    *,
    head: str,
    forward: Callable[..., Any] | None,
    adapt: Callable[..., Any] | None,
    unaugmented: AnyDataset | None,
    has_statistics: bool,
) -> list[Candidate]:
    """Return a linear probe, and this package's methods with default options and the user's head, forward and adapt.

    Args:
        source: what the network was pretrained on; None without it.
        head: dotted path of the classifier, or "auto".
        forward: runs images through the module.
        adapt: turns a batch into images and labels.
        unaugmented: the training images without augmentation.
        has_statistics: whether BatchNorm of the network has pretrained statistics, which a probe needs in training.
    """
    at: dict[str, Any] = {} if head == "auto" else {"head": head}
    read = {name: value for name, value in (("forward", forward), ("adapt", adapt)) if value is not None}
    is_sources = forward is not None and forward is getattr(source, "forward", None)
    names = {"forward": "source.forward"} if is_sources else {}

    def made(
        method: type, *given: Any, cost: float, clean: str = "", may_repair: bool = False, **options: Any
    ) -> Candidate:
        if unaugmented is None:
            clean = ""
        shown = ["source"] * len(given) + [f"{clean}=unaugmented"] * bool(clean)
        shown += [f"{key}={repr(value) if key == 'head' else names.get(key, key)}" for key, value in options.items()]
        name = method.__name__
        line = f"callbacks=[lt.{name}({', '.join(shown)})]"
        return Candidate(name, line, lambda **images: [method(*given, **options, **images)], cost, clean, may_repair)

    start = made(ProbeStart, cost=1.1, clean="unaugmented", may_repair=True, **at, **read)
    statistics = ", lt.FrozenStatistics()" if has_statistics else ""
    frozen = f"{start.line[:-1]}{statistics}], with requires_grad_(False) for all of the network but its head"
    found = [
        Candidate(PROBE, frozen, list, cost=0.0),
        made(FrozenStatistics, cost=1.1, may_repair=True),
        start,
        made(GatedTransfer, cost=1.1, **at),
        made(AdaFilter, cost=2.2),
    ]
    if source is not None:
        found.append(made(SoftFinetuning, source, cost=1.5, **at))
    if isinstance(source, SourceTask):
        found.append(made(SelectiveJointFinetuning, source, cost=2.5, clean="target", **at))
    return found


def own(candidates: Mapping[str, Callable[[], Sequence[Any]]]) -> list[Candidate]:
    """Return the user's candidates.

    Raises:
        TransferConfigError: it is not a mapping of names to functions.
    """
    if not isinstance(candidates, Mapping):
        raise TransferConfigError(
            f"candidates is {a_class(candidates)}; expected a mapping of names to functions that make "
            "a list of callbacks: candidates={'gated': lambda: [lt.GatedTransfer()]}."
        )
    for name, make in candidates.items():
        if not isinstance(name, str) or name in (PLAIN, PROBE):
            raise TransferConfigError(
                f"candidates has the name {name!r}; give each another one: {PLAIN!r} and {PROBE!r} are always there."
            )
        if not callable(make):
            raise TransferConfigError(
                f"candidates[{name!r}] is {a_class(make)}; expected a function that makes a list of callbacks, "
                f"new ones for each training: lambda: [...]."
            )
    # what they cost is not known: one that takes longer than there is time is stopped after a few steps
    return [Candidate(name, "", make, cost=1.0, may_repair=True) for name, make in candidates.items()]
