"""Transfer-learning methods for anybody's Lightning project: callbacks, mixins, and plain functions and modules.

Public names load on first use, so that importing the package costs nothing that is not used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_transfer.version import __version__

if TYPE_CHECKING:
    from lightning_transfer import callbacks, checkpoints, functional, metrics, mixins, nn, reports
    from lightning_transfer.advising.advice import Advice
    from lightning_transfer.advising.advise import advise
    from lightning_transfer.advising.ranking import Ranking, rank_networks
    from lightning_transfer.callbacks import (
        AdaFilter,
        CollaborativeFinetuning,
        GatedTransfer,
        ProbeStart,
        SelectiveJointFinetuning,
        SoftFinetuning,
    )
    from lightning_transfer.checkpoints import export, load_from_checkpoint, strip_checkpoint
    from lightning_transfer.errors import NoEffectWarning, TransferConfigError
    from lightning_transfer.examining.doctor import doctor
    from lightning_transfer.methods.collaborative.search.options import LayerSearch
    from lightning_transfer.methods.collaborative.search.plan import LayerPlan
    from lightning_transfer.methods.selective.banks import FilterBank
    from lightning_transfer.methods.selective.borrowing import Borrowing
    from lightning_transfer.methods.selective.options import Neighbors
    from lightning_transfer.methods.selective.scanning import Scan
    from lightning_transfer.methods.selective.select import select_neighbors
    from lightning_transfer.methods.selective.selection import Selection
    from lightning_transfer.mixins import AdaFilterMixin, CollaborativeMixin, GatedTransferMixin, SourceTaskMixin
    from lightning_transfer.schedules import Schedule
    from lightning_transfer.source.task import SourceTask

__all__ = [
    "AdaFilter",
    "AdaFilterMixin",
    "Advice",
    "Borrowing",
    "CollaborativeFinetuning",
    "CollaborativeMixin",
    "FilterBank",
    "GatedTransfer",
    "GatedTransferMixin",
    "LayerPlan",
    "LayerSearch",
    "Neighbors",
    "NoEffectWarning",
    "ProbeStart",
    "Ranking",
    "Scan",
    "Schedule",
    "Selection",
    "SelectiveJointFinetuning",
    "SoftFinetuning",
    "SourceTask",
    "SourceTaskMixin",
    "TransferConfigError",
    "__version__",
    "advise",
    "callbacks",
    "checkpoints",
    "doctor",
    "export",
    "functional",
    "load_from_checkpoint",
    "metrics",
    "mixins",
    "nn",
    "rank_networks",
    "reports",
    "select_neighbors",
    "strip_checkpoint",
]

_HOMES = {
    "AdaFilter": "callbacks",
    "AdaFilterMixin": "mixins",
    "Advice": "advising.advice",
    "Borrowing": "methods.selective.borrowing",
    "CollaborativeFinetuning": "callbacks",
    "CollaborativeMixin": "mixins",
    "GatedTransfer": "callbacks",
    "GatedTransferMixin": "mixins",
    "FilterBank": "methods.selective.banks",
    "LayerPlan": "methods.collaborative.search.plan",
    "LayerSearch": "methods.collaborative.search.options",
    "Neighbors": "methods.selective.options",
    "NoEffectWarning": "errors",
    "ProbeStart": "callbacks",
    "Ranking": "advising.ranking",
    "Scan": "methods.selective.scanning",
    "Schedule": "schedules",
    "Selection": "methods.selective.selection",
    "SelectiveJointFinetuning": "callbacks",
    "SoftFinetuning": "callbacks",
    "SourceTask": "source.task",
    "SourceTaskMixin": "mixins",
    "TransferConfigError": "errors",
    "advise": "advising.advise",
    "export": "checkpoints",
    "doctor": "examining.doctor",
    "load_from_checkpoint": "checkpoints",
    "rank_networks": "advising.ranking",
    "select_neighbors": "methods.selective.select",
    "strip_checkpoint": "checkpoints",
}
_FACES = ("callbacks", "checkpoints", "functional", "metrics", "mixins", "nn", "reports")


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
