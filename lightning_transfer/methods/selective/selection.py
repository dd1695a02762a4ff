"""Keep the nearest source images of each target image in a file, and draw them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.datasets import known_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.methods.selective.pictures import Pictures, for_display
from lightning_transfer.reading import apart
from lightning_transfer.stamps import checksum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "2"  # of the file; raised when old code could not read a new file
TENSORS = ("indices", "distances", "target_labels", "source_labels", "duplicates", "dropped", "unreadable")


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Holds the nearest source images of every target image.

    Attributes:
        indices: (targets, k) source images, nearest first.
        distances: (targets, k) symmetric KL distances, float64.
        fingerprint: what it was made of: data and their order, bank, bins, edges, the version of its format.
        target_labels: (targets,) classes, -1 if unknown.
        source_labels: (source,) classes, -1 if unknown.
        duplicates: (pairs, 2) of target and source images that show the same.
        dropped: (pairs, 2) of protected images, counted over all protected datasets, and the source images left out
            because of them.
        unreadable: (images,) source images that could not be read.
        target: the target's images, if the selection was just made.
        source: the source's images, if the selection was just made.

    Example:
        >>> import tempfile, pathlib, torch
        >>> path = pathlib.Path(tempfile.mkdtemp(), "chosen.safetensors")
        >>> none = torch.empty(0, 2, dtype=torch.int64)
        >>> labels = torch.tensor([0])
        >>> made = Selection(torch.tensor([[3, 1]]), torch.tensor([[0.1, 0.2]]), {}, labels, labels, none, none, labels)
        >>> made.save(path)
        >>> Selection.load(path)
        Selection(1 target image, 2 neighbors each, 2 source images)
    """

    indices: Tensor
    distances: Tensor
    fingerprint: dict[str, str]
    target_labels: Tensor
    source_labels: Tensor
    duplicates: Tensor
    dropped: Tensor
    unreadable: Tensor
    target: Dataset[Any] | None = None
    source: Dataset[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selection":
        return self  # never changes, and a copy of the user's module must not copy images

    def __repr__(self) -> str:
        num_targets, k = self.indices.shape
        images = "image" if num_targets == 1 else "images"
        borrowed = len(self.indices.unique())
        return f"Selection({num_targets:,} target {images}, {k:,} neighbors each, {borrowed:,} source images)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a checksum, whole or not at all.

        Raises:
            TransferConfigError: it cannot be written there.
        """
        from safetensors.torch import save

        tensors = {name: getattr(self, name).contiguous().clone() for name in TENSORS}  # none may share memory
        facts = {"format": FORMAT, "fingerprint": json.dumps(self.fingerprint, sort_keys=True)}
        facts["checksum"] = _checksum(tensors, facts)
        data = save(tensors, metadata=facts)
        write_atomically(path, lambda file: file.write(data), what="the selection", fix="Pass another path.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Selection":
        """Read a file that `save` wrote.

        Args:
            path: of the file.

        Raises:
            TransferConfigError: there is no such file, it is damaged, or it is of another version of this package.
        """
        from safetensors.torch import load

        with reading(path, what="selection", fix="Delete it and select again."):
            data = Path(path).read_bytes()  # once: another job may replace the file
            tensors: dict[str, Any] = load(data)
            facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
            if facts.get("format") != FORMAT:
                raise TransferConfigError(
                    f"{path} is not a selection of this version: format {facts.get('format')}, this one reads "
                    f"{FORMAT}. Delete it and select again."
                )
            if (
                set(tensors) != set(TENSORS)
                or "fingerprint" not in facts
                or facts.get("checksum") != _checksum(tensors, facts)
            ):
                raise TransferConfigError(f"{path} is damaged: its checksum is wrong. Delete it and select again.")
            return cls(fingerprint=json.loads(facts["fingerprint"]), **tensors)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        target: Dataset[Any] | None = None,
        source: Dataset[Any] | None = None,
        target_names: Any = None,
        source_names: Any = None,
    ) -> "Figure":
        """Draw a page: target images with the images they borrow, the most borrowed images, and the classes used.

        Args:
            path: of the picture; its ending decides the format.
            target: the target's images, if the selection was loaded from a file.
            source: the source's images, if the selection was loaded from a file.
            target_names: names of the target's classes; by default `target.classes`, if it has them.
            source_names: the same of the source.

        Returns:
            The figure that was written.

        Raises:
            TransferConfigError: the images are missing, or matplotlib is not installed.
        """
        from lightning_transfer.reports.borrowed import borrowed_images

        target = self.target if target is None else target
        source = self.source if source is None else source
        if target is None or source is None:
            raise TransferConfigError("A loaded selection has no images: report(path, target=..., source=...).")
        return borrowed_images(
            self.indices,
            self.distances,
            path,
            target_image=_viewer(target, "target", self.target_labels),
            source_image=_viewer(source, "source", self.source_labels),
            target_labels=self.target_labels,
            source_labels=self.source_labels,
            duplicates=self.duplicates,
            target_names=known_names(target) if target_names is None else target_names,
            source_names=known_names(source) if source_names is None else source_names,
        )


def _viewer(data: Dataset[Any], name: str, labels: Tensor) -> Any:
    pictures = data if isinstance(data, Pictures) else Pictures(data, name)
    if len(pictures) != len(labels):
        raise TransferConfigError(
            f"The {name} has {len(pictures):,} images; it had {len(labels):,} when the selection was made. Pass those."
        )

    def view(index: int) -> Any:
        pixels = apart(lambda: pictures[index].pixels, pictures.num_workers)
        if isinstance(pixels, str):
            raise TransferConfigError(f"{name} image {index} cannot be shown: {pixels}")
        return for_display(pixels)

    return view


def _checksum(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    return checksum([tensors, facts.get("format"), facts.get("fingerprint")])
