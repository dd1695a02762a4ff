"""Add collaborative fine-tuning to a Trainer as a callback."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from lightning_transfer import ranks
from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.loaders import train_loader
from lightning_transfer.glue.logs import progress_of, say
from lightning_transfer.glue.standin import keep_hooks_out
from lightning_transfer.glue.trainer import options_like, trainer_class
from lightning_transfer.glue.trials import Trials
from lightning_transfer.methods.collaborative.agreement import Agreement
from lightning_transfer.methods.collaborative.apply import (
    ensemble_of,
    find_ensemble,
    put_together,
    remove_collaborative,
)
from lightning_transfer.methods.collaborative.functional import Criterion
from lightning_transfer.methods.collaborative.members import Sources, by_name
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.search.candidates import Candidates
from lightning_transfer.methods.collaborative.search.loop import search_layers
from lightning_transfer.methods.collaborative.search.options import LayerSearch
from lightning_transfer.methods.collaborative.search.plan import LayerPlan
from lightning_transfer.methods.collaborative.together import Frozen, Together
from lightning_transfer.options import made
from lightning_transfer.stamps import BEGIN_ANEW
from lightning_transfer.surgery import structures_in
from lightning_transfer.twins import copied, only_copies_run


class CollaborativeFinetuning(TransferCallback):
    """Tune several pretrained networks together, so that each learns its task and they agree (PeerJ CS 10:e2107).

    The user's network becomes the first of several, and the module then gives the mean of their logits. Each network
    has its own loss, and the distance of their logits from this mean is added (the authors'). You choose how many
    convolutions of each network are frozen, or a search finds it, as the authors do.

    The networks stay together after fit: `functional.remove_collaborative` keeps one of them, `ensemble.member(name)`
    and `ensemble.best_member()` return a copy of one. Logs `transfer/disagreement`, `transfer/ensemble_accuracy` and
    `transfer/accuracy/<name>` of training batches, at the Trainer's interval, and `transfer/val_accuracy/<name>`.

    Args:
        sources: the other networks, or names of timm models; in a list (source1, source2, ...), or by name. They are
            copied, and get new heads for the target's classes.
        backbone: dotted name of the user's network, without its head if that is apart; "auto" takes the part of the
            module that holds all convolutions.
        weight: of the disagreement (the authors': 0.2).
        frozen_layers: by network, how many convolutions are frozen, counted from the input; the user's network is
            "own". Or a LayerPlan, or the path of a saved one.
        search: finds `frozen_layers` before training.
        loss: the criterion of the module's training step: takes (B, classes) logits and labels, gives a mean over
            images.
        labels: returns the labels of a batch that is not (images, labels) and does not name them.

    Raises:
        TransferConfigError: an option does not fit.

    Example:
        >>> from torch import nn
        >>> CollaborativeFinetuning({"places": nn.Conv2d(3, 4, 1)}, frozen_layers={"own": 9})
        CollaborativeFinetuning(sources=['places'], weight=0.2, frozen_layers={'own': 9}, search=None)
    """

    mixin = "CollaborativeMixin"
    structure = CollaborativeEnsemble
    part: Agreement | None

    def __init__(
        self,
        sources: Sources,
        *,
        backbone: str = "auto",
        weight: float = 0.2,
        frozen_layers: Frozen = None,
        search: LayerSearch | None = None,
        loss: Criterion = F.cross_entropy,
        labels: Labels = find_labels,
    ) -> None:
        self.together = Together(
            sources, backbone=backbone, weight=weight, frozen_layers=frozen_layers, loss=loss, labels=labels
        )
        search = made(LayerSearch, search, argument="search")
        if search is not None and not isinstance(search, LayerSearch):
            raise TransferConfigError(f"search={search!r}; it takes a LayerSearch(...).")
        if search is not None and frozen_layers is not None:
            raise TransferConfigError("Give frozen_layers or a search for them, not both.")
        self.search = search
        self.plan = self.together.plan if self.together.plan.evaluations else None  # what a search has found
        self._unfinished: LayerPlan | None = None  # of an interrupted search
        self._before: Any = None  # the module without other networks, for the candidates of a search
        self._must_search = False

    @property
    def frozen_layers(self) -> dict[str, int]:
        """Return how many convolutions of each network are frozen, as it was given."""
        return dict(self.together.plan.frozen)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options for the loggers."""
        return vars(self.together)

    @staticmethod
    def with_options(together: Together) -> "CollaborativeFinetuning":
        """Return a callback with these options and without a search."""
        callback = CollaborativeFinetuning({})
        callback.together = together
        return callback

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Put the other networks beside the user's."""
        self.refuse_mixin(module)
        self._before = None
        found = find_ensemble(module)
        if found is None:
            if self.search is not None and trainer.is_global_zero:
                self._before = copied(module)
            self._must_search = self.search is not None
            put_together(module, self.together)
            return True
        self._must_search = False
        if self.search is not None and self.plan is None:
            raise TransferConfigError(
                f"{type(module).__name__} holds several networks already, and this callback has not searched which of "
                "their layers to freeze. Call functional.remove_collaborative(module) first, or give frozen_layers."
            )
        theirs = found[1].names[1:]
        different = [f"sources {theirs}"] if theirs != list(by_name(self.together.sources)) else []
        wanted = {name: number for name, number in self.frozen_layers.items() if number}
        if self.search is None and found[1].frozen != wanted:
            different.append(f"frozen_layers={found[1].frozen}")
        self.refuse_other(module, "holds several networks", different, remove="remove_collaborative")
        return False

    def restore_layers(self, module: Any) -> None:
        """Keep only the user's network."""
        remove_collaborative(module)

    def read_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the networks together before the weights are loaded; not all can be rebuilt from a checkpoint."""
        kinds = {spec["kind"] for _, spec in structures_in(checkpoint["state_dict"])}
        if CollaborativeEnsemble.__name__ in kinds and find_ensemble(module) is None:
            put_together(module, replace(self.together, frozen_layers=None))
        super().read_layers(module, checkpoint)

    def resume_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Take what a search has found from the checkpoint, and do not search again.

        Raises:
            TransferConfigError: the checkpoint's run has not searched.
        """
        specs = [spec for _, spec in structures_in(checkpoint["state_dict"]) if "frozen" in spec]
        found = find_ensemble(module)
        if self.search is not None and specs and found is not None:
            if "plan" not in checkpoint.get("callbacks", {}).get(self.state_key, {}):
                raise TransferConfigError(
                    f"This checkpoint's run has not searched; it has frozen_layers={specs[0]['frozen']}. Give that "
                    f"instead of search. {BEGIN_ANEW}"
                )
            found[1].freeze(specs[0]["frozen"], getattr(module, "example_input_array", None))
            self._must_search = False

    def before_optimizers(self, trainer: Any, module: Any) -> None:
        """Search, and freeze the layers that were found."""
        if not self._must_search:
            return
        assert self.search is not None
        try:
            data = ranks.from_first(lambda: self._searched(trainer, module).as_data())
        except BaseException:
            if self._unfinished is not None:
                number = len({evaluation.layers for evaluation in self._unfinished.evaluations})
                place = "this callback" if self.search.cache is None else self.search.cache
                say(trainer, f"The search was interrupted; {number} candidates are kept in {place} for the next fit.")
            raise
        finally:
            self._before, self._must_search = None, False
        self.plan = LayerPlan.from_data(data)
        ensemble_of(module).freeze(self.plan.frozen, getattr(module, "example_input_array", None))
        say(trainer, f"CollaborativeFinetuning: {self.plan.summary}.")

    def _searched(self, trainer: Any, module: Any) -> LayerPlan:
        assert self.search is not None
        make, options = trainer_class(trainer), options_like(trainer)
        search = self.search.trial() if trainer.fast_dev_run else self.search
        given = {"datamodule": trainer.datamodule, "unaugmented": search.unaugmented}
        trials = Trials(train_loader(trainer), make, options, **given)

        def keep(plan: LayerPlan) -> None:
            self._unfinished = plan

        with only_copies_run(module, self._before):
            candidates = Candidates(search, self._before, self.together, trials, self.with_options)
            plan = search_layers(search, candidates, progress_of(trainer), known=self._unfinished, keep=keep)
        self._unfinished = None
        return plan

    def _leave(self, trainer: Any, exception: BaseException | None = None) -> None:
        """Leave; the hooks that stay are kept out of checkpoints, which may hold the network."""
        super()._leave(trainer, exception)
        found = find_ensemble(trainer.lightning_module)
        if found is not None and found[1].is_apart:
            keep_hooks_out(trainer)

    def make_part(self, module: Any) -> Agreement:
        """Return the loss of the networks."""
        return Agreement(module, self.together)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the part, and what a search has found."""
        state = super().state_dict()
        return state if self.plan is None else {**state, "plan": self.plan.as_data()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load_state_dict(state_dict)
        if isinstance(state_dict, dict) and "plan" in state_dict:
            self.plan = LayerPlan.from_data(state_dict["plan"])

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *place: int) -> None:
        """Record each network's logits."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.begin_validation(trainer, pl_module, *place)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count how many images each network has right."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.count(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log each network's accuracy."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.validated(trainer)

    def _followed(self, trainer: Any, module: Any) -> Agreement | None:
        """Return the part, unless it is in another Trainer's fit or of another module."""
        is_ours = any(stand_in.run.is_of(trainer) for stand_in in self._stand_ins)
        return self.part if is_ours and self.part is not None and self.part.of_module.is_of(module) else None

    def __repr__(self) -> str:
        frozen = self.frozen_layers or None
        shown = f"weight={self.together.weight!r}, frozen_layers={frozen!r}, search={self.search!r}"
        return f"CollaborativeFinetuning(sources={list(by_name(self.together.sources))!r}, {shown})"
