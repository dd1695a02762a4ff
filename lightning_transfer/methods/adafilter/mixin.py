"""Add AdaFilter to a LightningModule as a mixin, also for manual optimization."""

from typing import Any

from lightning_transfer.glue.mixin import PartMixin, takes_options_of
from lightning_transfer.methods.adafilter.apply import FilterGates, apply_adafilter
from lightning_transfer.methods.adafilter.callback import AdaFilter
from lightning_transfer.methods.adafilter.watching import GateWatch
from lightning_transfer.surgery import SurgeryReport


class AdaFilterMixin(PartMixin):
    """Gate filters inside a LightningModule, as `AdaFilter` does.

    The gates are a part of the network, so the module's own load_from_checkpoint reads its checkpoints. In
    configure_optimizers, self.parameters() includes the gates. To give them a group of their own, use
    `self.filter_gates.parameters()`, and leave parameters with `adafilter.` in their names out of the other groups.

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

    @takes_options_of(AdaFilter)
    def add_adafilter(self, callback: AdaFilter) -> SurgeryReport:
        """Gate the network; call it in `__init__`, after the pretrained weights are loaded.

        It takes the options of `AdaFilter`.

        Returns:
            The convolutions that are gated, and the others with the reason.

        Raises:
            TransferConfigError: an option does not fit, or there is nothing to gate.
        """
        report = apply_adafilter(self, **callback.options)
        self._gate_watches = (callback.make_part(self),)  # in a tuple: not a submodule
        return report

    @property
    def filter_gates(self) -> FilterGates:
        """Return the gates, with their parameters."""
        return self._gate_watch.gates

    @property
    def _gate_watch(self) -> GateWatch:
        watches: tuple[GateWatch] = self._added("_gate_watches", "gates", by="add_adafilter()")
        return watches[0]

    def on_train_start(self) -> None:
        """Check what the optimizers hold."""
        self._gate_watch.check(self._fitting)
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Forget the last step's pass."""
        self._gate_watch.begin(self, batch)
        return super().on_train_batch_start(batch, batch_idx)

    def on_after_backward(self) -> None:
        """Log the share of open gates, before other code can run the network again."""
        self._gate_watch.look(self._fitting)
        super().on_after_backward()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the share here if the backward was not Lightning's."""
        self._gate_watch.look(self._fitting)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_train_end(self) -> None:
        """Forget the last pass."""
        self._gate_watch.detach()
        super().on_train_end()
