"""Store the descriptors of a source of any size in one file, as whole numbers; a crash keeps finished blocks."""

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.files import write_atomically
from lightning_transfer.methods.selective.descriptors import to_histograms
from lightning_transfer.methods.selective.search import cached

FULL = "Free some disk space, or pass another cache=; finished blocks are used again."
BLOCK = 1024  # images that are written together; a crash loses at most one block


class Store:
    """Keeps a file of counts, (images, filters, bins), and a mark for each finished block.

    An image that could not be read has counts of zero.

    Args:
        folder: of the file; it is created, and shared by all jobs that describe the same images.
        num_images: of the source.
        shape: filters and bins.
        num_positions: the most positions of a filter in an image, which decides the width of a number.

    Raises:
        TransferConfigError: the disk is too small, or the folder cannot be written.
    """

    def __init__(self, folder: Path, num_images: int, shape: tuple[int, int], num_positions: int) -> None:
        self.folder = folder
        self.num_images = num_images
        self.shape = shape
        self.dtype = np.dtype(np.uint16 if num_positions < 2**16 else np.uint32)
        self.row_bytes = shape[0] * shape[1] * self.dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free + self._written()
            if free < self.num_bytes:
                raise TransferConfigError(
                    f"Descriptors of {num_images:,} images take {self.num_bytes / 1e9:.1f} GB; {folder} has "
                    f"{free / 1e9:.1f} GB left. Pass cache= on a larger disk, fewer bins=, or fewer layers of the bank."
                )
            (folder / "counts").touch()
            self._file = (folder / "counts").open("r+b", buffering=0)
        except (OSError, ValueError) as error:  # ValueError: an impossible path
            if isinstance(error, TransferConfigError):
                raise
            raise TransferConfigError(f"Cannot write descriptors to {folder}: {error}. Pass another cache=.") from error

    @property
    def num_bytes(self) -> int:
        """Return the size of the whole file."""
        return self.num_images * self.row_bytes

    def _written(self) -> int:
        file = self.folder / "counts"
        return file.stat().st_blocks * 512 if file.exists() else 0

    def blocks(self) -> list[range]:
        """Return the images of each block."""
        return [range(start, min(start + BLOCK, self.num_images)) for start in range(0, self.num_images, BLOCK)]

    def write(self, number: int, counts: Tensor, labels: Tensor) -> None:
        """Write a block's counts (images, filters, bins), then its labels (images,) and a checksum as its mark.

        Raises:
            TransferConfigError: the disk is full, or the file cannot be written.
        """
        if int(counts.max()) >= 2 ** (8 * self.dtype.itemsize):
            raise TransferConfigError(
                f"Images {number * BLOCK} to {number * BLOCK + len(counts) - 1} have more positions than the target's, "
                "too many to count in 16 bits. Resize the source to the target's size."
            )
        data = counts.cpu().numpy().astype(self.dtype).tobytes()
        mark = labels.numpy().astype(np.int64).tobytes()
        try:
            self._file.seek(number * BLOCK * self.row_bytes)
            if self._file.write(data) != len(data):
                raise OSError("the disk took only a part")
        except OSError as error:
            raise TransferConfigError(f"Cannot write descriptors to {self.folder}: {error}. {FULL}") from error
        content = zlib.crc32(data + mark).to_bytes(4, "big") + mark
        write_atomically(self._mark(number), lambda file: file.write(content), what="descriptors", fix=FULL)

    def _mark(self, number: int) -> Path:
        return self.folder / f"block{number:06d}"

    def finished(self) -> dict[int, Tensor]:
        """Return the labels of finished blocks that are not damaged."""
        found = {}
        for number, images in enumerate(self.blocks()):
            mark = self._mark(number)
            content = mark.read_bytes() if mark.exists() else b""
            if len(content) != 4 + 8 * len(images):
                continue
            self._file.seek(images.start * self.row_bytes)
            data = self._file.read(len(images) * self.row_bytes)
            if zlib.crc32(data + content[4:]).to_bytes(4, "big") == content[:4]:
                found[number] = torch.from_numpy(np.frombuffer(content[4:], np.int64).copy())
        return found

    def counts(self, images: Tensor) -> Tensor:
        """Return (images, filters, bins) counts of chosen images, in rising order."""
        data = np.empty((len(images), *self.shape), dtype=self.dtype)
        start = 0
        for end in [*((images.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(images)]:  # one read for each run
            view: Any = data[start:end].reshape(-1).view(np.uint8)
            self._file.seek(int(images[start]) * self.row_bytes)
            if self._file.readinto(view) != len(view):
                raise OSError(f"{self.folder} has lost the descriptors from image {int(images[start])} on.")
            start = end
        return torch.from_numpy(data)

    def histograms(self, images: Tensor) -> Tensor:
        """Return (images, filters * bins) histograms of chosen images, in rising order."""
        counts = self.counts(images)
        found = torch.empty(len(counts), self.shape[0] * self.shape[1])
        for some in cached(*found.shape):
            to_histograms(counts[some], out=found[some].unflatten(1, self.shape))
        return found

    def close(self) -> None:
        """Close the file; it stays on disk."""
        self._file.close()


class Stored:
    """Gives chosen images of a store as the flat histograms that a search reads.

    Args:
        store: where their counts are.
        images: (rows,) of the store, rising.
    """

    def __init__(self, store: Store, images: Tensor) -> None:
        self.store = store
        self.images = images
        self.shape = store.shape

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self.store.histograms(self.images[start:stop])

    def take(self, rows: Tensor) -> Tensor:
        """Return chosen rows."""
        return self.store.histograms(self.images[rows])
