"""Find the nearest source images of every target image, from images to lists (arXiv 1702.08690, section 3).

One pass over the target finds bin edges, a second one its descriptors. One pass over the source writes its descriptors
to disk as whole numbers, and a search reads them in blocks. Several processes divide the source.
"""

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer import ranks
from lightning_transfer.datasets import index_in
from lightning_transfer.errors import TransferConfigError, differences
from lightning_transfer.methods.selective.approximate import BYTES
from lightning_transfer.methods.selective.banks import FilterBank
from lightning_transfer.methods.selective.describing import Describer
from lightning_transfer.methods.selective.descriptions import UNREADABLE, Descriptions
from lightning_transfer.methods.selective.descriptors import Binning, num_bins
from lightning_transfer.methods.selective.duplicates import COMPARED, near_duplicates
from lightning_transfer.methods.selective.exact import search_bytes
from lightning_transfer.methods.selective.finding import Finder
from lightning_transfer.methods.selective.forecast import search_seconds
from lightning_transfer.methods.selective.options import Neighbors
from lightning_transfer.methods.selective.pictures import Batches, Pictures, check_alike, scaled
from lightning_transfer.methods.selective.scanning import Scan
from lightning_transfer.methods.selective.search import plain_arithmetic, searched_on
from lightning_transfer.methods.selective.selection import FORMAT, Selection
from lightning_transfer.methods.selective.store import Store, Stored
from lightning_transfer.progress import duration
from lightning_transfer.stamps import digest


def select_neighbors(
    target: Dataset[Any],
    source: Dataset[Any],
    *,
    bank: str | FilterBank = "gabor",
    k: int = 300,
    bins: int | None = None,
    search: str = "exact",
    protect: Sequence[Dataset[Any]] = (),
    scan: Scan = Scan(),  # noqa: B008  (frozen)
) -> Selection:
    """For every target image, find the k source images with the nearest low-level statistics.

    Descriptors and distance are the paper's and the authors' code's; bins, smoothing and the search are ours. With
    `torch.distributed`, processes divide the source; an exact selection does not depend on their number.

    Args:
        target: target training images without augmentation, giving images or (image, label).
        source: source images without augmentation, preprocessed in the same way.
        bank: "gabor", or a `FilterBank`.
        k: neighbors of each target image.
        bins: of each histogram; by default the root of the number of positions a filter has, at most 100.
        search: "exact", or "approximate" for tens of millions of source images, which reports its measured recall.
        protect: datasets, such as the target's test set, whose near duplicates are left out of the source.
        scan: where work is kept, how images are read, and what is shown during the work.

    Raises:
        TransferConfigError: an argument cannot be right; the message names it.

    Example:
        >>> images = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        >>> from lightning_transfer.progress import no_progress
        >>> selection = select_neighbors(images[:2], images[2:], k=3, scan=Scan(progress=no_progress, say=list))
        >>> selection
        Selection(2 target images, 3 neighbors each, 3 source images)
    """
    pictures = partial(Pictures, num_workers=scan.num_workers)
    protected = [pictures(data, "protected") for data in protect]
    neighbors = Neighbors(k=k, bank=bank, bins=bins, search=search, rounds=0)
    return Job(pictures(target, "target"), pictures(source, "source"), protected, neighbors, scan).run()


