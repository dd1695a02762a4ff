"""Add the source loss to the user's training step: its weight, its images, and where a resumed run continues."""

import copy
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_transfer.datasets import collate, load
from lightning_transfer.errors import NoEffectWarning, TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.checkpoints import check_options
from lightning_transfer.glue.entering import Entering, first_layer
from lightning_transfer.glue.first_loss import FirstLoss, refuse_sum
from lightning_transfer.glue.logs import is_log_due, say
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.glue.standin import Before, keep_hooks_out
from lightning_transfer.glue.trainer import Weakly, check_supported
from lightning_transfer.pixel_ranges import Extent
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import apart
from lightning_transfer.roles import find_head, out_width, parameters_before
from lightning_transfer.schedules import Schedule
from lightning_transfer.source.annealing import Annealing
from lightning_transfer.source.checks import check_hyperparameters
from lightning_transfer.source.choosing import Chooser
from lightning_transfer.source.drawing import Drawing
from lightning_transfer.source.first_batch import Evidence, are_equal, introduce, warn_if_not_replaced
from lightning_transfer.source.gap import is_near
from lightning_transfer.source.loss import Mix, fix_for_a_sum, joint_loss, sum_of_zeros
from lightning_transfer.source.measured_gap import data_of, measure_gap
from lightning_transfer.source.passes import SourcePass
from lightning_transfer.source.task import SourceTask
from lightning_transfer.source.view import NetworkView
from lightning_transfer.stamps import stamped, unstamped


