"""Results as pictures; needs the extra `report`."""

from lightning_transfer.reports.borrowed import borrowed_images
from lightning_transfer.reports.curves import learning_curves

__all__ = ["borrowed_images", "learning_curves"]
