"""Keep checkpoints free of anything that the user's plain class, or a run without this package, could not load."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
from torch import nn

from lightning_transfer.errors import NoEffectWarning, TransferConfigError, differences
from lightning_transfer.files import reading, write_atomically
from lightning_transfer.naming import a_class
from lightning_transfer.stamps import BEGIN_ANEW, is_stamped, stamped, unstamped
from lightning_transfer.surgery import Structure, rebuild, structures_in

KEY = "lightning_transfer"
EXTRA = "_extra_state"  # torch's key for the result of get_extra_state


class UnsafeCheckpointError(TransferConfigError):
    """Says that a checkpoint holds more than tensors and plain data."""


class TrainingOnly(nn.Module):
    """Holds a part that a run needs and the user's network does not.

    It is not in the state_dict, and loading one ignores it; optimizers, devices and DDP treat it like any module.

    Args:
        owner: the name of the part's callback.
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
        """Return nothing of the part."""
        return OrderedDict() if destination is None else destination


def _forgive_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f"{KEY}_" not in key]


def check_options(name: str, saved: dict[str, str], current: dict[str, str]) -> None:
    """Refuse to resume a run with other options than it was started with.

    Raises:
        TransferConfigError: the options differ; the message lists every difference.
    """
    different = differences(saved, current)
    if different:
        raise TransferConfigError(
            f"{name} resumes with other options: {'; '.join(different)}. Pass the old ones. {BEGIN_ANEW}"
        )


def check_structure(module: Any, checkpoint: dict[str, Any], *, name: str, structure: type[Structure] | None) -> None:
    """Refuse a checkpoint whose network was not changed, or was changed by a callback that is missing.

    Args:
        module: the user's module.
        checkpoint: of the run to resume.
        name: of a callback.
        structure: the kind of layer change that the callback leaves in a network, or None.

    Raises:
        TransferConfigError: the message names the callback, instead of a list of keys that do not fit.
    """
    check_complete(checkpoint, None if structure else module)
    theirs, mine = {spec["kind"] for _, spec in structures_in(checkpoint["state_dict"])}, kinds_in(module)
    if structure is not None and structure.__name__ not in theirs:
        raise TransferConfigError(f"This checkpoint was written without {name}: its layers differ. {BEGIN_ANEW}")
    if theirs - mine:
        raise TransferConfigError(
            f"This checkpoint's network was changed by {_callbacks(theirs - mine)}, which is not in callbacks. Add it "
            f"to callbacks, besides {name}, with the options of the run that wrote the checkpoint. Or use the module "
            "that lightning_transfer.load_from_checkpoint loads."
        )


def kinds_in(module: nn.Module) -> set[str]:
    """Return the kinds of layer changes that a module has."""
    return {type(child).__name__ for child in module.modules() if isinstance(child, Structure)}


def _callbacks(kinds: set[str]) -> str:
    return " and ".join(sorted(Structure.kinds[kind].callback if kind in Structure.kinds else kind for kind in kinds))


def check_complete(checkpoint: dict[str, Any], module: nn.Module | None = None) -> None:
    """Refuse a checkpoint of changed layers whose weights no longer record the changes.

    The user's `on_save_checkpoint` may have removed the records. Without them the layers would not be changed, and a
    load that is not strict would leave the new module with random weights.

    Args:
        checkpoint: to read.
        module: that takes the weights; changes that it already has need no record.

    Raises:
        TransferConfigError: the message names the keys to keep.
    """
    ours = checkpoint.get(KEY)
    changed = ours.get("changed") if isinstance(ours, dict) else None  # older versions do not write it
    found = {spec["kind"] for _, spec in structures_in(checkpoint["state_dict"])}
    found |= set() if module is None else kinds_in(module)
    if isinstance(changed, list) and (lost := {*map(str, changed)} - found):
        raise TransferConfigError(
            f"This checkpoint's network was changed by {_callbacks(lost)}, and its state_dict has no {EXTRA} keys that "
            "say how, so its layers cannot be rebuilt. If on_save_checkpoint or state_dict of your module filters "
            f"keys, keep all that end in {EXTRA!r}, and save the checkpoint again."
        )


