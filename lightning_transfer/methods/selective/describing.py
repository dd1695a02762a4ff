"""From pictures to counted filter responses: the same picture gives the same counts in whatever company."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.descriptors import Binning, ResponseCounts
from lightning_transfer.methods.selective.pictures import Picture, read_batches

MOST_TOGETHER, NUMBERS = 32, 2**23  # pictures, and responses, that are worked on at once: they stay in the cache


class Describer:
    """A bank on a device.

    Args:
        bank: whose filters are laid over pictures.
        device: where.
    """

    def __init__(self, bank: FilterBank, device: torch.device) -> None:
        self.bank = copy.deepcopy(bank).to(device)  # the user's own stays where it is
        self.device = device
        self.num_filters = sum(bank.num_filters)

    def response_counts(self, batches: Iterator[tuple[list[int], list[Picture]]]) -> tuple[ResponseCounts, int]:
        """Every response to readable pictures, and the most positions that a filter has in one of them."""
        counts, most = ResponseCounts(self.num_filters, self.device), 0
        for indices, batch in batches:
            for _, responses in self._responses(indices, batch):
                first = 0
                for layer in responses:
                    counts.add(layer, first)
                    first += layer.shape[1]
                    most = max(most, layer.shape[2] * layer.shape[3])
        return counts, most

    def counts(self, indices: Sequence[int], batch: Sequence[Picture], binning: Binning) -> Tensor:
        """(pictures, filters, bins) counts; all zero for a picture that could not be read."""
        found = torch.zeros(len(batch), self.num_filters, binning.bins, dtype=torch.int32)
        for places, responses in self._responses(indices, batch):
            first, parts = 0, []
            for layer in responses:
                parts.append(binning.counts(layer, first))
                first += layer.shape[1]
            found[places] = torch.cat(parts, 1).to("cpu", torch.int32)
        return found

    @torch.no_grad()
    def _responses(self, indices: Sequence[int], batch: Sequence[Picture]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Places in the batch, and responses of each layer to the pictures there, pictures of one size at a time."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, (pixels, _) in enumerate(batch):
            if isinstance(pixels, Tensor):
                by_shape.setdefault(tuple(pixels.shape), []).append(place)
        for (channels, height, width), places in by_shape.items():
            together = max(1, min(MOST_TOGETHER, NUMBERS // (self.num_filters * height * width)))
            for start in range(0, len(places), together):
                some = places[start : start + together]
                # always as many at once: how a convolution adds up may depend on how many there are
                images = torch.zeros(together, channels, height, width)
                torch.stack([batch[place].pixels for place in some], out=images[: len(some)])  # type: ignore[misc]
                with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True, benchmark=False):
                    try:
                        responses = self.bank(images.to(self.device))
                    except TransferConfigError as error:
                        error.add_note(f"This happened with images {[indices[place] for place in some]}.")
                        raise
                yield some, [layer[: len(some)] for layer in responses]


def read_all(pictures: Dataset[Picture], num_workers: int) -> Iterator[tuple[list[int], list[Picture]]]:
    """All pictures, in order."""
    return read_batches(pictures, range(len(pictures)), num_workers=num_workers)  # type: ignore[arg-type]
