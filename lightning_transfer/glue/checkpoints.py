"""What a checkpoint may hold of ours: nothing that the user's plain class, or a run without us, would stumble over."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_transfer.errors import NoEffectWarning, TransferConfigError, differences
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.stamps import BEGIN_ANEW, is_stamped, stamped, unstamped
from lightning_transfer.surgery import Structure, rebuild, structures_in

KEY = "lightning_transfer"
EXTRA = "_extra_state"  # the key that torch gives to what get_extra_state returns

T = TypeVar("T")


class UnsafeCheckpointError(TransferConfigError):
    """A checkpoint holds more than tensors and plain data."""


class TrainingOnly(nn.Module):
    """Holds a part that a run needs and the user's network does not.

    No state_dict shows it, and loading one neither wants nor touches it; optimizers, devices and DDP see it like any.

    Args:
        owner: the name of the callback whose parts these are.
        part: the module to hold.
    """

    is_transfer_part = True

    def __init__(self, owner: str, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        for param in part.parameters():
            param.training_only_of = owner  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(_forgive_missing)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing."""
        return OrderedDict() if destination is None else destination


def _forgive_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{KEY}_" not in key]


def check_options(name: str, saved: dict[str, str], current: dict[str, str]) -> None:
    """Refuse to resume a run under other options than it was started with.

    Raises:
        TransferConfigError: listing every difference.
    """
    different = differences(saved, current)
    if different:
        raise TransferConfigError(
            f"{name} resumes with other options: {'; '.join(different)}. Give the old ones. {BEGIN_ANEW}"
        )


def check_structure(module: Any, checkpoint: dict[str, Any], *, name: str, structure: type[Structure] | None) -> None:
    """Refuse a checkpoint whose network was not changed, or was changed by something that is not there.

    Args:
        module: the user's.
        checkpoint: of a run that is to go on.
        name: of a callback.
        structure: what the callback leaves in a network, or None.

    Raises:
        TransferConfigError: naming the callback, in place of a list of keys that do not fit.
    """
    theirs = {spec["kind"] for _, spec in structures_in(checkpoint["state_dict"])}
    mine = {type(child).__name__ for child in module.modules() if isinstance(child, Structure)}
    if structure is not None and structure.__name__ not in theirs:
        raise TransferConfigError(f"This checkpoint was written without {name}: its layers are others. {BEGIN_ANEW}")
    if theirs - mine:
        kinds = Structure.kinds
        missing = sorted(kinds[kind].callback if kind in kinds else kind for kind in theirs - mine)
        raise TransferConfigError(
            f"This checkpoint's network was changed by {' and '.join(missing)}, which is not in callbacks. Give it "
            f"beside {name}, with the options of the run that wrote the checkpoint. Or use the module that "
            "lightning_transfer.load_from_checkpoint loads."
        )


def changed_hyperparameters(module: Any) -> list[str]:
    """Return which hyperparameters are networks with changed layers, which a checkpoint pickles whole."""
    networks = ((name, value) for name, value in getattr(module, "hparams", {}).items() if isinstance(value, nn.Module))
    return [name for name, network in networks if any(isinstance(child, Structure) for child in network.modules())]


def hide_optimizer_states(optimizers: list[torch.optim.Optimizer], checkpoint: dict[str, Any]) -> None:
    """Take what optimizers remember of training-only parameters out of a checkpoint and put it under our own key.

    A run without our callbacks then resumes: its optimizers have just these parameters fewer. Done once for all
    callbacks, since positions shift.
    """
    if KEY in checkpoint:
        return
    hidden = []
    for number, optimizer in enumerate(optimizers):
        packed = checkpoint["optimizer_states"][number]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        owners = [getattr(param, "training_only_of", None) for param in params]
        if not any(owners):
            continue
        kept = [position for position, owner in enumerate(owners) if owner is None]
        new_number = {position: new for new, position in enumerate(kept)}
        groups = []
        for group_number, group in enumerate(packed["param_groups"]):
            ours = [owners[position] is not None for position in group["params"]]
            for place, position in enumerate(group["params"]):
                if ours[place]:
                    hidden.append(
                        {
                            "optimizer": number,
                            "group": group_number,
                            "place": place,
                            "owner": owners[position],
                            "name": group["param_names"][place] if "param_names" in group else None,
                            "state": packed["state"].get(position),
                        }
                    )
            params = [new_number[position] for position in group["params"] if position in new_number]
            groups.append(_with_params(group, params, _without(group.get("param_names"), ours)))
        state = {new_number[key]: value for key, value in packed["state"].items() if key in new_number}
        checkpoint["optimizer_states"][number] = {**packed, "state": state, "param_groups": groups}
    in_order = list(dict.fromkeys(entry["owner"] for entry in hidden))
    checkpoint[KEY] = stamped({"owners": in_order, "optimizer": hidden})


def _without(items: list[str] | None, drop: list[bool]) -> list[str] | None:
    return None if items is None else [item for item, gone in zip(items, drop, strict=True) if not gone]


def _with_params(group: dict[str, Any], params: list[int], names: list[str] | None) -> dict[str, Any]:
    return {**group, "params": params, **({} if names is None else {"param_names": names})}


