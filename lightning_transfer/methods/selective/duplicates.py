"""Find source images that are copies, exact or nearly, of target images and would leak a test set (ours).

Descriptors choose the candidates and pictures decide: two are near duplicates if their grey thumbnails, one of them
mirrored or not, agree up to brightness and contrast, and their colours change alike from dark to bright. A grey picture
agrees with every colour.
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
RECOLOURED = 0.5  # distance of colours, whose length is at least sqrt(3)


def near_duplicates(indices: Tensor, target: Pictures, source: Pictures, step: Step) -> Tensor:
    """Return (pairs, 2) of target and source images that show the same, among (targets, k) candidates.

    Args:
        indices: source images that each target image is compared with.
        target: pictures.
        source: pictures.
        step: called with how many more pictures were compared.
    """
    wanted = indices.unique()
    of_source, source_colours = _thumbnails(source, wanted.tolist(), step)
    of_target, colours = _thumbnails(target, range(len(indices)), step)
    candidates = torch.searchsorted(wanted, indices.contiguous())
    others = of_source[candidates]
    views = others, _mirrored(others)
    likeness = torch.maximum(*((of_target[:, None] * thumbnails).sum(-1) for thumbnails in views))
    is_alike = (likeness >= ALIKE) & _are_of_one_colour(colours[:, None], source_colours[candidates])
    image, place = is_alike.nonzero(as_tuple=True)
    pairs: Tensor = torch.stack([image, indices[image, place]], 1).unique(dim=0)
    return pairs


def near_duplicates_of_few(target: Pictures, source: Pictures) -> Tensor:
    """Return (pairs, 2) of target and source images that show the same, each compared with all: for some thousands."""
    sides = (_thumbnails(side, range(len(side)), lambda *_: None) for side in (target, source))
    (of_target, colours), (others, source_colours) = sides
    likeness = torch.maximum(*(of_target @ thumbnails.T for thumbnails in (others, _mirrored(others))))
    pairs: Tensor = ((likeness >= ALIKE) & _are_of_one_colour(colours[:, None], source_colours)).nonzero()
    return pairs


def _mirrored(thumbnails: Tensor) -> Tensor:
    return thumbnails.view(*thumbnails.shape[:-1], SIDE, SIDE).flip(-1).flatten(-2)


def _are_of_one_colour(one: Tensor, other: Tensor) -> Tensor:
    is_grey = ((one - 1).abs().amax(-1) < 0.01) | ((other - 1).abs().amax(-1) < 0.01)
    alike: Tensor = is_grey | ((one - other).norm(dim=-1) < RECOLOURED)
    return alike


def _thumbnails(pictures: Pictures, indices: Sequence[int], step: Step) -> tuple[Tensor, Tensor]:
    """Return (pictures, SIDE * SIDE) grey, of zero mean and unit length, and (pictures, 3) colours.

    The colour is how much each channel changes for a change of 1 of their mean. A flat or unreadable picture has a
    thumbnail of zeros, which resembles none.
    """
    found, colours = [], []
    for _, batch in pictures.batches(indices):
        for pixels, _ in batch:
            image = torch.zeros(1, SIDE, SIDE) if isinstance(pixels, str) else scaled(pixels)
            channels = F.interpolate(image[None], (SIDE, SIDE), mode="area")[0].flatten(1)
            thumbnail = channels.mean(0) - channels.mean()
            length = thumbnail.norm()
            found.append(thumbnail / length if length > 1e-3 else torch.zeros_like(thumbnail))
            colours.append(channels @ found[-1] / length if len(channels) == 3 else torch.ones(3))
        step(len(batch))
    return torch.stack(found), torch.stack(colours)
