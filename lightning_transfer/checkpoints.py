"""Load a network whose layers were changed, remove from a checkpoint what this package added, or export a network."""

from lightning_transfer import callbacks as callbacks  # every kind of changed layers is then known
from lightning_transfer.glue.checkpoints import strip_checkpoint
from lightning_transfer.glue.exporting import export
from lightning_transfer.glue.loading import load_from_checkpoint

__all__ = ["export", "load_from_checkpoint", "strip_checkpoint"]
