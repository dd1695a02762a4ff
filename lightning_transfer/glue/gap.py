"""How far the target of a run lies from its source, measured before the first step, and the source weight that follows.

The rule is ours: see examples/benchmarks/README.md for what it was chosen on.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_transfer import ranks
from lightning_transfer.glue.trainer import looking, progress_of, say, target_dataset, to_device
from lightning_transfer.source.gap import domain_gap, is_near
from lightning_transfer.source.stream import load, seeded

if TYPE_CHECKING:
    from lightning_transfer.glue.source_term import SourceTerm

IMAGES = 1000  # of each side, at most
BATCH = 100


def measure_gap(term: "SourceTerm", module: Any) -> float:
    """The domain gap by the features of the network as it is, in front of its head; the same in every process."""
    trainer = module.trainer
    given = None if term.chooser is None else term.chooser.target
    source = term.source.dataset if given is None else term.source.plain_dataset

    def measured() -> float:
        with progress_of(trainer)("How far the target lies from the source", 2 * IMAGES) as step:
            sides = []
            for dataset in (target_dataset(given, trainer), source):
                sides.append(_features(term, module, dataset))
                step(IMAGES)
        return domain_gap(*sides)

    gap = ranks.from_first(measured, patiently=True)
    say(trainer, f"Domain gap {gap:.2f} (.5 near, 1 far): {'near enough' if is_near(gap) else 'plain fine-tuning'}.")
    return gap


def _features(term: "SourceTerm", module: Any, dataset: Any) -> Tensor:
    """(n, D) features of images drawn from a dataset; no random state of the program's moves."""
    found = []
    with seeded(term.source.seed, 0):
        size = len(dataset)
        for some in torch.randperm(size)[:IMAGES].split(BATCH):
            batch = default_collate([load(dataset, index) for index in some.tolist()])
            with looking(module.trainer):
                images, _ = term.source.unpack(to_device(module.trainer, batch, hooks=term.source.batch_hooks))
            found.append(term.features(module, images).float().flatten(1).cpu())
    return torch.cat(found)
