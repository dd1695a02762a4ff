"""Digest the first samples that a run draws, so that a resumed run can check that its source is the same."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_transfer.source.stream import SourceStream
from lightning_transfer.source.task import SourceTask
from lightning_transfer.stamps import digest

COMPARED = 6  # samples at most
READINGS = 3  # of each sample, to check that they agree


def digests_of(samples: Any) -> list[str]:
    """Return a digest of the numbers of each of the first samples of a collated batch."""
    tensors = [leaf for leaf in tree_leaves(samples) if isinstance(leaf, Tensor) and leaf.ndim]
    num = min((len(tensor) for tensor in tensors), default=0)
    return [digest([tensor[place] for tensor in tensors]) for place in range(min(num, COMPARED))]


def redrawn(source: SourceTask, num: int, workers: Mapping[str, Any]) -> list[str]:
    """Return the digests of the first samples that a run draws; none if reading them again gives different ones."""
    one = {**workers, "num_workers": min(workers["num_workers"], 1)}  # in a worker process if training uses workers
    readings = []
    for _ in range(READINGS):
        stream = SourceStream(source, batch_size=num, workers=one)
        readings.append(digests_of(stream.next_batch().samples))
        stream.close()
    return readings[0] if all(reading == readings[0] for reading in readings) else []
