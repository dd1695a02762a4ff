"""Processes that Lightning's Fabric starts, or finds started by torchrun or a cluster."""

import importlib
from typing import Any

import torch


def launch(options: dict[str, Any]) -> torch.device:
    """Join the other processes, if there are to be any; this one's device.

    Args:
        options: of Fabric: accelerator, devices, num_nodes, strategy.
    """
    try:
        fabric_class = importlib.import_module("lightning.fabric").Fabric
    except ModuleNotFoundError:
        fabric_class = importlib.import_module("lightning_fabric").Fabric
    fabric = fabric_class(**{"accelerator": "auto", "devices": 1, **options})
    fabric.launch()
    device: torch.device = fabric.device
    return device