def unhide_optimizer_states(owners: list[str], checkpoint: dict[str, Any]) -> None:
    """The inverse of `hide_optimizer_states`, for the parts of the callbacks that are there.

    Raises:
        TransferConfigError: another version's checkpoint, or callbacks in another order, whose states would be swapped.
    """
    if KEY not in checkpoint or "optimizer_states" not in checkpoint:
        return
    ours = unstamped(checkpoint.pop(KEY))
    before = [name for name in ours["owners"] if name in owners]
    now = [name for name in owners if name in before]
    if before != now:
        raise TransferConfigError(f"This run had its callbacks in the order {', '.join(before)}; keep that order.")
    for number, packed in enumerate(checkpoint["optimizer_states"]):
        entries = [entry for entry in ours["optimizer"] if entry["optimizer"] == number and entry["owner"] in owners]
        # every param's state, in order, with the hidden ones back in their places
        groups: list[dict[str, Any]] = []
        states: list[Any] = []
        for group_number, group in enumerate(packed["param_groups"]):
            inside = [packed["state"].get(position) for position in group["params"]]
            names = list(group["param_names"]) if "param_names" in group else None
            for entry in (entry for entry in entries if entry["group"] == group_number):
                inside.insert(entry["place"], entry["state"])
                if names is not None:
                    names.insert(entry["place"], entry["name"])
            first = len(states)
            states += inside
            groups.append(_with_params(group, list(range(first, len(states))), names))
        state = {position: value for position, value in enumerate(states) if value is not None}
        checkpoint["optimizer_states"][number] = {**packed, "state": state, "param_groups": groups}


def strip_checkpoint(path: str | os.PathLike[str], out: str | os.PathLike[str], *, weights_only: bool = True) -> None:
    """Write a copy of a checkpoint without anything of this package in it.

    What remains of a callback's run is the user's own: the network, its optimizers, loops and callbacks. Of a mixin's
    run the weights remain, for a class without the mixin. Written in one move.

    Args:
        path: the checkpoint.
        out: where the copy goes.
        weights_only: False reads any object, such as a network among the hyperparameters, and runs whatever the file
            says: for files that you made, or whose maker you trust.

    Raises:
        TransferConfigError: the file is not a Lightning checkpoint, or holds more than plain data.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    weights, callbacks = checkpoint["state_dict"], checkpoint.get("callbacks", {})
    if not isinstance(callbacks, dict):
        found = type(callbacks).__name__
        raise TransferConfigError(f"{path} is not a Lightning checkpoint: its 'callbacks' is a {found}, not a dict.")
    for name, spec in structures_in(weights):
        raise TransferConfigError(
            f"{path} holds a changed network ({spec['kind']} at {name}), which is not a plain network. Load it by "
            "lightning_transfer.load_from_checkpoint, make it plain by functional.remove_adafilter, "
            "remove_gated_transfer or remove_collaborative, and save that."
        )
    parts = [key.removesuffix(EXTRA) for key, state in weights.items() if key.endswith(EXTRA) and is_stamped(state)]
    ours = [key for key, state in callbacks.items() if is_stamped(state.get(KEY) if isinstance(state, dict) else None)]
    if not (parts or ours or KEY in checkpoint):
        warnings.warn(f"{path} holds nothing of lightning_transfer: copied as it is.", NoEffectWarning, stacklevel=2)
    checkpoint.pop(KEY, None)
    for key in ours:
        del callbacks[key]
    for key in [key for key in weights if key.startswith(tuple(parts))]:
        del weights[key]
    write_atomically(
        out, lambda file: torch.save(checkpoint, file), what="the checkpoint", fix="Pass another path as out."
    )


def read_checkpoint(path: str | os.PathLike[str], *, weights_only: bool) -> dict[str, Any]:
    """Return a Lightning checkpoint on the CPU.

    Raises:
        UnsafeCheckpointError: it holds more than plain data, and `weights_only` is True.
        TransferConfigError: the file is not one.
    """
    with reading(path, what="Lightning checkpoint", fix="Take another copy of it, or name another file."):
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            # torch's words for a class that is not on its list; text that begins with a c is read as a class too
            if "Unsupported global" not in str(error) or not zipfile.is_zipfile(path):
                raise pickle.UnpicklingError("torch.save did not write it so") from error
            raise UnsafeCheckpointError(
                f"{path} holds more than tensors and plain data, often a hyperparameter such as a network or a Path. "
                "If you made this file or trust whoever made it, pass weights_only=False; it then runs whatever the "
                "file says, so never do that with a stranger's. New checkpoints hold none of it with "
                "self.save_hyperparameters(ignore=[...])."
            ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise TransferConfigError(f"{path} is not a Lightning checkpoint: it has no 'state_dict' of named weights.")
    return checkpoint


def load_from_checkpoint(cls: type[T], path: str | os.PathLike[str], **kwargs: Any) -> T:
    """Load a network that was trained with callbacks of this package; otherwise `cls.load_from_checkpoint`.

    Layers that a callback changed are changed again.

    Args:
        cls: the user's LightningModule class.
        path: the checkpoint.
        kwargs: handed to `cls.load_from_checkpoint`. `weights_only=False` reads any object, such as a network among the
            hyperparameters, and runs whatever the file says: for files that you made, or whose maker you trust.

    Raises:
        TransferConfigError: the checkpoint is in a form of another version, or is none.
    """
    checkpoint = read_checkpoint(path, weights_only=kwargs.get("weights_only") is not False)
    if KEY in checkpoint:
        unstamped(checkpoint[KEY])
    if not any(structures_in(checkpoint["state_dict"])):
        loaded: T = cls.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
        return loaded

    class Rebuilt(cls):  # type: ignore[valid-type, misc]
        """The user's class, whose layers are changed when it is built and before weights are loaded."""

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            rebuild(self, checkpoint["state_dict"])
            super().on_load_checkpoint(checkpoint)

    Rebuilt.__name__ = cls.__name__
    rebuilt: T = Rebuilt.load_from_checkpoint(path, **kwargs)
    rebuilt.__class__ = cls
    return rebuilt


def sum_of_zeros(part: nn.Module) -> Tensor:
    """Zero, with every parameter of a part in its graph: DDP waits for each one's gradient in every step."""
    return sum((0.0 * param.sum() for param in part.parameters() if param.requires_grad), torch.zeros(()))
