"""Every method's maths as plain functions; needs no Lightning."""

from lightning_transfer.methods.selective.functional import (
    filter_responses,
    neighbor_budget,
    response_histograms,
    symmetric_kl,
    symmetric_kl_neighbors,
)
from lightning_transfer.methods.soft.functional import joint_loss
from lightning_transfer.schedules import anneal

__all__ = [
    "anneal",
    "filter_responses",
    "joint_loss",
    "neighbor_budget",
    "response_histograms",
    "symmetric_kl",
    "symmetric_kl_neighbors",
]