def read_layers(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Rebuild the layer changes that a checkpoint records.

    Raises:
        TransferConfigError: the record is missing, or does not fit the module.
    """
    check_complete(checkpoint, module)
    rebuild(module, checkpoint["state_dict"])


def changed_hyperparameters(module: Any) -> list[str]:
    """Return the names of hyperparameters that are networks with changed layers, which a checkpoint pickles whole."""
    networks = ((name, value) for name, value in getattr(module, "hparams", {}).items() if isinstance(value, nn.Module))
    return [name for name, network in networks if any(isinstance(child, Structure) for child in network.modules())]


def hide_optimizer_states(
    optimizers: list[torch.optim.Optimizer], checkpoint: dict[str, Any], *, changed: Iterable[str] = ()
) -> None:
    """Move the optimizer states of training-only parameters in a checkpoint to our own key.

    A run without our callbacks can then resume: its optimizers do not have these parameters. Done once for all
    callbacks, because positions shift.

    Args:
        optimizers: of the run.
        checkpoint: to change in place.
        changed: the kinds of layer changes in the network, for `check_complete`.
    """
    if KEY in checkpoint:
        return
    hidden = []
    for number, optimizer in enumerate(optimizers):
        params = [group["params"] for group in optimizer.param_groups]
        owners = [[getattr(param, "training_only_of", None) for param in inside] for inside in params]
        if not any(map(any, owners)):
            continue
        packed, kept = checkpoint["optimizer_states"][number], []
        for group, (rows, theirs) in enumerate(zip(_rows(packed), owners, strict=True)):
            kept.append([row for row, owner in zip(rows, theirs, strict=True) if owner is None])
            for place, ((name, state), owner) in enumerate(zip(rows, theirs, strict=True)):
                if owner is not None:
                    at = {"optimizer": number, "group": group, "place": place}
                    hidden.append({**at, "owner": owner, "name": name, "state": state})
        checkpoint["optimizer_states"][number] = _with_rows(packed, kept)
    in_order = list(dict.fromkeys(entry["owner"] for entry in hidden))
    checkpoint[KEY] = stamped({"owners": in_order, "optimizer": hidden, "changed": sorted(changed)})


def _rows(packed: dict[str, Any]) -> list[list[tuple[str | None, Any]]]:
    """Return the name and the state of each parameter in each group of an optimizer's state_dict; None for neither."""
    found = []
    for group in packed["param_groups"]:
        names = group.get("param_names", [None] * len(group["params"]))
        states = (packed["state"].get(number) for number in group["params"])
        found.append(list(zip(names, states, strict=True)))
    return found


def _with_rows(packed: dict[str, Any], rows: list[list[tuple[str | None, Any]]]) -> dict[str, Any]:
    """Return an optimizer's state_dict with these parameters in its groups, numbered in order as torch does."""
    numbers, groups = count(), []
    state: dict[int, Any] = {}
    for group, inside in zip(packed["param_groups"], rows, strict=True):
        numbered = {next(numbers): row for row in inside}
        names = {"param_names": [name for name, _ in inside]} if "param_names" in group else {}
        groups.append({**group, "params": list(numbered), **names})
        state |= {number: value for number, (_, value) in numbered.items() if value is not None}
    return {**packed, "state": state, "param_groups": groups}


def unhide_optimizer_states(owners: list[str], checkpoint: dict[str, Any]) -> None:
    """Undo `hide_optimizer_states` for the parts of the callbacks that are present.

    Raises:
        TransferConfigError: another version wrote the checkpoint, or the callbacks are in another order, so that states
            would be swapped.
    """
    if KEY not in checkpoint or "optimizer_states" not in checkpoint:
        return
    ours = unstamped(checkpoint.pop(KEY))
    before = [name for name in ours["owners"] if name in owners]
    now = [name for name in owners if name in before]
    if before != now:
        raise TransferConfigError(f"This run had its callbacks in the order {', '.join(before)}; keep that order.")
    for number, packed in enumerate(checkpoint["optimizer_states"]):
        rows = _rows(packed)
        for entry in ours["optimizer"]:
            if entry["optimizer"] == number and entry["owner"] in owners:
                rows[entry["group"]].insert(entry["place"], (entry["name"], entry["state"]))
        checkpoint["optimizer_states"][number] = _with_rows(packed, rows)


def strip_checkpoint(path: str | os.PathLike[str], out: str | os.PathLike[str], *, weights_only: bool = True) -> None:
    """Write a copy of a checkpoint that holds nothing of this package.

    From the run of a callback, the copy keeps all that is the user's: the network, its optimizers, loops and callbacks.
    From the run of a mixin, it keeps the weights, for a class without the mixin. The file is written whole or not at
    all.

    Args:
        path: the checkpoint.
        out: path of the copy.
        weights_only: False reads any object, such as a network in the hyperparameters, and runs any code in the file:
            only for files that you made, or whose maker you trust.

    Raises:
        TransferConfigError: the file is not a Lightning checkpoint, or holds more than plain data.

    Example:
        >>> import lightning as L, pathlib, tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_transfer.callbacks import SoftFinetuning
        >>> source = {"dataset": [(torch.rand(32), 0)] * 4, "num_classes": 2}
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> soft = SoftFinetuning(source, weight=1.0, head="layer.1")
        >>> module = BoringModel()
        >>> module.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
        >>> trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=soft, enable_checkpointing=False, **quiet)
        >>> trainer.fit(module)
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> trainer.save_checkpoint(folder / "run.ckpt")
        >>> strip_checkpoint(folder / "run.ckpt", folder / "plain.ckpt")
        >>> [list(torch.load(folder / name)["callbacks"]) for name in ("run.ckpt", "plain.ckpt")]
        [['SoftFinetuning'], []]
    """
    for place in (path, out):
        if not isinstance(place, str | os.PathLike):
            raise TransferConfigError(
                f"strip_checkpoint takes two files, not {a_class(place)}: strip_checkpoint('run.ckpt', "
                "'plain.ckpt') reads the first and writes the second."
            )
    if os.path.isfile(out) and not os.path.exists(path):
        raise TransferConfigError(
            f"There is no Lightning checkpoint at {path}, but a file at {out}. If that is the checkpoint, name "
            f"it first: strip_checkpoint({os.fspath(out)!r}, {os.fspath(path)!r})."
        )
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    weights, callbacks = checkpoint["state_dict"], checkpoint.get("callbacks", {})
    if not isinstance(callbacks, dict):
        found = type(callbacks).__name__
        raise TransferConfigError(f"{path} is not a Lightning checkpoint: its 'callbacks' is a {found}, not a dict.")
    for name, spec in structures_in(weights):
        remove = getattr(Structure.kinds.get(spec["kind"]), "remove", "remove_...")
        raise TransferConfigError(
            f"{path} holds a changed network ({spec['kind']} at {name}), which is not a plain network. Load it by "
            f"lightning_transfer.load_from_checkpoint, make it plain by functional.{remove}, and save that."
        )
    check_complete(checkpoint)
    parts = [key.removesuffix(EXTRA) for key, state in weights.items() if key.endswith(EXTRA) and is_stamped(state)]
    ours = [key for key, state in callbacks.items() if isinstance(state, dict) and is_stamped(state.get(KEY))]
    if not (parts or ours or KEY in checkpoint):
        warnings.warn(f"{path} holds nothing of lightning_transfer: copied as it is.", NoEffectWarning, stacklevel=2)
    checkpoint.pop(KEY, None)
    for key in ours:
        del callbacks[key]
    for held in (weights, checkpoint.get("current_model_state", {})):  # Lightning's WeightAveraging writes the second
        for key in [key for key in held if key.startswith(tuple(parts))]:
            del held[key]
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
                "If you made this file or trust its maker, pass weights_only=False; this runs any code in the file, so "
                "never do it with a file that you do not trust. self.save_hyperparameters(ignore=[...]) keeps such "
                "objects out of new checkpoints."
            ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise TransferConfigError(f"{path} is not a Lightning checkpoint: it has no 'state_dict' of named weights.")
    return checkpoint
