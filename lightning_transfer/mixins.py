"""Every method as a LightningModule mixin."""

from lightning_transfer.methods.adafilter.mixin import AdaFilterMixin
from lightning_transfer.methods.collaborative.mixin import CollaborativeMixin
from lightning_transfer.methods.gated.mixin import GatedTransferMixin
from lightning_transfer.methods.soft.mixin import SourceTaskMixin

__all__ = ["AdaFilterMixin", "CollaborativeMixin", "GatedTransferMixin", "SourceTaskMixin"]
