"""How far a target lies from what a network knows: fine-tuning against a linear probe, and the domain gap (ours)."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import proxy
from lightning_transfer.glue.base import AnyCallback
from lightning_transfer.glue.trainer import to_device
from lightning_transfer.linear import fit_linear
from lightning_transfer.progress import Progress, Step
from lightning_transfer.roles import Head, find_head, has_forward
from lightning_transfer.source.gap import domain_gap
from lightning_transfer.source.stream import seeded
from lightning_transfer.source.task import SourceTask
from lightning_transfer.splitting import groups_of, held_out, labels_of
from lightning_transfer.tracing import evaluating, images_and_labels

FOLDS = 4
ENOUGH = 250  # scored images, behind which no further fold is trained
MOST = 1000  # images of the target that are scored in a fold, and of each side that the gap is told from
PROBE_PENALTY = 10.0  # of .1 to 1,000 about the best on four targets with ten images of a class
MOST_PROBED = 5000  # that the probe learns from


@dataclass(frozen=True)
class Measured:
    """What was seen of a target.

    Attributes:
        images: labelled images there are to train on.
        classes: how many classes they have.
        fewest: images of the rarest class.
        scored: how many were held out from a training, in turns, and scored.
        probe: accuracy of a linear classifier on the features of the network as it came.
        tuned: accuracy of plain fine-tuning.
        error: standard error of their difference, which is paired.
        gap: the domain gap to the source; None without one.
    """

    images: int
    classes: int
    fewest: int
    scored: int
    probe: float
    tuned: float
    error: float
    gap: float | None

    @property
    def distance(self) -> float:
        """How far the network has to move: points that fine-tuning is above the probe."""
        return 100 * (self.tuned - self.probe)


def measure(
    module: Any,
    loader: DataLoader[Any],
    *,
    source: SourceTask | None,
    unaugmented: Any,
    steps: int,
    options: Mapping[str, Any],
    progress: Progress,
) -> Measured:
    """Fine-tune copies of a module on parts of its training images, and score them on the rest.

    Raises:
        TransferConfigError: the images cannot be split, or the module has no head.
    """
    proxy.check_loader(loader)
    dataset: Any = loader.dataset
    clean = dataset if unaugmented is None else unaugmented
    if len(clean) != len(dataset):
        raise TransferConfigError(
            f"unaugmented has {len(clean)} images, the training data {len(dataset)}; give the same, in order."
        )
    with seeded(0, 0):
        labels = labels_of(dataset)
        folds = _folds(labels, groups_of(dataset))
    found: list[tuple[Tensor, Tensor]] = []
    gap = None
    with progress("Fine-tuning, to see how far it goes", steps * len(folds), unit="steps") as step:
        for number, out in enumerate(folds):
            kept = sorted({*range(len(labels))} - {*out})
            scored, probed = out[:MOST], _some(kept, MOST_PROBED)
            twin = copy.deepcopy(module)
            looking = _Looking(
                probed=proxy.part_of(loader, probed, dataset=clean),
                scored=proxy.part_of(loader, scored, dataset=clean),
                source=source if number == 0 else None,
                step=step,
            )
            with seeded(0, 1), torch.random.fork_rng(range(torch.cuda.device_count())):
                make = proxy.trainer_class(module)
                proxy.train(make, {**options, "max_steps": steps}, twin, proxy.part_of(loader, kept), [looking], -1)
            found.append((looking.probe_right, looking.tuned_right))
            gap = looking.gap if number == 0 else gap
    probe, tuned = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    counts = Counter(labels)
    return Measured(
        images=len(labels),
        classes=len(counts),
        fewest=min(counts.values()),
        scored=len(probe),
        probe=float(probe.mean()),
        tuned=float(tuned.mean()),
        error=float((tuned - probe).std() / len(probe) ** 0.5),
        gap=gap,
    )


def _folds(labels: list[int], groups: list[Any] | None) -> list[list[int]]:
    """Parts to hold out in turns, each a quarter, until enough images are scored."""
    rest = list(range(len(labels)))
    folds: list[list[int]] = []
    while len(folds) < FOLDS and sum(len(fold) for fold in folds) < ENOUGH:
        left = FOLDS - len(folds)
        if left == 1:
            return [*folds, rest]
        inner = None if groups is None else [groups[index] for index in rest]
        out = {rest[place] for place in held_out([labels[index] for index in rest], 1 / left, groups=inner)}
        folds.append(sorted(out))
        rest = [index for index in rest if index not in out]
    return folds


def _some(indices: list[int], most: int) -> list[int]:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:most]
    return [indices[place] for place in order.sort().values.tolist()]


class _Looking(AnyCallback):
    """Scores a linear probe before the first step, and the network behind the last."""

    def __init__(
        self, *, probed: DataLoader[Any], scored: DataLoader[Any], source: SourceTask | None, step: Step
    ) -> None:
        self.probed, self.scored, self.source, self.step = probed, scored, source, step
        self.gap: float | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What the network as it came knows."""
        for config in trainer.lr_scheduler_configs:
            config.strict = False  # a rate that waits for the user's validation, which is not run, stays
        look = _Look(trainer, pl_module)
        features, _, labels = look.at(self.probed)
        others, _, truth = look.at(self.scored)
        num_classes = int(max(labels.max(), truth.max())) + 1
        says = fit_linear(features, labels, num_classes=num_classes, penalty=PROBE_PENALTY)
        self.probe_right = says(others).argmax(1) == truth
        if self.source is not None:
            self.gap = domain_gap(features[_some(list(range(len(features))), MOST)], look.of_source(self.source))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Show how far it is."""
        self.step(1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What it has learned."""
        _, logits, truth = _Look(trainer, pl_module).at(self.scored)
        self.tuned_right = logits.argmax(1) == truth


