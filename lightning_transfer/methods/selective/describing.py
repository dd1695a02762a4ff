"""Count filter responses to pictures; a picture has the same counts in every batch."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.descriptors import Binning, ResponseCounts
from lightning_transfer.methods.selective.pictures import Batches, Picture, scaled

MOST_TOGETHER = 32  # pictures in one batch
NUMBERS = 2**22  # responses in it: for more, the C library allocates memory anew in each batch


class Describer:
    """Counts the responses of a bank on a device.

    Args:
        bank: of the filters.
        device: of the computation.
    """

    def __init__(self, bank: FilterBank, device: torch.device) -> None:
        self.bank = copy.deepcopy(bank).to(device)  # the user's own stays where it is
        self.device = device
        self.num_filters = sum(bank.num_filters)
        # the first filter of each layer
        self.firsts = [sum(bank.num_filters[:layer]) for layer in range(len(bank.num_filters))]

    def response_counts(self, batches: Batches) -> tuple[ResponseCounts, int]:
        """Return the counts of all responses to readable pictures, and the most positions of a filter in a picture."""
        counts, most = ResponseCounts(self.num_filters, self.device), 0
        for indices, batch in batches:
            for _, responses in self._responses(indices, batch):
                for first, layer in zip(self.firsts, responses, strict=True):
                    counts.add(layer, first)
                    most = max(most, layer.shape[2] * layer.shape[3])
        return counts, most

    def counts(self, indices: Sequence[int], batch: Sequence[Picture], binning: Binning) -> Tensor:
        """Return (pictures, filters, bins) counts; all zero for a picture that could not be read."""
        found = torch.zeros(len(batch), self.num_filters, binning.bins, dtype=torch.int32)
        for places, responses in self._responses(indices, batch):
            parts = [binning.counts(layer, first) for first, layer in zip(self.firsts, responses, strict=True)]
            found[places] = torch.cat(parts, 1).to("cpu", torch.int32)
        return found

    @torch.no_grad()
    def _responses(self, indices: Sequence[int], batch: Sequence[Picture]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield positions in the batch and each layer's responses to these pictures, for one size at a time."""
        by_kind: dict[tuple[torch.dtype, int, int, int], list[int]] = {}
        for place, (pixels, _) in enumerate(batch):
            if isinstance(pixels, Tensor):
                by_kind.setdefault((pixels.dtype, *pixels.shape), []).append(place)
        for (dtype, channels, height, width), places in by_kind.items():
            together = max(1, min(MOST_TOGETHER, NUMBERS // (self.num_filters * height * width)))
            for start in range(0, len(places), together):
                some = places[start : start + together]
                # always the same number: a convolution's rounding may depend on the batch size
                images = torch.zeros(together, channels, height, width, dtype=dtype)
                torch.stack([batch[place].pixels for place in some], out=images[: len(some)])  # type: ignore[misc]
                is_on = torch.backends.cudnn.enabled  # by default the context turns it off
                with torch.backends.cudnn.flags(enabled=is_on, allow_tf32=False, deterministic=True, benchmark=False):
                    try:
                        responses = self.bank(scaled(images.to(self.device)))
                    except TransferConfigError as error:
                        error.add_note(f"This happened with images {[indices[place] for place in some]}.")
                        raise
                yield some, [layer[: len(some)] for layer in responses]
