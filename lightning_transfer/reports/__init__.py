"""Draw results as pictures and pages; needs the extra `report`."""

from lightning_transfer.reports.borrowed import borrowed_images
from lightning_transfer.reports.curves import learning_curves
from lightning_transfer.reports.gates import gate_map
from lightning_transfer.reports.logged import log_figure
from lightning_transfer.reports.page import TransferReport
from lightning_transfer.reports.search import layer_search

__all__ = ["TransferReport", "borrowed_images", "gate_map", "layer_search", "learning_curves", "log_figure"]
