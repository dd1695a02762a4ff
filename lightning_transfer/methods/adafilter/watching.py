"""Log what the gates of a network do in training, and warn if they collapse."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.errors import NoEffectWarning
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.logs import is_log_due, log
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.methods.adafilter.apply import FilterGates, gates_of
from lightning_transfer.surgery import path_of

COLLAPSED = 10  # logged steps in a row in which hardly a gate differs from the others
RARE = 0.01  # share of gates that hardly counts (ours)


class GateWatch(TransferPart):
    """Watches the gates in one run.

    Args:
        module: the user's module, gated.
    """

    title = "AdaFilter"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        gates = gates_of(module)
        assert gates is not None  # the caller gated it
        self._watched = (gates,)  # in a tuple: the user's modules are not registered here
        self._num_collapsed = 0
        self._has_looked = False  # in this step
        self.options = {key: str(value) for key, value in gates.spec().items()}

    @property
    def introduction(self) -> str:
        """Return what was gated."""
        return f"gates {len(self.gates.sites)} convolutions."

    @property
    def gates(self) -> FilterGates:
        """Return the gates that are watched."""
        return self._watched[0]

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the gated filters: the gate learns at their rate."""
        return self._tuned()

    def _tuned(self) -> list[nn.Parameter]:
        layers = self.gates.layers
        return [param for layer in layers for part in (layer.tuned, layer.norm) if part for param in part.parameters()]

    def added(self, module: Any) -> dict[str, nn.Module]:
        """Return the gates."""
        return {path_of(module, self.gates): self.gates}

    def renamed(self, module: Any) -> dict[str, str]:
        """Return the new and old names of the tuned filters and norms."""
        path = path_of(module, self.gates.network)
        prefix = f"{path}." if path else ""
        return {prefix + new: prefix + old for new, old in self.gates.renamed().items()}

    def detach(self) -> None:
        """Forget the last pass."""
        if self.gates.gate is not None:
            self.gates.gate.slots.clear()

    def check(self, trainer: Any) -> None:
        """Warn if no gated filter is trained."""
        reason = "" if self.gates.estimator == "all_frozen" else optimizers.why_untrained(trainer, self._tuned())
        if reason:
            warnings.warn(
                "No gated filter is trained. Its two copies stay equal, so AdaFilter changes nothing until one is "
                f"trained. {reason}",
                NoEffectWarning,
                stacklevel=2,
            )
        if self.gates.gate is not None:
            optimizers.check_held(trainer, self.gates)

    def begin(self, module: Any, batch: Any) -> None:
        """Forget the last step's pass: not earlier, because the backward after the step may need what it kept."""
        self.detach()
        self._has_looked = False

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the loss unchanged."""
        self.look(self.trainer)
        return loss

    def look(self, trainer: Any) -> None:
        """Log the share of open gates once in each step in which the Trainer logs."""
        chosen = self.gates.last_gates() if is_log_due(trainer) and not self._has_looked else {}
        self._has_looked = True
        if chosen:
            shares = {f"transfer/tuned/{path}": gates.mean() for path, gates in chosen.items()}
            mean = torch.cat([gates.flatten() for gates in chosen.values()]).mean()
            log(trainer, {"transfer/tuned": mean, **shares})
            self._warn_of_collapse(float(mean))

    def _warn_of_collapse(self, share: float) -> None:
        is_tuned, most = share > 0.5, max(share, 1 - share)
        self._num_collapsed = self._num_collapsed + 1 if most > 1 - RARE else 0
        if self._num_collapsed == COLLAPSED:
            kind, plain = ("tuned", "fine-tuning") if is_tuned else ("frozen", "a fixed feature extractor")
            warnings.warn(
                f"{most:.1%} of the gates chose the {kind} filter, and more than {1 - RARE:.0%} in each of the last "
                f"{COLLAPSED} logged steps: this is {plain} at a higher cost. Pass a "
                f"{'lower' if is_tuned else 'higher'} gate_bias, or give the gates a higher rate.",
                NoEffectWarning,
                stacklevel=2,
            )
