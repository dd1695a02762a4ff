"""Search for layers to freeze: ask a strategy for candidates, score each of them once, keep what is finished."""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning_transfer.errors import NoEffectWarning, TransferConfigError, differences
from lightning_transfer.glue.trials import trials_of
from lightning_transfer.methods.collaborative.search.candidates import Candidates
from lightning_transfer.methods.collaborative.search.options import LayerSearch
from lightning_transfer.methods.collaborative.search.plan import Evaluation, LayerPlan
from lightning_transfer.methods.collaborative.search.strategies import STRATEGIES
from lightning_transfer.methods.collaborative.together import Together
from lightning_transfer.naming import a_class
from lightning_transfer.progress import Progress, tqdm_progress


def search_ahead(
    options: LayerSearch, module: Any, data: Any, using: Any, *, trainer: Mapping[str, Any] | None
) -> LayerPlan:
    """Do the work of `LayerSearch.run`."""
    together = getattr(using, "together", None)
    if not isinstance(together, Together) or not isinstance(trainer, Mapping | None):
        raise TransferConfigError(
            f"using is {a_class(using)} and trainer {a_class(trainer)}; write "
            "LayerSearch().run(module, datamodule, CollaborativeFinetuning([...]), trainer={'accelerator': 'gpu'})."
        )
    trials = trials_of(module, data, trainer or {}, unaugmented=options.unaugmented)
    return search_layers(options, Candidates(options, module, together, trials, using.with_options), tqdm_progress)


def search_layers(
    options: LayerSearch,
    candidates: Candidates,
    progress: Progress,
    *,
    known: LayerPlan | None = None,
    keep: Callable[[LayerPlan], object] = lambda plan: None,
) -> LayerPlan:
    """Return the plan with the best of the candidates that a strategy proposes, each of them trained once.

    Args:
        options: of the search.
        candidates: trains and scores them.
        progress: makes a progress bar.
        known: what the same search had found when it was interrupted.
        keep: called with the plan so far after each candidate.

    Raises:
        TransferConfigError: the cache is of another search.
    """
    plan = candidates.plan([])
    kept = known.evaluations if known is not None and known.settings == plan.settings else ()
    earlier = [*kept, *_cached(options.cache, plan)]
    scored = {each.layers: each for each in earlier if each.accuracy is not None}  # a failed candidate is tried again
    strategy = STRATEGIES[options.strategy](
        list(candidates.most.values()), particles=options.particles, iterations=options.iterations, seed=options.seed
    )
    began = time.monotonic()
    with progress("Layer search", options.num_candidates, unit="candidates") as step:
        for _ in range(options.num_candidates):
            layers = strategy.ask()
            if is_new := layers not in scored:
                is_late = options.max_seconds is not None and time.monotonic() - began >= options.max_seconds
                if is_late or (options.max_evaluations is not None and len(scored) >= options.max_evaluations):
                    break
                scored[layers] = candidates.evaluate(layers)
            plan = candidates.plan([*plan.evaluations, scored[layers]])
            strategy.tell(scored[layers].fitness)
            if is_new:
                keep(plan)
                if options.cache is not None:
                    plan.save(options.cache)
            step(1, plan.summary)
    _warn(plan, candidates.num_held_out)
    return plan


def _cached(cache: str | os.PathLike[str] | None, mine: LayerPlan) -> tuple[Evaluation, ...]:
    """Return what an earlier run of the same search has finished."""
    if cache is None or not os.path.exists(cache):  # unlike Path.exists, it does not raise for an impossible name
        return ()
    found = LayerPlan.load(cache)
    different = differences(found.settings, mine.settings, there="there")
    if different:
        raise TransferConfigError(
            f"{cache} keeps another search: {'; '.join(different)}. Name another file, or remove it."
        )
    return found.evaluations


def _warn(plan: LayerPlan, num_held_out: int) -> None:
    """Warn if some candidates have no score, or all have the same one."""
    scores = {evaluation.fitness for evaluation in plan.evaluations if evaluation.accuracy is not None}
    tried = {evaluation.layers for evaluation in plan.evaluations}
    failures = {evaluation.layers: evaluation.failure for evaluation in plan.evaluations if evaluation.accuracy is None}
    if not scores:
        reason = f"all failed: {plan.evaluations[0].failure}" if plan.evaluations else "there was no time for any"
        warnings.warn(f"No candidate has a score, {reason}. Nothing is frozen.", NoEffectWarning, stacklevel=3)
        return
    if failures:
        layers, failure = next(iter(failures.items()))
        warnings.warn(
            f"{len(failures)} of {len(tried)} candidates failed and cannot be chosen. The first, "
            f"{dict(zip(plan.num_layers, layers, strict=True))}: {failure}",
            stacklevel=3,
        )
    if len(scores) == 1 < len(tried):
        warnings.warn(
            f"All {len(tried)} candidates have the same accuracy on {num_held_out} held-out images "
            f"({max(scores):.1%}), so the one that freezes least is taken. Hold out more: "
            "LayerSearch(validation=...).",
            NoEffectWarning,
            stacklevel=3,
        )
