"""AdaFilter as a mixin: explicit, and for manual optimization too."""

from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.mixin import PartMixin, noted
from lightning_transfer.methods.adafilter.apply import FilterGates, apply_adafilter
from lightning_transfer.methods.adafilter.functional import Estimator
from lightning_transfer.methods.adafilter.modules import Fixed
from lightning_transfer.methods.adafilter.sites import Gated
from lightning_transfer.methods.adafilter.watching import GateWatch
from lightning_transfer.surgery import SurgeryReport


class AdaFilterMixin(PartMixin):
    """Gated filters inside a LightningModule: what `AdaFilter` does, called explicitly.

    The gates are a part of the network, so the module's own load_from_checkpoint reads its checkpoints. In
    configure_optimizers self.parameters() includes them; for a group of their own use `self.filter_gates.parameters()`,
    and leave parameters with `adafilter.` in their names out of the others.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> class Lit(AdaFilterMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 8, 3))
        ...         self.add_adafilter()
        >>> Lit().filter_gates.spec()["convolutions"]
        ['1']
    """

    @noted
    def add_adafilter(
        self,
        *,
        backbone: str = "auto",
        gate_width: int = 128,
        estimator: Estimator | Fixed = "straight_through",
        gate_bias: float = 0.0,
        gated: Gated = None,
        temperature: float = 1.0,
    ) -> SurgeryReport:
        """Gate the network; call it in `__init__`, after the pretrained weights are loaded.

        Args:
            backbone: dotted name of the network to gate, or "auto".
            gate_width: of the gate's state.
            estimator: how a hard choice learns, or one of the baselines that do not learn.
            gate_bias: the value at which the gates' logits start, give or take some hundredths.
            gated: the convolutions to gate; by default all except the stem.
            temperature: of the "gumbel" estimator.

        Returns:
            What was gated, and what was not gated and why.

        Raises:
            TransferConfigError: there is nothing to gate.
        """
        report = apply_adafilter(
            self,  # type: ignore[arg-type]
            backbone=backbone,
            gate_width=gate_width,
            estimator=estimator,
            gate_bias=gate_bias,
            gated=gated,
            temperature=temperature,
        )
        self._gate_watches = (GateWatch(self),)  # type: ignore[arg-type]  # in a tuple: not a submodule
        return report

    @property
    def filter_gates(self) -> FilterGates:
        """Return the gates, with their parameters."""
        return self._gate_watch.gates

    @property
    def _gate_watch(self) -> GateWatch:
        if not hasattr(self, "_gate_watches"):
            raise TransferConfigError(
                f"{type(self).__name__} has no gates. In __init__, after the network is built, call "
                "self.add_adafilter()."
            )
        return self._gate_watches[0]

    def on_train_start(self) -> None:
        """Check what the optimizers hold."""
        self._gate_watch.check(self._fitting)
        super().on_train_start()  # type: ignore[misc]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Forget the last step's pass."""
        self._gate_watch.begin(self, batch)
        parent: int | None = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        return parent

    def on_after_backward(self) -> None:
        """Log the share of open gates, before other code can run the network again."""
        self._gate_watch.look(self._fitting)
        super().on_after_backward()  # type: ignore[misc]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log it here if the backward was not Lightning's."""
        self._gate_watch.look(self._fitting)
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]

    def on_train_end(self) -> None:
        """Forget the last pass."""
        self._gate_watch.detach()
        super().on_train_end()
