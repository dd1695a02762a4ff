"""Every method's maths as plain functions; needs no Lightning."""

from lightning_transfer.methods.adafilter.apply import apply_adafilter
from lightning_transfer.methods.adafilter.functional import mix_filters, straight_through_gate
from lightning_transfer.methods.adafilter.remove import remove_adafilter
from lightning_transfer.methods.collaborative.apply import apply_collaborative, remove_collaborative
from lightning_transfer.methods.collaborative.functional import collaborative_loss
from lightning_transfer.methods.gated.apply import apply_gated_transfer, remove_gated_transfer
from lightning_transfer.methods.gated.functional import gate_features
from lightning_transfer.methods.selective.descriptors import filter_responses, response_histograms
from lightning_transfer.methods.selective.distances import symmetric_kl
from lightning_transfer.methods.selective.functional import neighbor_budget, symmetric_kl_neighbors
from lightning_transfer.methods.soft.knowledge import knowledge_loss
from lightning_transfer.schedules import anneal
from lightning_transfer.source.gap import domain_gap
from lightning_transfer.source.loss import joint_loss

__all__ = [
    "anneal",
    "apply_adafilter",
    "apply_collaborative",
    "apply_gated_transfer",
    "collaborative_loss",
    "domain_gap",
    "filter_responses",
    "gate_features",
    "joint_loss",
    "knowledge_loss",
    "mix_filters",
    "neighbor_budget",
    "remove_adafilter",
    "remove_collaborative",
    "remove_gated_transfer",
    "response_histograms",
    "straight_through_gate",
    "symmetric_kl",
    "symmetric_kl_neighbors",
]
