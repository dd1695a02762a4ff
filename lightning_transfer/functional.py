"""Every method's maths as plain functions; needs no Lightning."""

from lightning_transfer.methods.soft.functional import joint_loss
from lightning_transfer.schedules import anneal

__all__ = ["anneal", "joint_loss"]
