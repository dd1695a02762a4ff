"""How many layers of each network to freeze, found by trying (PeerJ CS 10:e2107).

The swarm, its numbers and what is searched are the authors'. That a candidate is scored on images held out of the
training data, that equal candidates are scored once, and that a search goes on where it was broken off, is ours.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset

from lightning_transfer.errors import (
    NoEffectWarning,
    TransferConfigError,
    check_choice,
    check_count,
    check_number,
    differences,
)
from lightning_transfer.glue import proxy
from lightning_transfer.methods.collaborative.candidates import Candidates
from lightning_transfer.methods.collaborative.plan import Evaluation, LayerPlan
from lightning_transfer.methods.collaborative.strategies import STRATEGIES
from lightning_transfer.progress import Progress, tqdm_progress

if TYPE_CHECKING:
    from lightning_transfer.methods.collaborative.callback import CollaborativeFinetuning


@dataclass(frozen=True)
class LayerSearch:
    """A search for how many convolutions of each network to freeze.

    Each candidate is trained for a few epochs, from the same start and with the same random numbers, on a part of the
    training images, and scored on the rest of them; validation and test data are not touched.

    Args:
        particles: candidates of a round; the authors' 10.
        iterations: rounds behind the first; the authors' 5, so 60 candidates, of which equal ones are trained once.
        proxy_epochs: of each candidate, of which the best counts; the authors' 5.
        seed: of everything random.
        strategy: "swarm", or "tpe" (optuna's, the extra `search`) or "random" with as many candidates.
        validation: share of the training images that is held out, of each class alike; images that the dataset's
            `groups` name together stay together. Of candidates that are right equally often, the one that freezes
            least is taken (ours).
        unaugmented: the training images, in the same order, as validation sees them; by default the training dataset's.
        max_evaluations: how many candidates are trained at most.
        max_seconds: after which no further candidate is begun.
        cache: file that keeps what is finished; a search that was broken off goes on from there, to the same result. It
            knows its networks, images, the Trainer and saved hyperparameters, and is refused for others; when anything
            else of your training has changed, such as an optimizer's constants, name another.

    Raises:
        TransferConfigError: an option is out of range.

    Example:
        >>> LayerSearch(particles=4, iterations=2, cache="search.json").num_candidates
        12
    """

    particles: int = 10
    iterations: int = 5
    proxy_epochs: int = 5
    seed: int = 0
    strategy: Literal["swarm", "tpe", "random"] = "swarm"
    validation: float = 0.2
    unaugmented: Dataset[Any] | None = None
    max_evaluations: int | None = None
    max_seconds: float | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("particles", 1), ("iterations", 0), ("proxy_epochs", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least=least)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_number("validation", self.validation, most=0.9)
        if self.cache is not None and not isinstance(self.cache, str | os.PathLike):
            raise TransferConfigError(f"cache={self.cache!r}; it takes the name of a file.")
        if self.unaugmented is not None and not hasattr(self.unaugmented, "__getitem__"):
            raise TransferConfigError(f"unaugmented={self.unaugmented!r}; it takes the training images as a dataset.")
        if self.max_evaluations is not None:
            check_count("max_evaluations", self.max_evaluations, least=1)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds)

    def trial(self) -> "LayerSearch":
        """One candidate and one epoch, kept nowhere: to see that it runs."""
        return replace(self, particles=1, iterations=0, proxy_epochs=1, cache=None)

    @property
    def num_candidates(self) -> int:
        """How many are asked for."""
        return self.particles * (self.iterations + 1)

    def run(
        self, module: Any, data: Any, using: "CollaborativeFinetuning", *, trainer: Mapping[str, Any] | None = None
    ) -> LayerPlan:
        """Search ahead of training.

        Args:
            module: the LightningModule that is to be trained; a copy is.
            data: its DataModule, or its train loader.
            using: the callback that it is to be trained with.
            trainer: options of the Trainer that trains candidates, such as {"accelerator": "gpu", "devices": 1}.

        Returns:
            The plan, for `CollaborativeFinetuning(..., frozen_layers=plan)`.

        Raises:
            TransferConfigError: the callback or the Trainer's options are something else.
        """
        if not hasattr(using, "candidate") or not isinstance(trainer, Mapping | None):
            raise TransferConfigError(
                f"using is a {type(using).__name__} and trainer a {type(trainer).__name__}; write "
                "LayerSearch().run(module, datamodule, CollaborativeFinetuning([...]), trainer={'accelerator': 'gpu'})."
            )
        trials = proxy.trials_of(module, data, trainer or {}, unaugmented=self.unaugmented)
        return self.search(Candidates(self, module, using, trials), tqdm_progress)

    def search(
        self,
        candidates: Candidates,
        progress: Progress,
        *,
        known: LayerPlan | None = None,
        keep: Callable[[LayerPlan], object] = lambda plan: None,
    ) -> LayerPlan:
        """Ask for candidates, train each of them once, and tell how it did.

        Args:
            candidates: trains and scores them.
            progress: makes a progress bar.
            known: what was found before the same search was broken off.
            keep: told what is found so far, behind each candidate.

        Raises:
            TransferConfigError: the cache is of another search.
        """
        plan = candidates.plan([])
        is_same = known is not None and known.settings == plan.settings
        earlier = [*(known.evaluations if known is not None and is_same else ()), *self._cached(plan)]
        scored = {each.layers: each for each in earlier if each.accuracy is not None}  # what failed may not again
        strategy = STRATEGIES[self.strategy](
            list(candidates.most.values()), particles=self.particles, iterations=self.iterations, seed=self.seed
        )
        began = time.monotonic()
        with progress("Layer search", self.num_candidates, unit="candidates") as step:
            for _ in range(self.num_candidates):
                layers, is_new = strategy.ask(), False
                if layers not in scored:
                    is_late = self.max_seconds is not None and time.monotonic() - began >= self.max_seconds
                    if is_late or (self.max_evaluations is not None and len(scored) >= self.max_evaluations):
                        break
                    scored[layers] = candidates.evaluate(layers)
                    is_new = True
                plan = candidates.plan([*plan.evaluations, scored[layers]])
                strategy.tell(scored[layers].fitness)
                if is_new:
                    keep(plan)
                    if self.cache is not None:
                        plan.save(self.cache)
                step(1, plan.summary)
        _warn_of_nothing(plan, candidates.num_held_out)
        return plan

    def _cached(self, mine: LayerPlan) -> tuple[Evaluation, ...]:
        if self.cache is None or not os.path.exists(self.cache):  # Path's raises on what no path can be
            return ()
        found = LayerPlan.load(self.cache)
        different = differences(found.settings, mine.settings, there="there", here="here")
        if different:
            raise TransferConfigError(
                f"{self.cache} keeps another search: {'; '.join(different)}. Name another file, or remove it."
            )
        return found.evaluations


def _warn_of_nothing(plan: LayerPlan, num_held_out: int) -> None:
    """Warn of a search that could not tell candidates apart."""
    scores = {evaluation.fitness for evaluation in plan.evaluations if evaluation.accuracy is not None}
    tried = {evaluation.layers for evaluation in plan.evaluations}
    if not scores:
        reason = f"all failed: {plan.evaluations[0].failure}" if plan.evaluations else "there was no time for any"
        warnings.warn(f"No candidate has a score, {reason}. Nothing is frozen.", NoEffectWarning, stacklevel=3)
    elif len(scores) == 1 < len(tried):
        warnings.warn(
            f"All {len(tried)} candidates are right on as many of {num_held_out} held-out images ({max(scores):.1%}), "
            "which cannot tell them apart; the one that freezes least is taken. Hold out more: "
            "LayerSearch(validation=...).",
            NoEffectWarning,
            stacklevel=3,
        )
