"""Every method's modules; needs no Lightning."""

from lightning_transfer.methods.adafilter.gate import RecurrentFilterGate
from lightning_transfer.methods.adafilter.modules import GatedBatchNorm2d, GatedConv2d
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.gated.modules import AuxiliaryClassifier, TransferModule

__all__ = [
    "AuxiliaryClassifier",
    "CollaborativeEnsemble",
    "GatedBatchNorm2d",
    "GatedConv2d",
    "RecurrentFilterGate",
    "TransferModule",
]
