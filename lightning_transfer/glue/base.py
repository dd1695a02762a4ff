"""Run the life cycle that all callbacks of this package share, in `lightning` and in `pytorch_lightning`."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import checkpoints, optimizers
from lightning_transfer.glue.copies import warn_of_outdated
from lightning_transfer.glue.dispatcher import StepDispatcher
from lightning_transfer.glue.logs import log_options, say
from lightning_transfer.glue.namespaces import AnyCallback, is_lightnings
from lightning_transfer.glue.optimizers import AsBefore
from lightning_transfer.glue.part import TransferPart, check_pruned
from lightning_transfer.glue.standin import Afterwards, Before, StandIn, WithoutHooks
from lightning_transfer.glue.trainer import check_launcher, check_supported, is_running, named
from lightning_transfer.naming import options_of, plain
from lightning_transfer.stamps import BEGIN_ANEW, check_stamp, stamp
from lightning_transfer.surgery import OnCPU, Structure

# these copy the module in their own setup and then pair parameters by order, so our parts must be there before that
COPYING_CALLBACKS = {"WeightAveraging", "StochasticWeightAveraging"}
# these list parameters in their own setup, which must neither miss changed layers nor include layers of ours
SCHEDULING_CALLBACKS, PRUNING_CALLBACKS = {"FinetuningScheduler"}, {"ModelPruning"}


class TransferCallback(AnyCallback):
    """Changes layers of the user's module permanently, or attaches a part to it during a fit; abstract.

    Layers are changed in `setup`, before weights are loaded and optimizers and DDP exist, or, if the network is built
    later, right after `configure_model`; layers that are already changed stay changed. Outside of fit, only what a
    checkpoint holds is changed. The part joins at the same moment. It attaches to the network when the optimizers are
    made, because the user may replace layers until then, and is removed at the end of the fit. Each run has its own
    part, also if only the module is another one. Other Trainers that use the module or this callback do not affect it.

    A method that only adds to the loss writes `make_part`; its constructor checks the options and keeps each as an
    attribute of the same name, for the loggers. One that changes layers writes `structure`, `change_layers` and
    `restore_layers` too. The callback is pickled and copied before a fit, so it holds plain options alone.
    """

    mixin: str | None = None  # what does the same in manual optimization
    structure: type[Structure] | None = None  # the kind of layer change that it leaves in a network
    part: TransferPart | None = None
    _stand_ins: tuple[StandIn, ...] = ()
    _dispatcher: StepDispatcher | None = None

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Change the network unless it is already changed, and return whether this call did; nothing by default."""
        return False

    def restore_layers(self, module: Any) -> None:
        """Undo the change if the fit does not start."""

    def read_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Change the network in the way a checkpoint's network was changed, to test it."""
        checkpoints.read_layers(module, checkpoint)

    def resume_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Read from a checkpoint, before its weights are loaded, what its run decided; nothing by default."""

    def check_part(self, saved: dict[str, Any]) -> None:
        """Refuse the saved part of a run that this callback cannot resume; nothing by default."""

    def before_optimizers(self, trainer: Any, module: Any) -> None:
        """Called after a checkpoint is loaded, if there is one, and before optimizers and DDP exist."""

    def refuse_mixin(self, module: Any) -> None:
        """Refuse a module that changes its layers itself, with this callback's mixin."""
        if any(cls.__name__ == self.mixin for cls in type(module).__mro__):
            raise TransferConfigError(
                f"{type(module).__name__} has {self.mixin} already. Leave one out, the mixin or the callback."
            )

    def refuse_other(self, module: Any, change: str, different: list[str], *, remove: str) -> None:
        """Refuse a module whose layers are already changed with options other than this callback's."""
        if different:
            raise TransferConfigError(
                f"{type(module).__name__} {change} already, with {', '.join(different)}. Pass the same options to "
                f"{type(self).__name__}, or call functional.{remove}(module) first."
            )

    @abstractmethod
    def make_part(self, module: Any) -> TransferPart:
        """Return what this callback adds to the user's module."""

    @property
    def part_name(self) -> str:
        """Return the name of the part in the user's module."""
        return f"{checkpoints.KEY}_{type(self).__name__}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Change layers and join, if the stage is fit."""
        if stage == "fit":
            check_supported(trainer)
            self._check_free(trainer, pl_module)
            if not pl_module.automatic_optimization:
                raise TransferConfigError(
                    f"{type(pl_module).__name__} uses manual optimization, which {type(self).__name__} does not "
                    f"support. Use {f'lightning_transfer.{self.mixin}' if self.mixin else 'automatic optimization'}."
                )
        try:
            self._join(trainer, pl_module, stage)
        except TransferConfigError as error:
            if not _is_built_later(pl_module):
                raise
            if named(trainer.callbacks, COPYING_CALLBACKS):
                error.add_note("With a callback that copies the module, build the network in __init__.")
                raise
            self._leave(trainer)

            def join(_: Any) -> None:
                with OnCPU():  # as in setup; the parts move with the module
                    self._join(trainer, pl_module, stage)

            self._stand_ins += (Afterwards(pl_module, "configure_model", trainer, join),)

    def _check_free(self, trainer: Any, module: Any) -> None:
        """Refuse to join during another Trainer's fit of this module or with this callback."""
        mine = [] if self._dispatcher is None or self.part is None else [self.part]
        for part in [*mine, *(child for child in module.modules() if isinstance(child, TransferPart))]:
            other = part.run.get()
            if other is not None and other is not trainer and is_running(other):
                raise TransferConfigError(
                    f"{part.title} is in the middle of another Trainer's fit. Fit a copy of the module with its own "
                    f"callbacks: copy.deepcopy(module) and another {type(self).__name__}(...)."
                )

    def _is_in(self, trainer: Any) -> bool:
        """Return whether this is the Trainer whose fit the part is in."""
        return self._dispatcher is not None and self._dispatcher.run.is_of(trainer)

    def _join(self, trainer: Any, module: Any, stage: str) -> None:
        if self._is_in(trainer):  # the user's setup may call configure_model too
            return
        if stage == "fit":
            if hasattr(module, self.part_name):  # the module is a copy made in the middle of a fit
                delattr(module, self.part_name)
            self.check_order(trainer.callbacks)
            self._enter(trainer, module)
        elif not hasattr(module, self.part_name):  # test the checkpoint's network, or the module as it is
            first: Callable[..., None] = partial(checkpoints.check_structure, name=type(self).__name__, structure=None)
            if self.structure is not None:
                first = self.read_layers
            elif any(isinstance(one, TransferCallback) and one.structure for one in trainer.callbacks):
                return  # that callback reads the layers
            self._stand_ins += (Before(module, "on_load_checkpoint", trainer, first),)

    def check_order(self, callbacks: list[Any]) -> None:
        """Refuse callbacks that have to be on the other side of this one in the Trainer's list."""
        name, place, is_layered = type(self).__name__, callbacks.index(self), self.structure is not None
        for other in named(callbacks[:place], COPYING_CALLBACKS):
            raise TransferConfigError(
                f"{other} copies the module before {name} has joined it. Put {name} first in callbacks."
            )
        for other in named(callbacks[:place], SCHEDULING_CALLBACKS if is_layered else set()):
            raise TransferConfigError(
                f"{other} lists the module's parameters before {name} has changed its layers. In callbacks put {name} "
                f"before {other}."
            )
        for other in named(callbacks[place:], PRUNING_CALLBACKS | (set() if is_layered else SCHEDULING_CALLBACKS)):
            raise TransferConfigError(
                f"{other} would include parameters that {name} has added. In callbacks put {other} before {name}."
            )

    def _enter(self, trainer: Any, module: Any) -> None:
        self._check_company(trainer, module)
        if self.structure is not None:
            check_launcher(trainer, type(self).__name__)
        has_changed = self.change_layers(trainer, module)
        check = partial(checkpoints.check_structure, name=type(self).__name__, structure=self.structure)
        self._stand_ins += (
            Before(module, "on_load_checkpoint", trainer, self.resume_layers),
            Before(module, "on_load_checkpoint", trainer, check),
        )
        try:
            self._take_part(trainer, module)
        except Exception:
            if has_changed:
                self.restore_layers(module)
            raise
        if type(self).before_optimizers is not TransferCallback.before_optimizers:
            first = partial(self._before_strategy, trainer, module, has_changed)
            self._stand_ins += (Before(trainer.strategy, "setup", trainer, first),)

    def _before_strategy(self, trainer: Any, module: Any, has_changed: bool, *_: Any) -> None:
        try:
            self.before_optimizers(trainer, module)
        except BaseException:  # also Ctrl-C: a fit that has not started leaves nothing
            if has_changed:
                self.restore_layers(module)
            raise

    def _take_part(self, trainer: Any, module: Any) -> None:
        if self.part is None or trainer.global_step == 0 or not self.part.is_of(trainer, module):
            self.part = self.make_part(module)
        part = self.part
        part.join(trainer, module)
        say(trainer, f"{type(self).__name__}: {part.introduction}")
        self._dispatcher = StepDispatcher.add(module, self.part_name, part, trainer)
        setattr(module, self.part_name, checkpoints.TrainingOnly(type(self).__name__, part))

        def with_optimizers(made: Any) -> None:
            for name, added in {self.part_name: part, **part.added(module)}.items():
                optimizers.join(made, name, added, neighbors=part.neighbors(module, name))
            part.attach(module)

        self._stand_ins += (
            AsBefore(module, "configure_optimizers", trainer, part.renamed(module)),
            Afterwards(module, "configure_optimizers", trainer, with_optimizers),
            Before(module, "configure_optimizers", trainer, self._check_still_there),
            *(Before(module, hook, trainer, part.settle) for hook in ("on_save_checkpoint", "on_train_end")),
            WithoutHooks(trainer),
        )
        # only if the part needs it: each hook takes time in every step
        if type(part).before_optimizer_step is not TransferPart.before_optimizer_step:
            self._stand_ins += (
                Afterwards(module, "on_before_optimizer_step", trainer, lambda _: part.before_optimizer_step(module)),
            )

    def _check_company(self, trainer: Any, module: Any) -> None:
        """Refuse a second callback of this kind, and a method that only works alone together with another one."""
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, TransferCallback)]
        names = [type(callback).__name__ for callback in callbacks]
        if (number := names.count(name := type(self).__name__)) > 1:
            raise TransferConfigError(f"There are {number} {name} in callbacks and configure_callbacks. Keep one.")
        alone = [type(callback).__name__ for callback in callbacks if not getattr(callback.structure, "composes", True)]
        inside = [type(child).__name__ for child in module.modules() if not getattr(child, "composes", True)]
        if (alone and len(callbacks) > 1) or (inside and not alone):
            raise TransferConfigError(
                f"{(alone or inside)[0]} trains several networks as one, and "
                f"{', '.join(name for name in names if name not in alone)} is for one network. Use one of the two."
            )

    def _check_still_there(self, module: Any) -> None:
        if self.structure is not None and not any(isinstance(child, self.structure) for child in module.modules()):
            raise TransferConfigError(
                f"The network was replaced after {type(self).__name__} had changed it. Build it in __init__ or in "
                "configure_model."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Pass this callback's options to the loggers."""
        check_pruned(trainer, pl_module)
        if self.structure is not None and (saved := checkpoints.changed_hyperparameters(pl_module)):
            fix = f"self.save_hyperparameters(ignore={saved})"
            say(trainer, f"Checkpoints hold {saved} with changed layers; only this package can load them. Write {fix}.")
        log_options(trainer, plain({f"transfer/{type(self).__name__}": options_of(self)}))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what is only known now, such as the length of training."""
        assert self.part is not None  # made in setup or after configure_model
        self.part.check(trainer)
        if self.structure is not None:
            warn_of_outdated(type(self).__name__, self.part.renamed(pl_module), trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was found."""
        self._leave(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was found after a crash or Ctrl-C, when Lightning does not call teardown."""
        self._leave(trainer, exception)

    def _leave(self, trainer: Any, exception: BaseException | None = None) -> None:
        """Remove what was added for this Trainer's run."""
        for stand_in in reversed(self._stand_ins):
            if stand_in.run.is_of(trainer):
                stand_in.remove()
        self._stand_ins = tuple(stand_in for stand_in in self._stand_ins if not stand_in.is_removed)
        if self._dispatcher is not None and self.part is not None and self._is_in(trainer):
            module = self._dispatcher.module
            self._dispatcher.discard(self.part_name)
            self._dispatcher = None
            self.part.pending.note(exception)
            self.part.detach()
            delattr(module, self.part_name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stand_ins": (), "_dispatcher": None}  # a copy is not attached to a module

    def state_dict(self) -> dict[str, Any]:
        """Return the part's weights and everything else that its run needs."""
        if self.part is None:
            return {}
        part = dict(self.part.state_dict())
        return {checkpoints.KEY: stamp(part), "part": part}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state; outside of fit it is ignored, and what a fit left is kept."""
        if self.part is not None and self._dispatcher is not None and state_dict != {}:
            state = state_dict if isinstance(state_dict, dict) else {}
            part = state.get("part", {})
            check_stamp(state.get(checkpoints.KEY), part)
            self.check_part(part)
            self.part.load_state_dict(part)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remove our parameters from the optimizer states, so that a run without this callback can resume them."""
        changed = checkpoints.kinds_in(pl_module)
        checkpoints.hide_optimizer_states(trainer.optimizers, checkpoint, changed=changed)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put our parameters back into the optimizer states.

        Raises:
            TransferConfigError: the checkpoint is of a run without this callback.
        """
        if not self._is_in(trainer):
            if self._dispatcher is not None:  # it is in another Trainer's fit, which this state does not belong to
                checkpoint.get("callbacks", {}).pop(self.state_key, None)
            return
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            raise TransferConfigError(
                f"This checkpoint was written without {type(self).__name__}, so its run cannot be resumed with it. "
                f"{BEGIN_ANEW}"
            )
        owners = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, TransferCallback)]
        checkpoints.unhide_optimizer_states(owners, checkpoint)


def _is_built_later(module: Any) -> bool:
    """Return whether the module defines a hook that may build the network after the callbacks' `setup`."""
    theirs = (cls for cls in type(module).__mro__ if not is_lightnings(cls))
    return any(hook in vars(cls) for cls in theirs for hook in ("setup", "configure_model"))