class _Look:
    """Runs images through a module outside of training, and takes what its head takes and gives."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer, self.module = trainer, module
        self.head: Head = find_head(module)
        self.entry = module if has_forward(module) else module.get_submodule(self.head.network_path)

    def at(self, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits and labels."""
        parts = []
        for batch in loader:
            images, labels = images_and_labels(
                to_device(self.trainer, batch, hooks=True), self.trainer.strategy.root_device
            )
            taken, given = self._run(self.entry, images)
            parts.append((taken, given, labels.cpu()))
        features, logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return features, logits, labels

    def of_source(self, source: SourceTask) -> Tensor:
        """Features of source images."""
        dataset = source.plain_dataset
        indices = _some(list(range(source.num_images)), MOST)
        parts = []
        for batch in DataLoader(Subset(dataset, indices), batch_size=100, num_workers=source.num_workers):
            images, _ = source.unpack(to_device(self.trainer, batch, hooks=source.batch_hooks))
            own = partial(source.forward, self.module) if callable(source.forward) else None
            parts.append(self._run(own or self.entry, images, gives_features=own is not None)[0])
        return torch.cat(parts)

    def _run(
        self, run: Callable[[Tensor], Any], images: Tensor, *, gives_features: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What the head takes and gives; a run that ends in front of it gives the features."""
        with (
            evaluating(self.module),
            _heard(self.head.module) as calls,
            self.trainer.precision_plugin.forward_context(),
        ):
            output = run(images)
        torch.clear_autocast_cache()
        if not calls and not gives_features:
            raise TransferConfigError(
                f"{type(self.module).__name__} does not run its head {self.head.path!r} on images, so nothing can be "
                "told of its features."
            )
        taken, given = calls[-1] if calls else (output, output)
        return taken.float().flatten(1).cpu(), given.float().cpu()


@contextmanager
def _heard(head: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    calls: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda module, args, given: calls.append((args[0], given)))
    try:
        yield calls
    finally:
        handle.remove()
