"""Keep the pretrained statistics of BatchNorm in training, as the authors' code of LP-FT does (arXiv 2202.10054)."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.compiling import uncompiled_path
from lightning_transfer.errors import TransferConfigError, check_positive
from lightning_transfer.glue.checkpoints import KEY
from lightning_transfer.glue.logs import is_log_due, log_options, say
from lightning_transfer.glue.namespaces import AnyCallback, is_lightnings
from lightning_transfer.glue.trainer import Weakly, check_supported, is_running, named
from lightning_transfer.naming import options_of, plain
from lightning_transfer.normalizing import are_new, has_moved, is_new, normalizing_layers
from lightning_transfer.stamps import stamped, unstamped


class FrozenStatistics(AnyCallback):
    """Let BatchNorm layers normalise by their pretrained statistics in training too; their weights are trained.

    In usual training, BatchNorm normalises by the mean and variance of each batch. A pretrained network that is given
    images of another task then has much worse features than in evaluation. With this callback, training begins with
    the features of evaluation, and the running statistics do not change. The authors of LP-FT train with the whole
    network in eval mode; that dropout works as usual is ours. Layers whose statistics are those of a new layer (mean 0,
    variance 1), such as those of a head of yours, are trained as usual.

    Without the statistics of the batch, training is less stable and can fail at a usual learning rate. So the gradient
    is clipped (ours).

    Args:
        gradient_clip_val: the Trainer's `gradient_clip_val` during this training, if it has none, optimization is
            automatic and the module has no `configure_gradient_clipping`. None does not clip, and needs a low learning
            rate: with an ImageNet network and SGD, training failed at .01. A fused optimizer in 16-mixed precision
            needs None.

    Raises:
        TransferConfigError: an option or the strategy is not valid; before the first step, if no BatchNorm layer has
            pretrained statistics, a layer of the resumed run or of an earlier fit is not there, the Trainer has
            `StochasticWeightAveraging`, or another Trainer is using the callback; in training, if the network was
            replaced, something has put the layers into training mode, or statistics changed.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FrozenStatistics()])
    """

    def __init__(self, *, gradient_clip_val: float | None = 1.0) -> None:
        if gradient_clip_val is not None:
            check_positive("gradient_clip_val", gradient_clip_val)
        self.gradient_clip_val = gradient_clip_val
        self._module, self._trainer = Weakly(), Weakly()  # of the last fit
        self._is_kept: dict[str, bool] = {}  # by the layer's name, from the first step on
        self._layers: dict[str, nn.Module] = {}  # those that are kept, during a fit
        self._changed: dict[str, tuple[nn.Module, bool]] = {}  # put in eval mode: its parent, and that one's mode then
        self._means: dict[str, Tensor] = {}  # that the layers had when training started
        self._is_checked = True  # whether the layers are known to be the module's
        self._clips = False  # whether the Trainer has our limit now

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be combined, and forget the layers of another module."""
        if stage != "fit":
            return
        check_supported(trainer)
        for other in named(trainer.callbacks, {"StochasticWeightAveraging"}):
            raise TransferConfigError(
                f"{other} computes the statistics of BatchNorm anew, which FrozenStatistics prevents. Leave one out, "
                "or use WeightAveraging."
            )
        other = self._trainer.get()
        if other is not None and other is not trainer and is_running(other):
            raise TransferConfigError(
                "FrozenStatistics is in the middle of another Trainer's fit. Give each Trainer its own."
            )
        if not self._module.is_of(pl_module):
            self._is_kept = {}
        self._module, self._trainer = Weakly(pl_module), Weakly(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers with pretrained statistics, and put them in eval mode."""
        self._find(trainer, pl_module)
        self._clip(trainer, pl_module)
        self._freeze(pl_module)
        self._means = {path: torch.as_tensor(layer.running_mean).clone() for path, layer in self._layers.items()}
        self._is_checked = False  # on_train_start of the module, which is called later, may replace the network

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the layers in eval mode, because a hook of the user's may have called `train()`.

        Raises:
            TransferConfigError: the network was replaced.
        """
        is_due, self._is_checked = not (self._is_checked and batch_idx), True
        there = {uncompiled_path(path): layer for path, layer in pl_module.named_modules()} if is_due else {}
        others = (path for path, layer in self._layers.items() if there.get(uncompiled_path(path)) is not layer)
        if there and (moved := next(others, None)):
            raise TransferConfigError(
                f"{moved!r} is not the layer that it was when training started, so FrozenStatistics cannot keep its "
                f"statistics. Build the network in __init__ or configure_model of {type(pl_module).__name__}."
            )
        self._freeze(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refuse what puts the layers in training mode in the middle of a step.

        Raises:
            TransferConfigError: one is in training mode.
        """
        if moved := next((path for path, layer in self._layers.items() if layer.training), None):
            raise TransferConfigError(
                f"{moved!r} is in training mode at the end of a step, so FrozenStatistics cannot keep its statistics. "
                f"{type(pl_module).__name__} or a callback calls train() in on_train_batch_start or in training_step: "
                "call it in on_train_epoch_start."
            )
        if is_log_due(trainer):
            self._check_statistics()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put everything back, and refuse statistics that changed since the last step that logs."""
        try:
            self._check_statistics()
        finally:
            self._put_back(trainer)

    def _put_back(self, trainer: Any) -> None:
        """Put the layers back into training mode, if the module around them is, and take the limit from the Trainer."""
        for path, (around, was_training) in self._changed.items():
            # not True: a hook, or an interrupted validation, may have called eval()
            self._layers[path].training = around.training or not was_training
        self._layers, self._changed, self._means = {}, {}, {}
        if self._clips:
            trainer.gradient_clip_val, self._clips = None, False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put everything back if training did not start or was stopped."""
        if self._trainer.is_of(trainer):
            self._put_back(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put everything back after a crash or Ctrl-C, when Lightning does not call teardown."""
        is_about_it = all(word in str(exception) for word in ("gradient", "clip"))  # Lightning names only the Trainer
        if self._clips and self._trainer.is_of(trainer) and is_about_it:
            exception.add_note(
                "FrozenStatistics has set the Trainer's gradient_clip_val. If your module clips, or the optimizer "
                "cannot, pass FrozenStatistics(gradient_clip_val=None)."
            )
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        """Return which layers are kept: after a step, new statistics cannot be distinguished from pretrained ones."""
        return {KEY: stamped(self._is_kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the layers of a resumed run."""
        self._is_kept = unstamped(state_dict.get(KEY))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layers": {}, "_changed": {}, "_means": {}, "_clips": False}  # a copy is not in a fit

    def _find(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers with pretrained statistics, unless a checkpoint or an earlier fit knows them."""
        found = dict(normalizing_layers(pl_module))
        new = are_new(found)
        names = {path: uncompiled_path(path) for path in found}
        is_kept = {names[path]: self._is_kept.get(names[path], not new[path]) for path in found}
        for name in self._is_kept.keys() - is_kept.keys():
            raise TransferConfigError(
                f"FrozenStatistics knows the layer {name!r} from the checkpoint, or from an earlier fit, and "
                f"{type(pl_module).__name__} does not have it. Resume with the same layers, or pass a new "
                "FrozenStatistics()."
            )
        if not any(is_kept.values()):
            raise TransferConfigError(
                f"FrozenStatistics has nothing to keep: {type(pl_module).__name__} has no BatchNorm layer with "
                f"{'pretrained' if found else 'running'} statistics. "
                f"{'Load pretrained weights, or leave' if found else 'Leave'} it out."
            )
        if renewed := next((path for path, layer in found.items() if is_kept[names[path]] and is_new(layer)), None):
            raise TransferConfigError(
                f"{renewed!r} had pretrained statistics in the checkpoint, or in an earlier fit, and is now a new "
                "BatchNorm. Load pretrained weights, or pass a new FrozenStatistics()."
            )
        self._is_kept = is_kept
        self._layers = {path: layer for path, layer in found.items() if is_kept[names[path]]}
        log_options(trainer, plain({"transfer/FrozenStatistics": options_of(self)}))
        say(trainer, f"FrozenStatistics: {len(self._layers)} of {len(found)} layers keep their statistics.")

    def _check_statistics(self) -> None:
        """Refuse a mean that has changed: a network may normalise by another mode than the layer's own."""
        moved = [has_moved(layer, self._means[path]) for path, layer in self._layers.items()]
        if moved and torch.stack(moved).any():
            path = [*self._layers][[*map(bool, moved)].index(True)]
            raise TransferConfigError(
                f"The statistics of {path!r} changed, which FrozenStatistics is to prevent. Either the network does "
                "not ask the layer's mode (torch.jit.trace, torch.fx, F.batch_norm with another module's mode): then "
                "leave FrozenStatistics out. Or a hook called train() and ran the network: call eval() before it."
            )

    def _freeze(self, module: Any) -> None:
        for path, layer in self._layers.items():
            if layer.training:
                layer.training = False
                around = module.get_submodule(path.rpartition(".")[0])
                self._changed.setdefault(path, (around, around.training))

    def _clip(self, trainer: Any, module: Any) -> None:
        if self.gradient_clip_val is None or trainer.gradient_clip_val is not None:
            return
        if not module.automatic_optimization:
            say(
                trainer,
                f"FrozenStatistics does not clip the gradient, because {type(module).__name__} optimizes manually. In "
                f"training_step call self.clip_gradients(optimizer, gradient_clip_val={self.gradient_clip_val:g}).",
            )
            return
        if not is_lightnings(module.configure_gradient_clipping):  # it may pass a limit, and Lightning refuses two
            say(
                trainer,
                f"FrozenStatistics sets no gradient_clip_val, because {type(module).__name__} has its own "
                "configure_gradient_clipping. If that uses the Trainer's, pass "
                f"Trainer(gradient_clip_val={self.gradient_clip_val:g}).",
            )
            return
        say(
            trainer,
            f"FrozenStatistics: the Trainer's gradient_clip_val is {self.gradient_clip_val:g} in this fit, because it "
            "has none of its own. FrozenStatistics(gradient_clip_val=None) does not clip.",
        )
        trainer.gradient_clip_val, self._clips = self.gradient_clip_val, True
