"""Changes of layers made again from what they left in a checkpoint."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_transfer.errors import TransferConfigError, nearest
from lightning_transfer.methods.adafilter.apply import FilterGates
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.gated.modules import GatedHead
from lightning_transfer.surgery import structures_in

KINDS = {kind.__name__: kind for kind in (FilterGates, GatedHead, CollaborativeEnsemble)}


def rebuild_from(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Change a module's layers as those of a checkpoint were."""
    rebuild(module, checkpoint["state_dict"])


def rebuild(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Change a module's layers as those were whose weights these are.

    Raises:
        TransferConfigError: a change is of a kind that this version does not know.
    """
    for path, spec in structures_in(weights):
        if spec["kind"] not in KINDS:
            raise TransferConfigError(
                f"{path} is a {spec['kind']} of lightning_transfer {spec['version']}. {nearest(spec['kind'], KINDS)}"
            )
        try:
            KINDS[spec["kind"]].rebuild(module, path, spec)
        except (AttributeError, LookupError, TypeError) as error:
            raise TransferConfigError(
                f"The checkpoint's {path!r} has no place in this {type(module).__name__}: {error}. Build the network "
                "in __init__ or configure_model, with the options of the run that wrote it."
            ) from error