class SourceTerm(TransferPart):
    """Holds one run's source task: its head, its stream, and the loss that it adds to a step.

    Args:
        source: the task.
        module: the user's module.
        weight: of the source loss.
        mix: how the losses are combined.
        head: path of the target head, or "auto".
        chooser: decides which source images are drawn; all of them in turn by default.
        measured: whether a domain gap, measured before the first step, decides if the weight is used.

    Raises:
        TransferConfigError: no head is found, or the module already has a source task.
    """

    def __init__(
        self,
        source: SourceTask,
        module: Any,
        *,
        weight: Schedule,
        mix: Mix,
        head: str = "auto",
        chooser: Chooser | None = None,
        measured: bool = False,
    ) -> None:
        super().__init__()
        if any(isinstance(child, SourceTerm) for child in module.modules()):
            raise TransferConfigError(
                f"{type(module).__name__} already has a source task, from its mixin or another callback: a second one "
                "would count the source twice. Leave one out; SelectiveJointFinetuning takes weight=Schedule() to "
                "anneal the source loss."
            )
        self.source = source
        self.chooser = chooser
        self.first_extent: Extent | None = None  # of the first source batch
        self.annealing = Annealing(weight)
        self.measured = measured
        self.gap: float | None = None
        self._looked_at: Weakly | None = None  # the target data that the gap was measured on, in this process
        self.was_asked = False  # whether the step has called joint_loss, or the user was warned that it does not
        self.has_added = False  # to the loss of this step
        self.mix = mix
        target_head = find_head(module, head, probe=lambda: self._probe(module), narrow=not source.keeps_container)
        self.head_path = target_head.path
        types = (param.dtype for param in target_head.module.parameters() if param.is_floating_point())
        self.head = source.make_head(target_head.module, target_head.path).to(next(types, None))
        self._is_kept_twice = source.head is not None and are_equal(self.head, target_head.module)
        self.loss = copy.deepcopy(source.loss)  # a module with buffers moves to the device together with this part
        self.num_classes = out_width(self.head)
        self._options = self.describe()  # once: it reads every listed label, which each checkpoint would repeat
        self.drawing = Drawing(source, self.num_classes)
        self._pass: SourcePass | None = None
        self._batch: Any = None  # of the target, in this step
        self._saved_options: dict[str, str] | None = None
        self._checked_for = Weakly()
        self._first_loss = FirstLoss()
        self._entering = Entering()
        self._first_layer: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not a part of this one
        if self.annealing.most:
            with seeded(source.seed, 0):
                source.check_all_labels(self.num_classes)

    @property
    def introduction(self) -> str:
        """Return the place of the source head."""
        return f"the source task joins at head {self.head_path!r}."

    def neighbors(self, module: Any, name: str) -> Iterable[nn.Parameter]:
        """Return the head's parameters for a new source head, the parameters before the head for a pretrained one."""
        if self.source.head is None:
            return module.get_submodule(self.head_path).parameters()  # type: ignore[no-any-return]
        return parameters_before(module, self.head_path)

    def _probe(self, module: Any) -> None:
        with seeded(self.source.seed, 0):  # loading and running an example must not change the program's random state
            sample = apart(lambda: load(self.source.dataset, 0, of="source"), self.source.num_workers)
            images, _ = self.source.unpack(collate([(0, sample)], of="source"))
            images = images.to(next(module.parameters()).device)  # configure_model may have built it on a GPU
            self.source.forward(module, images) if callable(self.source.forward) else module(images)

    def attach(self, module: Any) -> None:
        """Attach hooks to the head of the user's module."""
        if self._pass is not None:
            self._pass.remove()
        head = find_head(module, self.head_path)
        self._pass = SourcePass(self.source, module, head)
        self._first_layer = first_layer(module, head)

    def detach(self) -> None:
        """Remove the hooks from the user's module, and stop loader workers."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = self.drawing.batch = None
        self._first_layer = ()
        self.drawing.close()

    def check(self, trainer: Any) -> None:
        """Raise or warn, at the start of training, about what is only known now."""
        self._checked_for = Weakly(trainer)
        self._first_loss.reset()
        self.was_asked = False
        check_supported(trainer)
        if trainer.global_step == 0:  # a new run, even if this part was in another one before
            self.drawing.seek(0)
            self._saved_options = self.gap = None
            if self.chooser is not None:
                self.chooser.reset()
        check_hyperparameters(trainer.lightning_module)
        if self._saved_options is not None:
            check_options("The source task", self._saved_options, self._options)
        if self._is_kept_twice and trainer.global_step == 0:
            warn_if_not_replaced(trainer, self.head_path, self.num_classes)
        self._recall_gap(trainer)
        self.annealing.check(trainer)
        if self.annealing.most:
            self.drawing.say_who_reads(trainer)
            if self.chooser is not None:
                self.chooser.check(trainer)
        if reason := optimizers.why_untrained(trainer, parameters_before(trainer.lightning_module, self.head_path)):
            warnings.warn(
                "No parameter before the head is trained, so the source task changes nothing in the target network. "
                f"{reason}",
                NoEffectWarning,
                stacklevel=2,
            )

    def _recall_gap(self, trainer: Any) -> None:
        """Use the gap that was measured before; measure it again in a second fit with other data."""
        is_given = self.chooser is not None and self.chooser.target is not None
        is_other = self._looked_at is not None and not is_given and not self._looked_at.is_of(data_of(trainer))
        if is_other and (self.is_left_out or not self.annealing.is_over):
            if self.is_left_out:
                self.annealing.reset()
            self.gap = None
        elif self.gap is not None:
            goes_on = "without" if self.is_left_out else "with"
            say(trainer, f"Domain gap {self.gap:.2f} when this run began: it continues {goes_on} the source.")

    def check_once(self, trainer: Any) -> None:
        """Check in the first step of a fit: the user's class may override a mixin's hook without calling it."""
        if not self._checked_for.is_of(trainer):
            self.check(trainer)
            keep_hooks_out(trainer)
            # no hook of a module is called after a crash
            stop = Before(trainer.strategy, "teardown", trainer, lambda *_: self._stop(stop))

    def _stop(self, stand_in: Before) -> None:
        """End a mixin's fit."""
        stand_in.remove()
        self.end()
        self.drawing.close()
        self._checked_for = Weakly()

    def begin(self, module: Any, batch: Any) -> None:
        """Prepare the draw of source images; a joint pass appends them to the target's."""
        self._batch, self.has_added = batch, False
        if self.measured and self.gap is None:
            self._decide(measure_gap(self._view(module), self.chooser, self.annealing.schedule))
            self._looked_at = Weakly(data_of(self.trainer))
        if not self._weight(self.trainer):
            return
        if self.chooser is not None:
            try:
                self.drawing.follow(self.chooser.order(self._view(module), self.first_extent))
            except FloatingPointError:
                self.pending.read()  # of a network that gives no numbers, an earlier batch may be the cause
                raise
        if self.source.forward == "joint":
            self._source_pass.arm(lambda: self.drawing.draw(self.trainer, self))
        if batch is not None and self.annealing.most <= 1:
            self._first_loss.listen(module.get_submodule(self.head_path), batch)
        if self.drawing.position == 0:
            self._entering.listen(*self._first_layer)

    def stepped(self, loss: Tensor | None) -> None:
        """Refuse a first loss that is a sum: the source loss is a mean."""
        if loss is not None:
            refuse_sum(loss, self._first_loss.criteria(), to_do=fix_for_a_sum(self.mix))

    def add_to(self, module: Any, loss: Tensor) -> Tensor:
        """Return the step's loss with the source loss added; at weight 0 exactly the step's own loss."""
        trainer = self.trainer
        weight = self._weight(trainer)
        source_loss = self._loss(module) if weight else None
        if is_log_due(trainer):
            values = {"transfer/target_loss": loss.detach(), "transfer/source_weight": torch.tensor(weight)}
            if self.gap is not None:
                values["transfer/domain_gap"] = torch.tensor(self.gap)
            if source_loss is not None:
                chosen = {} if self.chooser is None else self.chooser.values()
                values |= {"transfer/source_loss": source_loss.detach(), **chosen}
            self.log(values)
        if source_loss is not None:
            self.has_added = True
            return joint_loss(loss, source_loss, weight=weight, mix=self.mix)
        return loss + sum_of_zeros(self) if trainer.world_size > 1 else loss

    @property
    def num_joint(self) -> int:
        """Return how many source images are in the step's own pass."""
        return 0 if self._pass is None else self._pass.state.num_source

    def end(self) -> None:
        """Clear the step's state, so that neither the next step nor a validation in between can use it."""
        if self._pass is not None:
            self._pass.disarm()
        self._first_loss.end()
        self._entering.end()
        self._batch = self.drawing.batch = None

    def _decide(self, gap: float) -> None:
        """Keep the weight if the source is near, otherwise set it to 0."""
        self.gap = gap
        self.annealing.turn(on=not self.is_left_out)

    @property
    def is_left_out(self) -> bool:
        """Return whether the source is left out because it is too far."""
        return self.gap is not None and not is_near(self.gap)

    def _weight(self, trainer: Any) -> float:
        """Return the step's weight; at 0 no pass is run, which would still change BatchNorm and the random state."""
        was_over, weight = self.annealing.is_over, self.annealing.now(trainer)
        if self.annealing.is_over and not was_over:
            self.drawing.close()
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
            features = self._source_pass.separate(module, self.drawing.draw(self.trainer, self))
        assert self.drawing.batch is not None
        images, labels, indices = self.drawing.batch
        loss: Tensor = self.loss(self.head(features), labels)
        if loss.ndim:
            raise TransferConfigError(
                f"The source loss has shape {tuple(loss.shape)}; expected a scalar, the mean over its images. "
                "Pass a SourceTask(loss=) that reduces to the mean."
            )
        found = partial(Evidence.of, loss, images, indices, self.trainer.global_step, target=self._batch)
        self.pending.refuse(~torch.isfinite(loss), lambda found: found.error(self.trainer.global_step), found)
        if self.drawing.is_at_first_batch:
            self.pending.read()  # before what is said of the batch, which waits for the device too
            self.first_extent = Extent().see(images.detach())
            loss_now = float(loss.detach())
            seen = {"target": self._batch, "taken": self._entering.taken}
            introduce(self._view(module), self.head, self.loss, loss_now, images, labels, **seen)
        return loss

    def _view(self, module: Any) -> NetworkView:
        batch_size = self.drawing.batch_size(self.trainer)
        return NetworkView(self.trainer, module, self.source, self._source_pass, self.head_path, batch_size)

    @property
    def _source_pass(self) -> SourcePass:
        if self._pass is None:
            raise TransferConfigError("The source task is not attached to a module. Run it in Trainer.fit.")
        return self._pass

    def describe(self) -> dict[str, str]:
        """Return every option that changes what the run computes."""
        weight = self.annealing.describe()
        return {
            **self.source.describe(),
            **({} if self.chooser is None else self.chooser.describe()),
            "source classes": str(self.num_classes),
            "head": self.head_path,
            "mix": self.mix,
            **weight,
            "weight": f"{'if near, ' if self.measured else ''}{weight['weight']}",
        }

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the head's weights."""
        state = {
            **self.drawing.get_state(),
            **self.annealing.get_state(),
            "options": self._options,
            "gap": self.gap,
        }
        return stamped(state if self.chooser is None else {**state, "chosen": self.chooser.get_state()})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Resume a run's state; its options are compared when training starts.

        Raises:
            TransferConfigError: another version of this package wrote the state.
        """
        state = unstamped(state)
        self._checked_for = Weakly()
        self.drawing.set_state(state)
        self.annealing.set_state(state)
        self._saved_options = state["options"]
        self._looked_at, gap = None, state.get("gap")
        if gap is not None:
            self._decide(gap)
        if self.chooser is not None and "chosen" in state:
            self.chooser.set_state(state["chosen"])
