"""Results as pictures; needs the extra `report`."""

from lightning_transfer.reports.curves import learning_curves

__all__ = ["learning_curves"]
