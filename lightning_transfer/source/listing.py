"""Digest what a dataset lists about all its images, to find changes that reading a few images would miss."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_transfer.datasets import known_labels
from lightning_transfer.stamps import digest

SIZED = 10_000  # files whose sizes are read, at most
HASHED = 2**28  # bytes of images in memory that are read, at most


def listed_by(dataset: Dataset[Any]) -> dict[str, str]:
    """Return digests of what a dataset lists about its images, each with its name; no image is read from disk.

    These are labels, names and sizes of the files in a list `samples` or `imgs`, and images in memory, `tensors` or
    `data`. If the dataset wraps another as its `dataset`, the lists of that one are included.

    >>> list(listed_by(torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4))))
    ['all listed labels', 'all images in memory']
    """
    places, found = np.arange(len(dataset)), _listed_at(dataset, np.arange(len(dataset)))  # type: ignore[arg-type]
    while (inner := getattr(dataset, "dataset", None)) is not None:
        if isinstance(dataset, Subset):
            places = np.asarray(dataset.indices, dtype=int)[places]
        elif not _are_all(dataset, inner):
            break
        dataset = inner
        found = {**_listed_at(dataset, places), **found}
    return found


def _listed_at(dataset: Any, places: np.ndarray[Any, Any]) -> dict[str, str]:
    """Return digests of what a dataset itself lists about the images at some places."""
    found, labels = {}, known_labels(dataset)
    if labels is not None:
        found["all listed labels"] = digest(labels.double()[torch.as_tensor(places)])
    files = _files(dataset)
    if files:
        files = [files[place] for place in places]
        names = ("/".join(file.rsplit(os.sep, 2)[-2:]) for file in files)  # without their folder, which may have moved
        found["all file names"] = digest("\n".join(names))
        some = np.linspace(0, len(files) - 1, min(len(files), SIZED)).astype(int)
        found[f"sizes of {len(some):,} files"] = digest([_size(files[place]) for place in some])
    array = (getattr(dataset, "tensors", None) or [getattr(dataset, "data", None)])[0]
    if _are_numbers(array) and _are_all(dataset, array) and array.nbytes / len(array) * len(places) <= HASHED:
        rows = array[torch.as_tensor(places) if isinstance(array, Tensor) else places]
        found["all images in memory"] = digest(torch.as_tensor(rows))
    return found


def _are_numbers(array: Any) -> bool:
    is_array = isinstance(array, Tensor) or (isinstance(array, np.ndarray) and array.dtype.kind in "biuf")
    return is_array and array.ndim > 0


def _are_all(dataset: Any, listed: Any) -> bool:
    return hasattr(listed, "__len__") and len(listed) == len(dataset) > 0


def _files(dataset: Any) -> list[str] | None:
    """Return the files of all images in order, if a dataset lists them as torchvision's do."""
    for name in ("samples", "imgs"):
        listed = getattr(dataset, name, None)
        if isinstance(listed, list | tuple) and _are_all(dataset, listed):
            firsts = [item[0] if isinstance(item, list | tuple) and item else item for item in listed]
            if all(isinstance(first, str | os.PathLike) for first in firsts):
                return [os.fspath(first) for first in firsts]
    return None


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size  # not the time of the last change, which is new in a copy of the folder
    except OSError:
        return -1
