"""Find source images that are copies, exact or nearly, of target images and would leak a test set (ours).

Descriptors choose the candidates and pictures decide: two are near duplicates if their grey thumbnails, one of them
mirrored or not, agree up to brightness and contrast.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_transfer.methods.selective.pictures import Pictures, scaled
from lightning_transfer.progress import Step

COMPARED = 5  # nearest source images to compare with each target image, and with its mirror image, at least
SIDE = 16  # of a thumbnail
ALIKE = 0.985  # correlation of thumbnails


def near_duplicates(indices: Tensor, target: Pictures, source: Pictures, step: Step) -> Tensor:
    """Return (pairs, 2) of target and source images that show the same, among (targets, k) candidates.

    Args:
        indices: source images that each target image is compared with.
        target: pictures.
        source: pictures.
        step: called with how many more pictures were compared.
    """
    wanted = indices.unique()
    of_source = _thumbnails(source, wanted.tolist(), step)
    of_target = _thumbnails(target, range(len(indices)), step)
    others = of_source[torch.searchsorted(wanted, indices.contiguous())]
    views = others, _mirrored(others)
    likeness = torch.maximum(*((of_target[:, None] * thumbnails).sum(-1) for thumbnails in views))
    image, place = (likeness >= ALIKE).nonzero(as_tuple=True)
    pairs: Tensor = torch.stack([image, indices[image, place]], 1).unique(dim=0)
    return pairs


def near_duplicates_of_few(target: Pictures, source: Pictures) -> Tensor:
    """Return (pairs, 2) of target and source images that show the same, each compared with all: for some thousands."""
    of_target, others = (_thumbnails(side, range(len(side)), lambda *_: None) for side in (target, source))
    likeness = torch.maximum(*(of_target @ thumbnails.T for thumbnails in (others, _mirrored(others))))
    pairs: Tensor = (likeness >= ALIKE).nonzero()
    return pairs


def _mirrored(thumbnails: Tensor) -> Tensor:
    return thumbnails.view(*thumbnails.shape[:-1], SIDE, SIDE).flip(-1).flatten(-2)


def _thumbnails(pictures: Pictures, indices: Sequence[int], step: Step) -> Tensor:
    """Return (pictures, SIDE * SIDE) grey, of zero mean and unit length; a flat or unreadable one resembles none."""
    found = []
    for _, batch in pictures.batches(indices):
        for pixels, _ in batch:
            grey = torch.zeros(1, 1, SIDE, SIDE) if isinstance(pixels, str) else scaled(pixels).mean(0)[None, None]
            thumbnail = F.interpolate(grey, (SIDE, SIDE), mode="area").flatten()
            thumbnail = thumbnail - thumbnail.mean()
            length = thumbnail.norm()
            found.append(thumbnail / length if length > 1e-3 else torch.zeros_like(thumbnail))
        step(len(batch))
    return torch.stack(found)
