"""Every method's modules; needs no Lightning."""

from lightning_transfer.methods.adafilter.gate import RecurrentFilterGate
from lightning_transfer.methods.adafilter.modules import GatedBatchNorm2d, GatedConv2d

__all__ = ["GatedBatchNorm2d", "GatedConv2d", "RecurrentFilterGate"]
