"""Offer transfer-learning methods for any Lightning project: callbacks, mixins, and plain functions and modules.

Public names load on first use, so that importing the package costs nothing that is not used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_transfer.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_transfer import callbacks as callbacks
    from lightning_transfer import checkpoints as checkpoints
    from lightning_transfer import functional as functional
    from lightning_transfer import metrics as metrics
    from lightning_transfer import mixins as mixins
    from lightning_transfer import nn as nn
    from lightning_transfer import reports as reports
    from lightning_transfer.advising.advice import Advice as Advice
    from lightning_transfer.advising.advise import advise as advise
    from lightning_transfer.advising.ranking import Ranking as Ranking
    from lightning_transfer.advising.ranking import rank_networks as rank_networks
    from lightning_transfer.callbacks import AdaFilter as AdaFilter
    from lightning_transfer.callbacks import CollaborativeFinetuning as CollaborativeFinetuning
    from lightning_transfer.callbacks import FrozenStatistics as FrozenStatistics
    from lightning_transfer.callbacks import GatedTransfer as GatedTransfer
    from lightning_transfer.callbacks import ProbeStart as ProbeStart
    from lightning_transfer.callbacks import SelectiveJointFinetuning as SelectiveJointFinetuning
    from lightning_transfer.callbacks import SoftFinetuning as SoftFinetuning
    from lightning_transfer.checkpoints import export as export
    from lightning_transfer.checkpoints import load_from_checkpoint as load_from_checkpoint
    from lightning_transfer.checkpoints import strip_checkpoint as strip_checkpoint
    from lightning_transfer.errors import NoEffectWarning as NoEffectWarning
    from lightning_transfer.errors import TransferConfigError as TransferConfigError
    from lightning_transfer.examining.doctor import doctor as doctor
    from lightning_transfer.methods.collaborative.search.options import LayerSearch as LayerSearch
    from lightning_transfer.methods.collaborative.search.plan import LayerPlan as LayerPlan
    from lightning_transfer.methods.selective.banks import FilterBank as FilterBank
    from lightning_transfer.methods.selective.borrowing import Borrowing as Borrowing
    from lightning_transfer.methods.selective.options import Neighbors as Neighbors
    from lightning_transfer.methods.selective.scanning import Scan as Scan
    from lightning_transfer.methods.selective.select import select_neighbors as select_neighbors
    from lightning_transfer.methods.selective.selection import Selection as Selection
    from lightning_transfer.methods.soft.knowledge import SourceKnowledge as SourceKnowledge
    from lightning_transfer.mixins import AdaFilterMixin as AdaFilterMixin
    from lightning_transfer.mixins import CollaborativeMixin as CollaborativeMixin
    from lightning_transfer.mixins import GatedTransferMixin as GatedTransferMixin
    from lightning_transfer.mixins import SourceTaskMixin as SourceTaskMixin
    from lightning_transfer.schedules import Schedule as Schedule
    from lightning_transfer.source.task import SourceTask as SourceTask

_HOMES = {
    "advising.advice": ("Advice",),
    "advising.advise": ("advise",),
    "advising.ranking": ("Ranking", "rank_networks"),
    "callbacks": (
        "AdaFilter",
        "CollaborativeFinetuning",
        "FrozenStatistics",
        "GatedTransfer",
        "ProbeStart",
        "SelectiveJointFinetuning",
        "SoftFinetuning",
    ),
    "checkpoints": ("export", "load_from_checkpoint", "strip_checkpoint"),
    "errors": ("NoEffectWarning", "TransferConfigError"),
    "examining.doctor": ("doctor",),
    "methods.collaborative.search.options": ("LayerSearch",),
    "methods.collaborative.search.plan": ("LayerPlan",),
    "methods.selective.banks": ("FilterBank",),
    "methods.selective.borrowing": ("Borrowing",),
    "methods.selective.options": ("Neighbors",),
    "methods.selective.scanning": ("Scan",),
    "methods.selective.select": ("select_neighbors",),
    "methods.selective.selection": ("Selection",),
    "methods.soft.knowledge": ("SourceKnowledge",),
    "mixins": ("AdaFilterMixin", "CollaborativeMixin", "GatedTransferMixin", "SourceTaskMixin"),
    "schedules": ("Schedule",),
    "source.task": ("SourceTask",),
}
_FACES = ("callbacks", "checkpoints", "functional", "metrics", "mixins", "nn", "reports")
_PLACES = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_FACES, *_PLACES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
