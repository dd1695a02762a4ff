"""Keep the descriptors of whole datasets on disk during a selection; several processes divide a large dataset."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_transfer import ranks
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.descriptors import Binning
from lightning_transfer.methods.selective.pictures import Batches, Pictures
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.store import Store
from lightning_transfer.stamps import digest

UNREADABLE = -2  # as a label: no class, and not an unknown one either
MOST_UNREADABLE = 0.01  # the share of images that may be unreadable
SHOWN = 5  # of the unreadable


class Descriptions:
    """Describes images and stores their descriptors, in a folder beside the cache or in a temporary one.

    Args:
        scan: options of the work.
        describer: computes responses.
        binning: the target's bins.
        most_positions: of a filter in an image.
        identity: of everything that descriptors depend on, to find interrupted work.
        undo: closes files and removes a temporary folder.
    """

    def __init__(
        self,
        scan: Scan,
        describer: Describer,
        binning: Binning,
        most_positions: int,
        *,
        identity: str,
        undo: ExitStack,
    ) -> None:
        self.scan = scan
        self.describer = describer
        self.binning = binning
        self.most_positions = most_positions
        self.shape = (describer.num_filters, binning.bins)
        self._undo = undo
        if scan.cache is None:
            self.folder = Path(undo.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        else:
            self.folder = Path(f"{scan.cache}.work") / digest(identity)

    def remove(self) -> None:
        """Delete the folder; open files stay readable."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.scan.cache is not None:
            with contextlib.suppress(OSError):  # another job uses the folder above
                self.folder.parent.rmdir()

    def describe(
        self, pictures: Pictures, name: str, *, shared: Callable[[Store, range, float, int], None] | None = None
    ) -> tuple[Store, Tensor, Tensor]:
        """Describe all images that have no descriptor yet.

        Args:
            pictures: the images.
            name: of the store, with the identity of the images.
            shared: given if each process describes a share, otherwise each describes everything. The first process
                calls it after the first blocks, if there are more: with its store, its images in there, the seconds an
                image takes all processes together, and how many images are left.

        Returns:
            The store, the labels of all images (`UNREADABLE` for those without a descriptor), and the images in this
            process' store.

        Raises:
            TransferConfigError: too many images are unreadable, or the disk is full.
        """
        if shared is not None:
            return self._shared(pictures, name, shared)
        return ranks.together(lambda: self._alone(pictures, name))

    def _open(self, pictures: Pictures, name: str) -> tuple[Store, dict[int, Tensor]]:
        store = Store(self.folder / name, len(pictures), self.shape, self.most_positions)
        self._undo.callback(store.close)
        return store, store.finished()

    def _alone(self, pictures: Pictures, name: str) -> tuple[Store, Tensor, Tensor]:
        store, labels = self._open(pictures, name)
        blocks = store.blocks()
        todo = [block for block in range(len(blocks)) if block not in labels]
        batches = pictures.batches([index for block in todo for index in blocks[block]])
        with self.scan.progress(f"Filters over the {pictures.name}", len(pictures)) as step:
            step(sum(len(blocks[block]) for block in labels))
            for block in todo:
                labels[block] = self._describe_block(store, block, blocks[block], batches, pictures)
                step(len(blocks[block]))
        every = torch.cat([labels[block] for block in range(len(blocks))])
        self._check_readable(every, pictures.name)
        return store, every, torch.arange(len(pictures))

    def _shared(
        self, pictures: Pictures, name: str, began: Callable[[Store, range, float, int], None]
    ) -> tuple[Store, Tensor, Tensor]:
        store, labels = ranks.together(lambda: self._open(pictures, name))
        blocks, me, held = store.blocks(), ranks.rank(), ranks.gather(set(labels))
        holders = [[process for process, those in enumerate(held) if block in those] for block in range(len(blocks))]
        todo = [block for block, who in enumerate(holders) if not who]
        mine = todo[me :: len(held)]
        batches = pictures.batches([index for block in mine for index in blocks[block]])
        with self.scan.progress(f"Filters over the {pictures.name}", len(pictures)) as step:

            def turn(now: list[int]) -> None:
                if me < len(now):
                    labels[now[me]] = self._describe_block(store, now[me], blocks[now[me]], batches, pictures)
                step(sum(len(blocks[block]) for block in now))

            there = sum(len(blocks[block]) for block, who in enumerate(holders) if who)
            if there:
                self.scan.say(f"{there:,} of {len(pictures):,} images are described already, by an interrupted run.")
            step(there)
            first = time.monotonic()
            for start in range(0, len(todo), len(held)):  # together, so that no process waits for long
                ranks.together(partial(turn, todo[start : start + len(held)]))
                if start == me == 0 and todo[len(held) :]:
                    described = sum(len(blocks[block]) for block in todo[: len(held)])
                    seconds = (time.monotonic() - first) / described
                    began(store, blocks[todo[0]], seconds, len(pictures) - there - described)
        kept = sorted({*mine, *(block for block, who in enumerate(holders) if who and who[block % len(who)] == me)})
        here = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.tensor(blocks[block]) for block in kept)])
        shares = ranks.gather({block: labels[block] for block in kept})
        every = {block: those for share in shares for block, those in share.items()}
        all_labels = torch.cat([every[block] for block in range(len(blocks))])
        self._check_readable(all_labels, pictures.name)
        return store, all_labels, here

    def _describe_block(self, store: Store, number: int, images: range, batches: Batches, pictures: Pictures) -> Tensor:
        """Describe and write one block, and return its labels."""
        counts: list[Tensor] = []
        labels: list[int] = []
        while len(labels) < len(images):
            indices, batch = next(batches)
            counts.append(self.describer.counts(indices, batch, self.binning))
            labels += [UNREADABLE if isinstance(pixels, str) else label for pixels, label in batch]
            for index, (pixels, _) in zip(indices, batch, strict=True):
                if isinstance(pixels, str):
                    self.scan.say(f"{pictures.name} image {index} cannot be used: {pixels}")
                    if labels.count(UNREADABLE) > MOST_UNREADABLE * len(pictures):
                        raise TransferConfigError(_too_many(pictures.name, f"image {index}: {pixels}"))
        found = torch.tensor(labels)
        store.write(number, torch.cat(counts), found)
        return found

    def _check_readable(self, labels: Tensor, name: str) -> None:
        bad = (labels == UNREADABLE).nonzero()[:, 0].tolist()
        if len(bad) > MOST_UNREADABLE * len(labels):
            raise TransferConfigError(_too_many(name, f"{len(bad)} of {len(labels)}, images {bad[:SHOWN]}"))
        if bad:
            shown = f"{bad[:SHOWN]}{' and others' if len(bad) > SHOWN else ''}"
            self.scan.say(f"{len(bad)} of {len(labels):,} {name} images cannot be used and are left out: {shown}.")


def _too_many(name: str, what: str) -> str:
    return f"More than {MOST_UNREADABLE:.0%} of the {name} images cannot be used: {what}. Repair the dataset."
