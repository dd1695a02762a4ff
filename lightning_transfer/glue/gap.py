"""How far the target of a run lies from its source, measured before the first step, and the source weight that follows.

The rule is ours: see examples/benchmarks/README.md for what it was chosen on.
"""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_transfer import ranks
from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue.trainer import looking, progress_of, say, target_dataset, to_device
from lightning_transfer.source.gap import NEAR, SOURCE_IMAGES, TARGET_IMAGES, check_alike, domain_gap, is_near
from lightning_transfer.source.stream import collate, load, seeded
from lightning_transfer.source.task import structure

if TYPE_CHECKING:
    from lightning_transfer.glue.source_term import SourceTerm

BATCH = 100


def measure_gap(term: "SourceTerm", module: Any) -> float:
    """The domain gap by the features of the network as it is, in front of its head; the same in every process."""
    trainer = module.trainer
    given = None if term.chooser is None else term.chooser.target
    source = term.source.dataset if given is None else term.source.plain_dataset

    def measured() -> tuple[float, int]:
        with progress_of(trainer)("How far the target lies from the source", TARGET_IMAGES + SOURCE_IMAGES) as step:
            target = target_dataset(given, trainer)
            mine, shown = _features(term, module, target, TARGET_IMAGES, is_target=True)
            step(TARGET_IMAGES)
            like = None if callable(term.source.forward) else shown  # which may bring both to one size
            theirs, _ = _features(term, module, source, SOURCE_IMAGES, like=like)
            step(SOURCE_IMAGES)
        return domain_gap(mine, theirs), len(mine)

    try:
        gap, size = ranks.from_first(measured, patiently=True)
    except Exception as error:
        error.add_note(
            "This happened while weight='auto' measured how far the target lies from the source. To keep the source "
            f"without a look: weight=lt.{term.weight!r}."
        )
        raise
    found = f"Domain gap {gap:.2f}, by {size} target images (.5 near, {NEAR} too far, 1 far)"
    if is_near(gap):
        say(trainer, f"{found}: the source is kept.")
    elif trainer.is_global_zero:
        warnings.warn(
            f"{found}: the source is left out, and this is plain fine-tuning. To keep it all the same: "
            f"weight=lt.{term.weight!r}.",
            NoEffectWarning,
            stacklevel=2,
        )
    return gap


def _features(
    term: "SourceTerm",
    module: Any,
    dataset: Any,
    size: int,
    *,
    is_target: bool = False,
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(n, D) features of images drawn from a dataset, and some of these; no random state of the program's moves.

    Where others are given that they have to be like, their shapes are compared before the network meets them.
    """
    found, hooks = [], is_target or term.source.batch_hooks
    name = "target" if is_target else "source"
    with seeded(term.source.seed, 0):
        for samples in _readings(dataset, size, name, forgives=not is_target and term.chooser is not None):
            batch = collate(samples, of=name)
            with looking(module.trainer):
                images = _images(term, to_device(module.trainer, batch, hooks=hooks), is_target=is_target)
            if like is not None:
                check_alike(like, images)
            found.append(term.features(module, images).float().flatten(1).cpu())
    return torch.cat(found), images


def _readings(dataset: Any, size: int, name: str, *, forgives: bool) -> Iterator[list[tuple[int, Any]]]:
    """Samples drawn from a dataset, some at a time, each with its index.

    Some that cannot be read are passed over where that is forgiven: by a selection, which names them and leaves them
    out too.

    Raises:
        TransferConfigError: the dataset has no length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TransferConfigError(f"The {name}, a {type(dataset).__name__}, has no length and random access.")
    broken, is_any = None, False
    for some in torch.randperm(len(dataset))[:size].split(BATCH):
        samples = []
        for index in some.tolist():
            try:
                samples.append((index, load(dataset, index, of=name)))
            except Exception as error:
                if not forgives:
                    raise
                broken = error
        if samples:
            is_any = True
            yield samples
    if broken is not None and not is_any:
        raise broken


def _images(term: "SourceTerm", batch: Any, *, is_target: bool) -> Tensor:
    """The images of a batch: a target's is read as the source's are."""
    try:
        return term.source.unpack(batch)[0]
    except Exception as error:
        if not is_target:
            raise
        raise TransferConfigError(
            f"A target batch is {structure(batch)}, and weight='auto' reads it as it reads a source batch: "
            f"{type(error).__name__}: {error} Let the source dataset give what the target's gives, with "
            "SourceTask(adapt=...) for both."
        ) from error
