"""Load a network whose layers were changed, strip a file of everything of this package, or hand a network on."""

from lightning_transfer import callbacks as callbacks  # every kind of changed layers is then known
from lightning_transfer.exporting import export
from lightning_transfer.glue.checkpoints import load_from_checkpoint, strip_checkpoint

__all__ = ["export", "load_from_checkpoint", "strip_checkpoint"]
