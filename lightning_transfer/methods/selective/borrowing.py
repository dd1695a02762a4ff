"""Select the source images of a run at its first step, and give hard target images more of them in later rounds."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from lightning_transfer import ranks
from lightning_transfer.datasets import AnyDataset, listed_labels
from lightning_transfer.errors import NoEffectWarning, TransferConfigError, check_count
from lightning_transfer.glue.loaders import source_workers, target_dataset, target_workers
from lightning_transfer.glue.logs import progress_of, say
from lightning_transfer.glue.trainer import Weakly, is_dry_run, known_steps
from lightning_transfer.methods.selective.asking import ask, check_labels
from lightning_transfer.methods.selective.functional import neighbor_budget
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.order import NeighborOrder
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.select import Job
from lightning_transfer.methods.selective.selection import Selection
from lightning_transfer.options import is_list, made
from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.reading import apart
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView

NEARLY = 0.9  # share of the source that counts as nearly all
SURE = 1e-6  # nats: an answer with less entropy is never called hard, at any quantile


@dataclass(frozen=True)
class Borrowing:
    """Holds the options of what a source task borrows; an argument of the mixin's `add_source_task`.

    Args:
        neighbors: how many, by which statistics; a number is short for `Neighbors(k=number)`.
        target: the target's training images without augmentation, as validation sees them, giving (image, label); by
            default the train loader's dataset, whose transform then must not be random.
        protect: datasets, such as the target's test set, whose near duplicates are left out of the source.
        cache: file that keeps the selection, for the next run with the same data and options.

    Raises:
        TransferConfigError: an option is out of range.

    Example:
        >>> Borrowing(neighbors=300).neighbors.k
        300
    """

    neighbors: Neighbors | int = field(default_factory=Neighbors)
    target: AnyDataset | None = None
    protect: Sequence[AnyDataset] = ()
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        given = made(Neighbors, self.neighbors, argument="neighbors")
        if isinstance(given, int):
            check_count("neighbors", given, least=1)
        object.__setattr__(self, "neighbors", Neighbors(k=given) if isinstance(given, int) else given)
        if not isinstance(self.neighbors, Neighbors):
            raise TransferConfigError(f"neighbors={self.neighbors!r}; write a number, or Neighbors(k=300).")
        if isinstance(self.protect, Dataset) or not is_list(self.protect):
            raise TransferConfigError("protect takes a list of datasets; write protect=[test_dataset].")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Borrowing":
        return self  # never changes, and a copy of the user's module must not copy images

    def open(self, source: SourceTask) -> "Borrowed":
        """Return the chooser of one run."""
        return Borrowed(self, source)


class Borrowed:
    """Holds one run's lists of neighbors, and decides in which order they are drawn.

    Args:
        options: what is borrowed.
        source: the task to borrow from.
    """

    def __init__(self, options: Borrowing, source: SourceTask) -> None:
        assert isinstance(options.neighbors, Neighbors)  # a number has become one
        self.options = options
        self.neighbors: Neighbors = options.neighbors
        self.source = source
        if self.neighbors.k > source.num_images:
            raise TransferConfigError(
                f"neighbors={self.neighbors.k}{', the default,' if self.neighbors.k == Neighbors.k else ''} exceeds "
                f"the {source.num_images:,} source images; pass neighbors<={source.num_images}, or much fewer to "
                "borrow only a part: each target image borrows as many."
            )
        self.selection: Selection | None = None
        self._loader = Weakly()  # whose images are the target, if none were given
        self.reset()

    @property
    def target(self) -> AnyDataset | None:
        """Return the target's training images if they were given, otherwise None."""
        return self.options.target

    def reset(self) -> None:
        """Begin a new run; a selection of the same data is kept."""
        self._made_of = ""
        self._is_unchecked = False  # whether the images may differ from those that the lists were made of
        self.rounds_done = 0
        self.lists = torch.empty(0, 0, dtype=torch.int32)
        self.labels = torch.empty(0, dtype=torch.int32)
        self.budget = torch.empty(0, dtype=torch.int64)
        self._order: NeighborOrder | None = None

    def check(self, trainer: Any) -> None:
        """Raise or warn, at the start of training, if something cannot be right."""
        target_dataset(self.options.target, trainer)
        if not self.neighbors.rounds:
            return
        every, num_steps = self._steps_between(trainer), known_steps(trainer)
        if num_steps is not None and every >= num_steps and not is_dry_run(trainer):
            warnings.warn(
                f"Neighbors(every={self.neighbors.every}): the first round would come after the end of training, at "
                f"{num_steps:.0f} steps. Pass every<{num_steps:.0f}, or rounds=0.",
                NoEffectWarning,
                stacklevel=2,
            )

    def _steps_between(self, trainer: Any) -> float:
        if self.neighbors.every is not None:
            return self.neighbors.every
        num_steps = known_steps(trainer)
        if num_steps is None:
            raise TransferConfigError(
                "The number of training steps is not known, so rounds cannot be spread over training. Pass "
                "Neighbors(every=<steps between rounds>), or Neighbors(rounds=0)."
            )
        return num_steps / (self.neighbors.rounds + 1)

    def order(self, view: NetworkView, source: Extent | None) -> "NeighborOrder":
        """Return the order to draw in at this step; another object if a round has changed it."""
        trainer = view.trainer
        if self.options.target is None and not self._loader.is_of(trainer.train_dataloader):
            self._see_target(trainer)
        if not len(self.lists):
            self._select(trainer)
        if self._is_unchecked:
            self._check_same_data(trainer)
        rounds = self.neighbors.rounds
        if self.rounds_done < rounds and trainer.global_step >= (self.rounds_done + 1) * self._steps_between(trainer):
            self._round(view, source)
        if self._order is None:
            self._order = self._make_order(trainer)
            counts, drawn = self._order.counts.float(), len(self._order.pool.unique())
            nearly = drawn > NEARLY * self.source.num_images
            much = ", nearly all of it: pass fewer neighbors= to leave something out" if nearly else ""
            least, most = int(counts.min()), int(counts.max())
            spread = f" on average, {least} to {most}" if least < most else ""
            say(
                trainer,
                f"A target image borrows {counts.mean():.0f} source images{spread}; together they borrow {drawn:,} of "
                f"{self.source.num_images:,}{much}.",
            )
        return self._order

    def _see_target(self, trainer: Any) -> None:
        """Plan a check of the lists if a second fit, or a reloaded loader, may have other images than before."""
        data = target_dataset(None, trainer)
        is_known = self.selection is not None and _is_same(self.selection.target, data)
        self._is_unchecked |= len(self.lists) > 0 and not is_known
        self._loader = Weakly(trainer.train_dataloader)

    def _select(self, trainer: Any) -> None:
        data = target_dataset(self.options.target, trainer)
        if self.neighbors.rounds:
            check_labels(data, self.source, trainer)
        if self.selection is None or not _is_same(self.selection.target, data):
            self.selection = self._selected(trainer, data)
        self.lists = self.selection.indices.int()
        if self.neighbors.min_per_class:
            self.labels = self.selection.source_labels.int()
        self.budget = torch.full((len(self.lists),), min(self.neighbors.k, self.lists.shape[1]))
        self._made_of = self._identity(trainer)

    def _identity(self, trainer: Any) -> str:
        target = self._pictures(target_dataset(self.options.target, trainer), "target", trainer)
        source = self._pictures(self.source.plain_dataset, "source", trainer)
        return f"target {target.identity}, source {source.identity}"

    def _check_same_data(self, trainer: Any) -> None:
        """Raise if the images differ from those that the lists were made of."""
        found = self._identity(trainer)
        if found != self._made_of:
            raise TransferConfigError(
                f"This run's neighbors were selected with {self._made_of}; now the images are {found}. Pass the same "
                "images in the same order, or begin a new run: another Trainer, without ckpt_path."
            )
        self._is_unchecked = False

    def _pictures(self, dataset: Dataset[Any], name: str, trainer: Any) -> Pictures:
        workers = (target_workers if name == "target" else source_workers)(self.source.num_workers, trainer)
        return Pictures(dataset, name, adapt=self.source.adapt, **workers)

    def _selected(self, trainer: Any, target: Dataset[Any]) -> Selection:
        unaugmented = self._pictures(self.source.plain_dataset, "source", trainer)
        if len(unaugmented) != self.source.num_images:
            raise TransferConfigError(
                f"unaugmented has {len(unaugmented):,} images, the source dataset {self.source.num_images:,}; expected "
                "the same images in the same order."
            )
        self._check_same_labels(unaugmented.num_workers)
        scan = Scan(
            cache=self.options.cache,
            device=trainer.strategy.root_device,
            progress=progress_of(trainer),
            say=lambda line: say(trainer, line),
        )
        protected = [self._pictures(data, "protected", trainer) for data in self.options.protect]
        return Job(self._pictures(target, "target", trainer), unaugmented, protected, self.neighbors, scan).run()

    def _check_same_labels(self, num_workers: int) -> None:
        """Raise if `unaugmented` is not in the dataset's order, as far as both list the labels of their samples."""
        if self.source.unaugmented is None:
            return
        adapt = self.source.adapt
        read = adapt and (lambda sample: adapt(default_collate([sample])))
        both = (self.source.dataset, self.source.plain_dataset)
        mine, theirs = apart(lambda: [listed_labels(data, read) for data in both], num_workers)
        if mine is not None and theirs is not None and not torch.equal(mine, theirs):
            raise TransferConfigError(
                f"The labels of unaugmented= are not those of the source dataset: {theirs[:5].tolist()} and so on in "
                f"place of {mine[:5].tolist()}. Pass the same images in the same order."
            )

    def _round(self, view: NetworkView, source: Extent | None) -> None:
        """Find with the network which target images are hard, and let those borrow more."""
        data = target_dataset(self.options.target, view.trainer)
        mine = range(ranks.rank(), len(data), ranks.world_size())  # type: ignore[arg-type]
        answers = torch.empty(len(self.lists), 2, dtype=torch.float32)
        for number, share in enumerate(ranks.gather(ranks.together(lambda: ask(view, data, mine, source)))):
            answers[number :: ranks.world_size()] = share
        is_correct, entropy = answers[:, 0] == 1, answers[:, 1]
        quantile = self.neighbors.quantile
        if quantile is None:
            hard_entropy = float(self.neighbors.hard_entropy)
        else:
            sure = entropy[is_correct]
            hard_entropy = max(float(sure.quantile(quantile)) if len(sure) else 0.0, SURE)
        self.budget = neighbor_budget(
            self.budget,
            is_correct=is_correct,
            entropy=entropy,
            k=self.neighbors.k,
            limit=self.lists.shape[1],
            hard_entropy=hard_entropy,
        )
        self.rounds_done += 1
        self._order = None
        unsure = is_correct & (entropy >= hard_entropy)
        say(
            view.trainer,
            f"Round {self.rounds_done} of {self.neighbors.rounds}: of {len(self.budget):,} target images "
            f"{int((~is_correct).sum()):,} "
            f"are wrong, {int(unsure.sum()):,} right but unsure (entropy from {hard_entropy:.3f} on).",
        )

    def _make_order(self, trainer: Any) -> "NeighborOrder":
        lists = self.lists.long()
        is_borrowed = torch.arange(lists.shape[1]) < self.budget[:, None]
        if self.neighbors.min_per_class:
            borrowed = lists[is_borrowed].unique()
            is_known = self.labels[borrowed] >= 0
            counts = self.labels[borrowed[is_known]].bincount()
            if not is_known.any():
                warnings.warn(
                    "Source classes are not known, so min_per_class has no effect.", NoEffectWarning, stacklevel=2
                )
            is_large = counts >= self.neighbors.min_per_class
            say(trainer, f"min_per_class leaves {int(is_large.sum())} source classes.")
            is_large = torch.cat([is_large, torch.tensor([True])])  # the last: unknown
            is_borrowed &= is_large[self.labels.long().clamp(max=len(counts))][lists]
            if not is_borrowed.any():
                raise TransferConfigError(
                    f"No source class has min_per_class={self.neighbors.min_per_class} borrowed images; the "
                    f"largest has {int(counts.max())}. Pass a smaller number."
                )
        times = self.budget // self.neighbors.k if self.neighbors.oversample_hard else torch.ones_like(self.budget)
        return NeighborOrder(lists[is_borrowed], is_borrowed.sum(1), times, self.source.seed)

    @property
    def target_weights(self) -> Tensor:
        """Return (targets,) the number of neighbors of each target image, as a multiple of its first number."""
        return self.budget / self.neighbors.k

    def values(self) -> dict[str, Tensor]:
        """Return the values to log."""
        assert self._order is not None  # a step has drawn
        return {"transfer/neighbors": self._order.counts.float().mean()}

    def describe(self) -> dict[str, str]:
        """Return every option that changes what a run computes."""
        found = {f"neighbors {option.name}": str(getattr(self.neighbors, option.name)) for option in fields(Neighbors)}
        bank = self.neighbors.bank
        return found if isinstance(bank, str) else {**found, "neighbors bank": bank.describe()}

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs, so that it selects nothing anew."""
        tensors = {"lists": self.lists, "labels": self.labels, "budget": self.budget}
        return {**tensors, "rounds_done": self.rounds_done, "made_of": self._made_of}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where a run stopped."""
        self.reset()
        self.lists, self.labels, self.budget = state["lists"].cpu(), state["labels"].cpu(), state["budget"].cpu()
        self.rounds_done = state["rounds_done"]
        self._made_of = state["made_of"]
        self._is_unchecked = bool(self._made_of)


def _is_same(before: Dataset[Any] | None, data: Dataset[Any]) -> bool:
    """Return whether two datasets are the same, or the same part of one, without reading an image."""
    before = before.dataset if isinstance(before, Pictures) else before
    if isinstance(before, Subset) and isinstance(data, Subset) and before.dataset is data.dataset:
        return list(before.indices) == list(data.indices)
    return before is data
