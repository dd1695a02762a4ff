"""Collaborative fine-tuning as a callback: one line in a Trainer."""

import copy
from typing import Any

import torch.nn.functional as F

from lightning_transfer import ranks
from lightning_transfer.batches import Labels, find_labels
from lightning_transfer.errors import TransferConfigError, check_number
from lightning_transfer.glue import proxy
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.standin import keep_hooks_out
from lightning_transfer.glue.trainer import progress_of, say
from lightning_transfer.methods.collaborative.agreement import Agreement
from lightning_transfer.methods.collaborative.apply import (
    Frozen,
    apply_collaborative,
    as_plan,
    find_ensemble,
    remove_collaborative,
)
from lightning_transfer.methods.collaborative.candidates import Candidates
from lightning_transfer.methods.collaborative.functional import Criterion
from lightning_transfer.methods.collaborative.layer_search import LayerSearch
from lightning_transfer.methods.collaborative.members import Sources, named
from lightning_transfer.methods.collaborative.modules import CollaborativeEnsemble
from lightning_transfer.methods.collaborative.plan import LayerPlan
from lightning_transfer.options import made
from lightning_transfer.stamps import BEGIN_ANEW
from lightning_transfer.surgery import structures_in


class CollaborativeFinetuning(TransferCallback):
    """Tune several pretrained networks together, so that each learns its task and they agree (PeerJ CS 10:e2107).

    The user's network becomes the first of several, whose mean logits are what the module then gives. Each has its own
    loss, and the distance of their logits from the mean is added (the authors'). How many convolutions of each are
    frozen can be given, or searched for as the authors do.

    The networks stay together after fit: `functional.remove_collaborative` leaves one of them, `ensemble.member(name)`
    and `ensemble.best_member()` hand one out. Logs `transfer/disagreement`, `transfer/ensemble_accuracy` and
    `transfer/accuracy/<name>` of training batches, at the Trainer's interval, and `transfer/val_accuracy/<name>`.

    Args:
        sources: the other networks, or names of timm's; in a list (source1, source2, ...), or by name. They are copied,
            and their heads made anew for the target's classes.
        model: dotted name of the user's network, or of what images enter where the head stands apart; "auto" takes the
            part of the module that holds all convolutions.
        weight: of the disagreement (the authors': 0.2).
        frozen_layers: how many convolutions are frozen, counted from the input, by network, the user's being "own";
            or a LayerPlan, or where one was saved.
        search: finds that out, before training.
        loss: the criterion of the module's training step, (B, classes) logits and labels, a mean over images.
        labels: finds the labels in a batch, where that is no (images, labels) and names none.

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
        model: str = "auto",
        weight: float = 0.2,
        frozen_layers: Frozen = None,
        search: LayerSearch | None = None,
        loss: Criterion = F.cross_entropy,
        labels: Labels = find_labels,
    ) -> None:
        named(sources)
        check_number("weight", weight)
        search = made(LayerSearch, search, argument="search")
        if search is not None and not isinstance(search, LayerSearch):
            raise TransferConfigError(f"search={search!r}; it takes a LayerSearch(...).")
        if search is not None and frozen_layers is not None:
            raise TransferConfigError("Give frozen_layers or a search for them, not both.")
        for name, function in (("loss", loss), ("labels", labels)):
            if not callable(function):
                raise TransferConfigError(f"{name}={function!r}; it takes a function.")
        self.sources = sources
        self.model = model
        self.weight = weight
        self.frozen = as_plan(frozen_layers)
        self.search = search
        self.loss = loss
        self.labels = labels
        self.plan = self.frozen if self.frozen.evaluations else None  # what a search has found
        self._unfinished: LayerPlan | None = None  # of a search that was broken off
        self._before: Any = None  # the module that a search tries candidates on
        self._must_search = False

    @property
    def frozen_layers(self) -> dict[str, int]:
        """How many convolutions of which network are frozen, as it was given."""
        return dict(self.frozen.frozen)

    def candidate(self, networks: dict[str, Any], frozen: dict[str, int]) -> "CollaborativeFinetuning":
        """The same, with other layers frozen, and networks that are loaded."""
        twin = CollaborativeFinetuning(networks, model=self.model, weight=self.weight, frozen_layers=frozen)
        twin.loss, twin.labels = self.loss, self.labels
        return twin

    def change_layers(self, trainer: Any, module: Any) -> bool:
        """Put the networks together."""
        self.refuse_mixin(module)
        self._before = None
        found = find_ensemble(module)
        if found is None:
            if self.search is not None and trainer.is_global_zero:
                self._before = copy.deepcopy(module)
            self._must_search = self.search is not None
            apply_collaborative(module, self.sources, model=self.model, frozen_layers=self.frozen)
            return True
        self._must_search = False
        if self.search is not None and self.plan is None:
            raise TransferConfigError(
                f"{type(module).__name__} holds several networks already, with what no search of this callback's has "
                "frozen. Call functional.remove_collaborative(module) first, or give frozen_layers."
            )
        wanted = {name: number for name, number in self.frozen.frozen.items() if number}
        different = [f"sources {theirs}"] if (theirs := found[1].names[1:]) != list(named(self.sources)) else []
        if self.search is None and found[1].frozen != wanted:
            different.append(f"frozen_layers={found[1].frozen}")
        self.refuse_other(module, "holds several networks", different, remove="remove_collaborative")
        return False

    def restore_layers(self, module: Any) -> None:
        """The user's network alone."""
        remove_collaborative(module)

    def read_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Networks that no checkpoint could build are at hand here."""
        kinds = {spec["kind"] for _, spec in structures_in(checkpoint["state_dict"])}
        if CollaborativeEnsemble.__name__ in kinds and find_ensemble(module) is None:
            apply_collaborative(module, self.sources, model=self.model)
        super().read_layers(module, checkpoint)

    def resume_layers(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """What a search has found is not searched for again.

        Raises:
            TransferConfigError: the checkpoint's run has not searched.
        """
        specs = [spec for _, spec in structures_in(checkpoint["state_dict"]) if "frozen" in spec]
        found = find_ensemble(module)
        if self.search is not None and specs and found is not None:
            if "plan" not in checkpoint.get("callbacks", {}).get(self.state_key, {}):
                raise TransferConfigError(
                    f"This checkpoint's run has not searched; it has frozen_layers={specs[0]['frozen']}. Give that in "
                    f"place of search. {BEGIN_ANEW}"
                )
            found[1].freeze(specs[0]["frozen"], getattr(module, "example_input_array", None))
            self._must_search = False

    def before_optimizers(self, trainer: Any, module: Any) -> None:
        """Search, and freeze what was found."""
        if not self._must_search:
            return
        found = find_ensemble(module)
        assert found is not None  # made in setup
        assert self.search is not None
        try:
            data = ranks.from_first(lambda: self._searched(trainer).as_data(), patiently=True)
        except BaseException:
            if self._unfinished is not None:
                number = len({evaluation.layers for evaluation in self._unfinished.evaluations})
                where = "this callback" if self.search.cache is None else self.search.cache
                say(trainer, f"The search was broken off; {number} candidates are kept in {where} for the next fit.")
            raise
        finally:
            self._before, self._must_search = None, False
        self.plan = LayerPlan.from_data(data)
        found[1].freeze(self.plan.frozen, getattr(module, "example_input_array", None))
        say(trainer, f"CollaborativeFinetuning: {self.plan.summary}.")

    def _searched(self, trainer: Any) -> LayerPlan:
        assert self.search is not None
        make, options = proxy.trainer_class(trainer), proxy.options_like(trainer)
        search = self.search.trial() if trainer.fast_dev_run else self.search
        given = {"datamodule": trainer.datamodule, "unaugmented": search.unaugmented}
        trials = proxy.Trials(proxy.train_loader(trainer), make, options, **given)
        candidates = Candidates(search, self._before, self, trials)

        def keep(plan: LayerPlan) -> None:
            self._unfinished = plan

        plan = search.search(candidates, progress_of(trainer), known=self._unfinished, keep=keep)
        self._unfinished = None
        return plan

    def _leave(self, trainer: Any) -> None:
        """Leave, and keep the hooks that stay out of checkpoints, which may hold the network."""
        super()._leave(trainer)
        found = find_ensemble(trainer.lightning_module)
        if found is not None and found[1].is_apart:
            keep_hooks_out(trainer)

    def make_part(self, module: Any) -> Agreement:
        """The loss that the networks share."""
        return Agreement(module, weight=self.weight, loss=self.loss, labels=self.labels)

    def state_dict(self) -> dict[str, Any]:
        """The part's, and what a search has found."""
        state = super().state_dict()
        return state if self.plan is None else {**state, "plan": self.plan.as_data()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict)
        if isinstance(state_dict, dict) and "plan" in state_dict:
            self.plan = LayerPlan.from_data(state_dict["plan"])

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Follow what each network says."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.begin_validation(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count what each has right."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.count(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log it."""
        if (part := self._followed(trainer, pl_module)) is not None:
            part.validated(trainer)

    def _followed(self, trainer: Any, module: Any) -> Agreement | None:
        """The part, unless it is in another Trainer's fit, or of another module."""
        is_ours = any(stand_in.run.is_of(trainer) for stand_in in self._stand_ins)
        return self.part if is_ours and self.part is not None and self.part.of_module.is_of(module) else None

    def __repr__(self) -> str:
        shown = f"weight={self.weight!r}, frozen_layers={dict(self.frozen.frozen) or None!r}, search={self.search!r}"
        return f"CollaborativeFinetuning(sources={list(named(self.sources))!r}, {shown})"
