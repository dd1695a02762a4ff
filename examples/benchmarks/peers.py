"""Measure how other packages do the same: rows without a bar, of what is installed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import faiss
import numpy as np
from fits import empty_network
from lightning.pytorch.callbacks import BackboneFinetuning
from measuring import Row, Run, Settings
from selection_costs import ASKED_SLOWLY, Described, against, timed

from lightning_transfer.methods.selective.search import InMemory


class Unfreezing(BackboneFinetuning):
    """Lightning's callback, for a module whose network has another name."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give it the backbone."""
        pl_module.backbone = pl_module.network.body
        super().setup(trainer, pl_module, stage)


@Row("Empty network, Lightning's BackboneFinetuning - plain step", unit="us")
def unfreezing(settings: Settings) -> tuple[Run, Run]:
    """Measure a step while the backbone is frozen."""
    plain = empty_network(settings)
    return replace(plain, callbacks=lambda num_steps: [Unfreezing(unfreeze_backbone_at_epoch=9)]), plain


if find_spec("finetuning_scheduler"):

    @Row("Empty network, finetuning-scheduler - plain step", unit="us")
    def scheduling(settings: Settings) -> tuple[Run, Run]:
        """Measure a step while the backbone is frozen; by epochs only, so without its checkpoints."""
        plain, scheduler = empty_network(settings), import_module("finetuning_scheduler").FinetuningScheduler
        phases = {0: {"params": ["network.fc.*"], "max_transition_epoch": 1}}
        options = {"epoch_transitions_only": True, "restore_best": False, "log_dir": settings.folder}
        return replace(plain, callbacks=lambda num_steps: [scheduler(copy.deepcopy(phases), **options)]), plain


@Row("Neighbors, faiss' Jensen-Shannon / ours", most=5, size="full")
def jensen_shannon(settings: Settings) -> tuple[Run, Run]:
    """Measure another distance by faiss, which our own search uses too."""

    def slow(queries: InMemory, source: InMemory, k: int) -> Callable[[], object]:
        index = faiss.IndexFlat(source.histograms.shape[1], faiss.METRIC_JensenShannon)
        index.add(source.histograms.numpy())
        return lambda: index.search(queries.histograms.numpy(), k)

    return against(settings, slow)


if find_spec("scipy"):
    from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

    @Row("Neighbors, scipy's Jensen-Shannon / ours", most=5, size="full")
    def scipy_distances(settings: Settings) -> tuple[Run, Run]:
        """Compute all distances, then choose the smallest."""

        def slow(queries: InMemory, source: InMemory, k: int) -> Callable[[], object]:
            p, q = queries.histograms.numpy(), source.histograms.numpy()
            return lambda: np.argpartition(cdist(p, q, "jensenshannon"), k - 1)[:, :k]

        return against(settings, slow)


def described(settings: Settings, describe: Callable[[Any, Any, float, float], object], pixels: int) -> tuple[Run, Run]:
    """Return the seconds of an image, filter by filter, by another library and by us."""
    ours = Described(pixels)
    (filters,), ends = ours.bank.buffers(), ours.edges[:, [0, -1]].tolist()
    images, kernels = ours.images[:ASKED_SLOWLY, 0].numpy(), filters[:, 0].numpy()

    def theirs() -> None:
        for image in images:
            for kernel, (low, high) in zip(kernels, ends, strict=True):
                describe(image, kernel, low, high)

    return timed(theirs, parts=len(images)), ours.ours()


def _with_opencv(image: Any, kernel: Any, low: float, high: float) -> object:
    cv2 = import_module("cv2")
    return cv2.calcHist([cv2.filter2D(image, -1, kernel)], [0], None, [20], [low, high])


def _with_scipy(image: Any, kernel: Any, low: float, high: float) -> object:
    from scipy.ndimage import correlate  # type: ignore[import-untyped]

    return np.histogram(correlate(image, kernel), 20, (low, high))


LIBRARIES = {"OpenCV": ("cv2", _with_opencv), "scipy (as scikit-image filters)": ("scipy", _with_scipy)}
for name, (module, describe) in LIBRARIES.items():
    for pixels in (224, 32) if find_spec(module) else ():
        Row(f"Descriptor, {name} / ours, {pixels} pixels", most=5, is_slow=pixels == 224)(
            partial(described, describe=describe, pixels=pixels)
        )
