"""Every method's maths as plain functions; needs no Lightning."""

from lightning_transfer.methods.selective.descriptors import filter_responses, response_histograms
from lightning_transfer.methods.selective.distances import symmetric_kl
from lightning_transfer.methods.selective.functional import neighbor_budget, symmetric_kl_neighbors
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
