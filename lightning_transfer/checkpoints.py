"""Checkpoints: load a network whose layers were changed, or strip a file of everything of this package."""

from lightning_transfer import callbacks as callbacks  # every kind of changed layers is then known
from lightning_transfer.glue.checkpoints import load_from_checkpoint, strip_checkpoint

__all__ = ["load_from_checkpoint", "strip_checkpoint"]
