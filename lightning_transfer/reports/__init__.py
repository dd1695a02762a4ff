"""Results as pictures; needs the extra `report`."""

from lightning_transfer.reports.borrowed import borrowed_images
from lightning_transfer.reports.curves import learning_curves
from lightning_transfer.reports.gates import gate_map

__all__ = ["borrowed_images", "gate_map", "learning_curves"]
