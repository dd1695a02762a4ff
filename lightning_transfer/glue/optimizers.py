"""Add new parameters to the user's optimizer, or raise an error that says which line to change."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.standin import StandIn
from lightning_transfer.glue.trainer import named
from lightning_transfer.surgery import path_of


def _held(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    return {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}


def join(made: Any, name: str, part: nn.Module, *, neighbors: Iterable[nn.Parameter]) -> None:
    """Add the parameters of a new part that no optimizer holds to a group of the user's optimizer.

    The group has to exist already: most schedulers are wrong with a group that is added later.

    Args:
        made: what the user's configure_optimizers returned.
        name: the part's name in the module.
        part: the new part.
        neighbors: the parameters whose group, and so whose learning rate, the part shares; the first group if no group
            holds them.

    Raises:
        TransferConfigError: there is no optimizer, or it is LBFGS.
    """
    optimizers = list(_optimizers_in(made))
    check_kind(optimizers)
    held = _held(optimizers)
    missing = {f"{name}.{key}": param for key, param in part.named_parameters() if id(param) not in held}
    if not missing:
        return
    wanted = set(map(id, neighbors))
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    beside = (pair for pair in groups if wanted & {id(param) for param in pair[1]["params"]})
    optimizer, group = next(beside, groups[0])
    group["params"].extend(missing.values())
    if "param_names" in group:
        group["param_names"].extend(missing)
    if optimizer.state:  # some optimizers, such as Adagrad, make their state at once: make the new parameters' state
        optimizer.state.update(type(optimizer)(list(missing.values()), **optimizer.defaults).state)


def _optimizers_in(made: Any) -> Iterable[torch.optim.Optimizer]:
    """Yield every optimizer in what configure_optimizers may return: one, lists, dictionaries, or lists of those."""
    if isinstance(made, torch.optim.Optimizer):
        yield made
    elif isinstance(made, dict):
        yield from _optimizers_in(made.get("optimizer"))
    elif isinstance(made, list | tuple):
        for item in made:
            yield from _optimizers_in(item)


def check_kind(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimizers with which a loss term would be wrong.

    Raises:
        TransferConfigError: there is no optimizer, or it is LBFGS.
    """
    if not any(optimizer.param_groups for optimizer in optimizers):
        raise TransferConfigError("configure_optimizers returns no optimizer, so nothing would be trained. Return one.")
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise TransferConfigError(
            "LBFGS runs the training step several times for each batch, and the term added to its loss would differ "
            "each time. Use SGD or AdamW."
        )


def check_held(trainer: Any, part: nn.Module) -> None:
    """Raise unless the user's optimizers hold a part; a mixin's user has to pass its parameters to an optimizer.

    Raises:
        TransferConfigError: a parameter would never be trained.
    """
    held = _held(trainer.optimizers)
    missing = [key for key, param in part.named_parameters() if param.requires_grad and id(param) not in held]
    if missing:
        name = path_of(trainer.lightning_module, part)
        raise TransferConfigError(
            f"No optimizer holds {name}.{missing[0]}, so it would never be trained. In configure_optimizers write: "
            f"params = [*your_params, *self.{name}.parameters()]"
        )


def why_untrained(trainer: Any, params: Iterable[nn.Parameter]) -> str:
    """Return what to change if no optimizer trains any of these parameters, otherwise "".

    If one of the user's callbacks has frozen them, such as BackboneFinetuning, it may unfreeze them later, so the
    result is "" too.
    """
    held = _held(trainer.optimizers)
    trainable = [id(param) for param in params if param.requires_grad]
    if not held.isdisjoint(trainable):
        return ""
    if trainable:
        return "In configure_optimizers pass self.parameters() to the optimizer."
    if named(trainer.callbacks, {"BaseFinetuning"}):
        return ""
    return "They are frozen now: set requires_grad=True for some of them, or unfreeze them later."


class AsBefore(StandIn):
    """Runs the user's configure_optimizers so that parameters in changed layers have their old names.

    Code that sorts parameters by name, for example into groups with and without weight decay, then still works.

    Args:
        module: the user's module.
        name: of the hook.
        trainer: the Trainer of the run.
        renamed: the prefixes of names in the module now, and their old prefixes.
    """

    def __init__(self, module: Any, name: str, trainer: Any, renamed: Mapping[str, str]) -> None:
        super().__init__(module, name, trainer)
        self.renamed = renamed

    def act(self, *args: Any, **kwargs: Any) -> Any:
        """Return the user's optimizers."""
        paths = {id(child): path for path, child in self.module.named_modules()}
        before = {}
        for path, old in self.renamed.items():
            for name, param in self.module.get_submodule(path).named_parameters():
                before[id(param)] = f"{old}.{name}"
        name_all = nn.Module.named_parameters

        def named_parameters(module: nn.Module, prefix: str = "", *rest: Any, **more: Any) -> Iterator[Any]:
            start = paths.get(id(module))
            for name, param in name_all(module, prefix, *rest, **more):
                old = before.get(id(param))
                inside = f"{start}." if start else ""
                if old is None or start is None or not old.startswith(inside):
                    yield name, param
                else:
                    yield f"{prefix}.{old[len(inside) :]}".lstrip("."), param

        nn.Module.named_parameters = named_parameters  # type: ignore[method-assign, assignment]
        try:
            return self.hook(*args, **kwargs)
        finally:
            nn.Module.named_parameters = name_all  # type: ignore[method-assign]