@dataclass(frozen=True)
class Job:
    """Runs one selection. Each list has `longest` neighbors, or all that the source has left, but at least k."""

    target: Pictures
    source: Pictures
    protect: Sequence[Pictures]
    neighbors: Neighbors
    scan: Scan

    @cached_property
    def bank(self) -> FilterBank:
        """Return the bank that describes all images."""
        bank = self.neighbors.bank
        return bank if isinstance(bank, FilterBank) else FilterBank.gabor()

    @property
    def longest(self) -> int:
        """Return how many neighbors of a target image are kept."""
        return self.neighbors.longest(len(self.source))

    @property
    def _device(self) -> torch.device:
        """Return where an exact search computes."""
        return searched_on(torch.device(self.scan.device))

    def _root(self, source: Store) -> Tensor:
        """Return the root of the weight of each number of a histogram."""
        return self.bank.weights.sqrt().repeat_interleave(source.shape[1])

    def run(self) -> Selection:
        """Select, or resume the work of an interrupted run."""
        job = self if ranks.rank() == 0 else replace(self, scan=self.scan.silent())
        with plain_arithmetic():
            return job._run()

    def _run(self) -> Selection:
        ranks.together(self._check)
        describer = Describer(self.bank, torch.device(self.scan.device))
        edges, most_positions, target_digest = ranks.together(lambda: self._edges(describer))
        fingerprint = self._fingerprint(edges, target_digest)
        if len({repr(one) for one in ranks.gather(fingerprint)}) > 1:
            raise TransferConfigError("Processes have different images. Pass the same data in the same order to all.")
        found = ranks.from_first(lambda: self._cached(fingerprint))
        if found is None:
            with ExitStack() as undo:
                binning, made_of = Binning(edges).to(describer.device), ("format", "bank", "edges", "target", "source")
                identity = " ".join(fingerprint[name] for name in made_of)
                descriptions = Descriptions(self.scan, describer, binning, most_positions, identity=identity, undo=undo)
                found = self._select(descriptions, fingerprint)
                if self.scan.cache is not None:
                    ranks.from_first(partial(found.save, self.scan.cache))
                descriptions.remove()
        if len(found.duplicates):
            warnings.warn(
                f"{len(found.duplicates[:, 0].unique())} target images are also in the source, exactly or nearly, for "
                f"example {_pairs(found.duplicates)} (target, source). If test images are there too, the test accuracy "
                "is too high: pass protect=[test_dataset].",
                stacklevel=5,
            )
        return replace(found, target=self.target, source=self.source)

    def _check(self) -> None:
        self.target.check_always_the_same("Pass target=, the same images with the transform that validation uses.")
        self.source.check_always_the_same("Pass SourceTask(unaugmented=), the same images without augmentation.")
        for pictures in self.protect:
            pictures.check_always_the_same("Give protected images without augmentation.")
        if (k := self.neighbors.k) > len(self.source):
            raise TransferConfigError(
                f"k={k} exceeds the {len(self.source):,} source images; pass k<={len(self.source)}."
            )
        check_alike(self.target, self.source, self.protect)
        shown = "; ".join(f"{side.name}: {side.glance}" for side in (self.target, self.source, *self.protect))
        self.scan.say(f"Pixels of some images: {shown}.")

    def _edges(self, describer: Describer) -> tuple[Tensor, int, str]:
        """Return bin edges, the most positions of a filter in a target image, and a digest of all target images."""
        digests = []
        with self.scan.progress("Filters over the target", len(self.target)) as step:

            def read() -> Batches:
                for indices, batch in self.target.batches(range(len(self.target))):
                    for index, (pixels, _) in zip(indices, batch, strict=True):
                        if isinstance(pixels, str):
                            place = index_in(self.target.dataset, index)
                            raise TransferConfigError(f"Target image {place} cannot be used: {pixels}.")
                    digests.append(digest([(scaled(pixels), label) for pixels, label in batch]))  # type: ignore[arg-type]
                    yield indices, batch
                    step(len(batch))

            counts, most = describer.response_counts(read())
        edges = counts.edges(self.neighbors.bins or num_bins(counts.per_filter / len(self.target)))
        return edges, most, digest(digests)

    def _fingerprint(self, edges: Tensor, target_digest: str) -> dict[str, str]:
        return {
            "format": FORMAT,
            "bank": self.bank.describe(),
            "bins": str(edges.shape[1] + 1),
            "edges": digest(edges),
            "target": f"{len(self.target)} images {target_digest}",
            "source": self.source.identity,
            "neighbors listed": str(self.longest),
            "search": self.neighbors.search,
            "protected": ", ".join(pictures.identity for pictures in self.protect) or "none",
        }

    def _cached(self, fingerprint: dict[str, str]) -> Selection | None:
        path = self.scan.cache
        if path is None or not os.path.exists(path):  # Path.exists raises on an impossible path
            return None
        found = Selection.load(path)
        different = differences(found.fingerprint, fingerprint, there="there")
        if different:
            raise TransferConfigError(
                f"{path} holds another selection: {'; '.join(different)}. Delete it, or pass another cache=."
            )
        if mended := self._mended(found):
            warnings.warn(
                f"Source images {mended} could not be read when the selection in {path} was made, but can be read now: "
                "the selection is made again, with them.",
                stacklevel=2,
            )
            return None
        self.scan.say(f"The selection in {path} is used: {found!r}. It compared {self.source.identified_by}.")
        return found

    def _mended(self, found: Selection) -> list[int]:
        """Return the source images that could not be read when a selection was made, but can be read now."""
        unreadable = found.unreadable.tolist()
        batches = self.source.batches(unreadable) if unreadable else ()
        read = (pair for some, batch in batches for pair in zip(some, batch, strict=True))
        return [index for index, (pixels, _) in read if isinstance(pixels, Tensor)]

    def _select(self, descriptions: Descriptions, fingerprint: dict[str, str]) -> Selection:
        began = time.monotonic()
        target, target_labels, _ = descriptions.describe(self.target, f"target {self.target.identity}")
        rate = len(self.target) / (time.monotonic() - began) * ranks.world_size()
        index = len(self.source) * BYTES if self.neighbors.search == "approximate" else 0
        memory = index + search_bytes(len(self.target), self.longest, descriptions.shape)
        self.scan.say(
            f"Selecting among {len(self.source):,} source images for {len(self.target):,} target images: about "
            f"{memory / 1e9:.1f} GB of memory, {len(self.source) * target.row_bytes / 1e9:.2f} GB on disk in "
            f"{descriptions.folder}. At the target's {rate:,.0f} images a second the source takes "
            f"about {duration(len(self.source) / rate)}."
            + (" If interrupted, it resumes." if self.scan.cache else " Without cache= interrupted work is lost.")
        )
        everything = Stored(target, torch.arange(len(self.target)))
        source, source_labels, mine = descriptions.describe(
            self.source, "source", shared=partial(self._say_minutes, everything)
        )
        usable = source_labels != UNREADABLE
        finder = self._finder(source, mine[usable[mine]])
        dropped = self._leaks(descriptions, finder)
        usable[dropped[:, 1]] = False
        if int(usable.sum()) < self.neighbors.k:
            raise TransferConfigError(
                f"k={self.neighbors.k} exceeds the {int(usable.sum()):,} source images that are left when "
                f"{int((~usable).sum()):,} are unreadable or protected; pass fewer neighbors."
            )
        if len(dropped):
            finder = self._finder(source, mine[usable[mine]])
        k = min(self.longest, int(usable.sum()))
        distances, indices = finder.nearest(everything, k, all_in_double=True)
        if finder.is_approximate:
            recall = finder.recall(everything, indices)
            self.scan.say(f"The approximate search found {recall:.1%} of the {k} true nearest.")
        duplicates = self._copies(descriptions, finder, self.target, known=indices)
        return Selection(
            indices=indices,
            distances=distances,
            fingerprint=fingerprint,
            target_labels=target_labels,
            source_labels=source_labels.clamp(min=-1),
            duplicates=duplicates,
            dropped=dropped,
            unreadable=(source_labels == UNREADABLE).nonzero()[:, 0],
        )

    def _finder(self, source: Store, mine: Tensor) -> Finder:
        return Finder(
            Stored(source, mine),
            mine,
            root=self._root(source),
            device=self._device,
            is_approximate=self.neighbors.search == "approximate",
        )

    def _say_minutes(self, target: Stored, source: Store, images: range, seconds: float, left: int) -> None:
        """Say how long the rest takes, after the first source images have taken so many seconds each."""
        sides, num_rows = [len(side) for side in (self.target, *self.protect)], len(self.source)
        compared = sum(side + min(num_rows, 2 * COMPARED * side) for side in sides)  # read again for near duplicates
        rest = seconds * (left + compared + sum(sides))
        seen = f"Measured on the first {len(images):,} source images: {1 / seconds:,.0f} images a second, so the rest"
        if self.neighbors.search == "approximate":  # what is measured below is the exact search
            self.scan.say(f"{seen} takes about {duration(rest)} without the search.")
            return
        searching = search_seconds(
            target,
            Stored(source, torch.tensor(images)),
            self._root(source),
            k=self.longest,
            num_rows=num_rows // ranks.world_size(),
            num_searches=2 * sum(sides) / len(target),
            device=self._device,
        )
        self.scan.say(
            f"{seen} takes about {duration(rest + searching)}, of which the search takes {duration(searching)}."
        )

    def _leaks(self, descriptions: Descriptions, finder: Finder) -> Tensor:
        """Return (pairs, 2) of protected images, counted over all datasets, and source images that show the same."""
        found, before = [torch.empty(0, 2, dtype=torch.int64)], 0
        for pictures in self.protect:
            found.append(self._copies(descriptions, finder, pictures) + torch.tensor([before, 0]))
            before += len(pictures)
        dropped = torch.cat(found)
        if self.protect:
            self.scan.say(
                f"Source images that show protected images and are left out: {len(dropped[:, 1].unique())}"
                + (f", for example {_pairs(dropped)} (protected, source)." if len(dropped) else ".")
            )
        return dropped

    def _copies(
        self,
        descriptions: Descriptions,
        finder: Finder,
        pictures: Pictures,
        known: Tensor = torch.empty(0, 0),  # noqa: B008  (never changed)
    ) -> Tensor:
        """Return (pairs, 2) of pictures and all source images that show the same, mirrored or not.

        `known` are the nearest source images of each picture as it is, if they were searched before.
        """
        stores = []
        for view in (pictures, pictures.mirrored()):
            store, _, _ = descriptions.describe(view, f"{view.name} {view.identity}")
            stores.append(Stored(store, torch.arange(len(view))))
        k, most = COMPARED, sum(ranks.gather(len(finder.rows)))
        while True:
            k = min(k, most)
            nearest = known[:, :k] if known.shape[1] >= k else finder.nearest(stores[0], k)[1]
            candidates = torch.cat([nearest, finder.nearest(stores[1], k)[1]], 1)
            with self.scan.progress("Near duplicates", len(candidates.unique()) + len(pictures)) as step:
                compare = partial(near_duplicates, candidates, pictures, self.source, step)
                pairs = ranks.from_first(compare)
            if k == most or not len(pairs) or int(pairs[:, 0].bincount().max()) < k:
                return pairs
            k *= 4  # all compared images are copies: there may be more


def _pairs(pairs: Tensor) -> str:
    return ", ".join(map(str, map(tuple, pairs[:5].tolist())))
