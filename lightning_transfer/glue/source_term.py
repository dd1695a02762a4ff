"""The source loss as a term of somebody's training step: on which images, how much, and from where after a resume."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.checkpoints import check_options, sum_of_zeros
from lightning_transfer.glue.choosing import Chooser
from lightning_transfer.glue.first_batch import introduce, non_finite
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.glue.trainer import (
    WeakTrainer,
    check_supported,
    current_value,
    is_log_due,
    log,
    schedule_length,
    to_device,
    train_batch_size,
)
from lightning_transfer.methods.soft.functional import joint_loss
from lightning_transfer.roles import find_head, out_width
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.checks import check_hyperparameters
from lightning_transfer.source.passes import SourcePass, trains_before
from lightning_transfer.source.stream import Order, SourceStream, load, seeded
from lightning_transfer.source.task import SourceTask, name_of, structure
from lightning_transfer.stamps import check_stamp, stamp


class SourceTerm(TransferPart):
    """One run's source task: its head, its stream, and the loss that it adds to a step.

    Args:
        source: the task.
        module: the user's module.
        weight: of the source loss.
        mix: how the losses are joined.
        head: where the target head sits, or "auto".
        chooser: which source images are drawn; all of them in turn by default.

    Raises:
        TransferConfigError: no head is found, or the module has a source task already.
    """

    def __init__(
        self,
        source: SourceTask,
        module: Any,
        *,
        weight: Schedule,
        mix: Literal["add", "convex"],
        head: str = "auto",
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__()
        if any(isinstance(child, SourceTerm) for child in module.modules()):
            raise TransferConfigError(
                f"{type(module).__name__} has a source task already, by its mixin or by another callback: a second one "
                "would count the source twice. Leave one out; SelectiveJointFinetuning takes weight=Schedule() to "
                "anneal what it borrows."
            )
        self.source = source
        self.chooser = chooser
        self.pixel_range: tuple[float, float] | None = None  # of the first source batch
        self._order: Order | None = None
        self.weight = weight
        self.mix = mix
        target_head = find_head(module, head, probe=lambda: self._probe(module), narrow=not source.keeps_container)
        self.head_path = target_head.path
        self.head = source.make_head(target_head.module, target_head.path)
        self.loss = copy.deepcopy(source.loss)  # where it is a module with buffers, it moves to the device with us
        self.num_classes = out_width(self.head)
        self._options = self.describe()  # once: it reads every listed label, and checkpoints are many
        self._stream: SourceStream | None = None
        self._position = 0
        self._pass: SourcePass | None = None
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        self._is_over = False  # whether the weight is 0 for good
        self._num_steps: float | None = None  # of the training that the weight was laid out over
        self._saved_options: dict[str, str] | None = None
        self._checked_for = WeakTrainer()
        self._last_draw: tuple[int, int, int] | None = None
        if weight.start or weight.end:
            with seeded(source.seed, 0):
                source.check_all_labels(self.num_classes)

    @property
    def introduction(self) -> str:
        """Where the source head went."""
        return f"the source task joins at head {self.head_path!r}."

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """A new head learns as fast as the user's head, a pretrained one as what stands in front of it."""
        if self.source.head is None:
            return module.get_submodule(self.head_path).parameters()  # type: ignore[no-any-return]
        return trains_before(module, self.head_path)

    def _probe(self, module: Any) -> None:
        with seeded(self.source.seed, 0):  # neither loading nor running an example may move the program's random state
            images, _ = self.source.unpack(default_collate([load(self.source.dataset, 0)]))
            self.source.forward(module, images) if callable(self.source.forward) else module(images)

    def attach(self, module: Any) -> None:
        """Listen at the head of the user's module."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = SourcePass(self.source, module, find_head(module, self.head_path))

    def detach(self) -> None:
        """Let go of the user's module and of loader workers."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = self._drawn = None
        self._drop_stream()

    def check(self, trainer: Any) -> None:
        """Raise or warn, at the start of training, on what only now is known."""
        self._checked_for = WeakTrainer(trainer)
        check_supported(trainer)
        if trainer.global_step == 0:  # a new run, whatever this part was in before
            self._drop_stream()
            self._saved_options = self._num_steps = self._last_draw = None
            self._position, self._is_over = 0, False
            if self.chooser is not None:
                self.chooser.reset()
        check_hyperparameters(trainer.lightning_module)
        if self._saved_options is not None:
            check_options("The source task", self._saved_options, self._options)
        num_steps = schedule_length(self.weight, trainer)
        if self._num_steps not in (None, num_steps) and not self._is_over:
            raise TransferConfigError(
                f"Training is now {num_steps:.0f} steps long, {self._num_steps:.0f} when this run began: the source "
                "weight would jump. Keep the length, or from the start lay it out in steps: Schedule(until_steps=...)."
            )
        self._num_steps = num_steps
        if self.chooser is not None and (self.weight.start or self.weight.end):
            self.chooser.check(trainer)
        if not optimizers.trains_any(trainer, trains_before(trainer.lightning_module, self.head_path)):
            warnings.warn(
                "No parameter in front of the head is trained, so the source task changes nothing of the target's. "
                "In configure_optimizers give the optimizer self.parameters().",
                NoEffectWarning,
                stacklevel=2,
            )

    def check_once(self, trainer: Any) -> None:
        """Check in the first step of a run, where no hook of a callback's tells of its start."""
        if not self._checked_for.is_of(trainer):
            self.check(trainer)

    def begin(self, module: Any, batch: Any = None) -> None:
        """See to it that the right images are drawn; let a joint pass take them along."""
        if not self._weight(module.trainer):
            return
        if self.chooser is not None:
            order = self.chooser.order(self, module)
            if order is not self._order:
                self._drop_stream()
                self._order = order
        if self.source.forward == "joint":
            self._source_pass.arm(lambda: self._draw(module))

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """The step's loss with the source loss in it; at weight 0 exactly the step's own."""
        trainer = module.trainer
        weight = self._weight(trainer)
        source_loss = self._loss(module) if weight else None
        if is_log_due(trainer):
            values = {"transfer/target_loss": loss.detach(), "transfer/source_weight": torch.tensor(weight)}
            if source_loss is not None:
                chosen = {} if self.chooser is None else self.chooser.values()
                values |= {"transfer/source_loss": source_loss.detach(), **chosen}
            log(trainer, values)
        if source_loss is not None:
            return joint_loss(loss, source_loss, weight=weight, mix=self.mix)
        return loss + sum_of_zeros(self) if trainer.world_size > 1 else loss

    @property
    def num_joint(self) -> int:
        """How many source images are in the step's own pass."""
        return 0 if self._pass is None else self._pass.tap.num_source

    def end(self) -> None:
        """Nothing of a step is left for the next one, or for a validation in between."""
        if self._pass is not None:
            self._pass.disarm()
        self._drawn = None

    def _weight(self, trainer: Any) -> float:
        """The step's weight; at 0 no pass is run, which would still move BatchNorm and the random state.

        Once 0 for good it stays 0, also where training is made longer afterwards.
        """
        if self._is_over:
            return 0.0
        weight = current_value(self.weight, trainer)
        if weight == self.weight.end == 0:
            self._is_over = True
            self._drop_stream()
        return weight

    def _loss(self, module: Any) -> Tensor:
        if self.source.forward == "joint":
            features = self._source_pass.take()
            if features is None:
                raise TransferConfigError(
                    f"forward='joint': the step never ran the network that holds the head {self.head_path!r} with "
                    "gradients. Use forward='separate'; in a mixin, call super().on_train_batch_start() and joint_loss "
                    "once a step."
                )
        else:
            features = self._source_pass.separate(module, self._draw(module))
        assert self._drawn is not None
        images, labels, indices = self._drawn
        loss: Tensor = self.loss(self.head(features), labels)
        if loss.ndim:
            raise TransferConfigError(
                f"The source loss has shape {tuple(loss.shape)}; expected a scalar, the mean over its images. "
                "Pass SourceTask(loss=) that reduces."
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(non_finite(loss, images, indices, module.trainer.global_step))
        if self._stream is not None and self._stream.position == self._stream.batch_size * self._stream.num_ranks:
            self.pixel_range = float(images.detach().min()), float(images.detach().max())
            introduce(self, module, float(loss.detach()), images, labels)
        return loss

    def _draw(self, module: Any) -> Tensor:
        """Draw a source batch, onto the device, and give its images; labels wait until the pass is done."""
        trainer = module.trainer
        draw = trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        if draw == self._last_draw:
            raise TransferConfigError(
                "The training step asked for a second source batch in one step: by an optimizer that runs its closure "
                "twice, or by a second call of joint_loss. Use another optimizer, or call joint_loss once a step."
            )
        self._last_draw = draw
        if self._stream is None:
            self._stream = self._open_stream(trainer)
        indices, samples = self._stream.next_batch()
        try:
            moved = to_device(trainer, samples, hooks=self.source.batch_hooks)
        except Exception as error:
            if self.source.batch_hooks:
                error.add_note(
                    f"This happened while a source batch, {structure(samples)}, went through the batch-transfer hooks. "
                    "If they are not meant for it: SourceTask(batch_hooks=False)."
                )
            raise
        images, labels = self.source.unpack(moved)
        if self.source.has_class_labels:
            self.source.check_labels(labels, self.num_classes, indices)
        self._drawn = images, labels, indices
        return images

    def _open_stream(self, trainer: Any) -> SourceStream:
        """A stream for this fit, now that it is sure to be used."""
        optimizers.check_kind(trainer.optimizers)
        optimizers.check_held(trainer, self)
        share = {"rank": trainer.global_rank, "num_ranks": trainer.world_size}
        stream = SourceStream(self.source, batch_size=self.batch_size(trainer), order=self._order, **share)
        stream.seek(self._position)
        return stream

    def batch_size(self, trainer: Any) -> int:
        """Source images a step: as many as target images where the task does not say."""
        return self.source.batch_size or train_batch_size(trainer)

    def target_logits(self, module: Any, images: Tensor) -> Tensor:
        """What the network as it is says to target images."""
        return self.logits(module, images, module.get_submodule(self.head_path))

    def logits(self, module: Any, images: Tensor, head: nn.Module) -> Tensor:
        """What the network with a head says outside of training: no gradient, no batch statistics, no dropout."""
        layers = [(layer, layer.training) for layer in {*module.modules(), *head.modules()}]
        try:
            for layer, _ in layers:
                layer.training = False  # not by eval(), which is the user's to override
            with torch.no_grad(), module.trainer.precision_plugin.forward_context():
                features = self._source_pass.separate(module, images)
                logits: Tensor = head(features)
        finally:
            for layer, was_training in layers:
                layer.training = was_training
            torch.clear_autocast_cache()  # of weights cast without gradients, which the step would go on with
        return logits

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._position = self._stream.position
            self._stream.close()
            self._stream = None

    @property
    def _source_pass(self) -> SourcePass:
        if self._pass is None:
            raise TransferConfigError("The source task is not attached to a module. Run it in Trainer.fit.")
        return self._pass

    def describe(self) -> dict[str, str]:
        """Every option that decides what the run computes."""
        shape = self.weight.shape
        return {
            **self.source.describe(),
            **({} if self.chooser is None else self.chooser.describe()),
            "source classes": str(self.num_classes),
            "head": self.head_path,
            "mix": self.mix,
            "weight": f"{self.weight.start:g} to {self.weight.end:g}",
            "weight shape": shape if isinstance(shape, str) else name_of(shape),
            "weight until": f"step {self.weight.until_steps}" if self.weight.until_steps else f"{self.weight.until:g}",
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the head's weights."""
        state = {
            **stamp(),
            "position": self._position if self._stream is None else self._stream.position,
            "is_over": self._is_over,
            "num_steps": self._num_steps,
            "options": self._options,
        }
        return state if self.chooser is None else {**state, "chosen": self.chooser.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where a run was left; whether the options still are its options is seen when training starts.

        Raises:
            TransferConfigError: it was another version's run.
        """
        check_stamp(state)
        self._drop_stream()
        self._checked_for, self._last_draw = WeakTrainer(), None
        self._position = state["position"]
        self._is_over = state["is_over"]
        self._num_steps = state["num_steps"]
        self._saved_options = state["options"]
        if self.chooser is not None and "chosen" in state:
            self.chooser.set_state(state["chosen"])
