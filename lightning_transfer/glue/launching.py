"""Start processes with Lightning's Fabric, or join those that torchrun or a cluster has started."""

import importlib
import os
from typing import Any

import torch

from lightning_transfer.errors import TransferConfigError


def launch(options: dict[str, Any]) -> torch.device:
    """Join the other processes, if there are any, and return this one's device.

    Args:
        options: of Fabric: accelerator, devices, num_nodes, strategy.

    Raises:
        TransferConfigError: Fabric refuses the options, or more processes were started than the options say.
    """
    try:
        fabric_class = importlib.import_module("lightning.fabric").Fabric
    except ModuleNotFoundError:
        fabric_class = importlib.import_module("lightning_fabric").Fabric
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # under torchrun
    try:
        fabric = fabric_class(**{"accelerator": "auto", "devices": local, "num_nodes": world // local, **options})
    except Exception as error:  # of many types, Lightning's own among them
        raise TransferConfigError(f"Fabric does not take fabric={options}: {error}") from error
    fabric.launch()
    if fabric.world_size < world:
        raise TransferConfigError(
            f"{world} processes were started, fabric is for {fabric.world_size}: each would do all the work. Leave "
            "devices and num_nodes out of fabric, or start one process."
        )
    device: torch.device = fabric.device
    return device
