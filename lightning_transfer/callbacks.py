"""Every method as a Lightning callback."""

from lightning_transfer.methods.adafilter.callback import AdaFilter
from lightning_transfer.methods.collaborative.callback import CollaborativeFinetuning
from lightning_transfer.methods.gated.callback import GatedTransfer
from lightning_transfer.methods.probe.callback import ProbeStart
from lightning_transfer.methods.selective.callback import SelectiveJointFinetuning
from lightning_transfer.methods.soft.callback import SoftFinetuning
from lightning_transfer.methods.statistics.callback import FrozenStatistics

__all__ = [
    "AdaFilter",
    "CollaborativeFinetuning",
    "FrozenStatistics",
    "GatedTransfer",
    "ProbeStart",
    "SelectiveJointFinetuning",
    "SoftFinetuning",
]
