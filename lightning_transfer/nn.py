"""Every method's modules; needs no Lightning."""

from lightning_transfer.methods.adafilter.gate import RecurrentFilterGate
from lightning_transfer.methods.adafilter.modules import GatedBatchNorm2d, GatedConv2d
from lightning_transfer.methods.gated.modules import AuxiliaryClassifier, TransferModule

__all__ = ["AuxiliaryClassifier", "GatedBatchNorm2d", "GatedConv2d", "RecurrentFilterGate", "TransferModule"]
