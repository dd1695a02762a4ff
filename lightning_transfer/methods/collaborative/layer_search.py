"""How many layers of each network to freeze, found by trying (PeerJ CS 10:e2107).

The swarm, its numbers and what is searched are the authors'. That a candidate is scored on images held out of the
training data, that equal candidates are scored once, and that a search goes on where it was broken off, is ours.
"""

import copy
import os
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_transfer.errors import NoEffectWarning, TransferConfigError, check_choice, check_count, check_number
from lightning_transfer.glue import proxy
from lightning_transfer.methods.collaborative.apply import apply_collaborative, find_ensemble
from lightning_transfer.methods.collaborative.members import loaded, named
from lightning_transfer.methods.collaborative.plan import Evaluation, LayerPlan
from lightning_transfer.methods.collaborative.splitting import groups_of, held_out, labels_of
from lightning_transfer.methods.collaborative.strategies import STRATEGIES, Layers
from lightning_transfer.progress import Progress, tqdm_progress
from lightning_transfer.roles import has_forward
from lightning_transfer.source.stream import load, seeded
from lightning_transfer.source.task import name_of
from lightning_transfer.tracing import evaluating

SETTINGS = ("strategy", "particles", "iterations", "proxy_epochs", "seed", "validation")  # that decide what is found
STEPPING = {  # options of a Trainer that decide what a step does, as they are by default
    "precision": "32-true",
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
}
LOOKED_AT = 16  # images by which a cache knows its data

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
        if hasattr(data, "train_dataloader"):
            data.prepare_data()
            data.setup("fit")
            data = data.train_dataloader()
        proxies = Proxies(self, module, data, using, proxy.trainer_class(), {"devices": 1, **(trainer or {})})
        return self.search(proxies, tqdm_progress)

    def search(
        self,
        proxies: "Proxies",
        progress: Progress,
        *,
        known: LayerPlan | None = None,
        keep: Callable[[LayerPlan], object] = lambda plan: None,
    ) -> LayerPlan:
        """Ask for candidates, train each of them once, and tell how it did.

        Args:
            proxies: trains them.
            progress: makes a progress bar.
            known: what was found before the same search was broken off.
            keep: told what is found so far, behind each candidate.

        Raises:
            TransferConfigError: the cache is of another search.
        """
        plan = proxies.plan([])
        is_same = known is not None and known.settings == plan.settings
        earlier = [*(known.evaluations if known is not None and is_same else ()), *self._cached(plan)]
        scored = {each.layers: each for each in earlier if each.accuracy is not None}  # what failed may not again
        strategy = STRATEGIES[self.strategy](
            list(proxies.most.values()), particles=self.particles, iterations=self.iterations, seed=self.seed
        )
        began = time.monotonic()
        with progress("Layer search", self.num_candidates, unit="candidates") as step:
            for _ in range(self.num_candidates):
                layers, is_new = strategy.ask(), False
                if layers not in scored:
                    is_late = self.max_seconds is not None and time.monotonic() - began >= self.max_seconds
                    if is_late or (self.max_evaluations is not None and len(scored) >= self.max_evaluations):
                        break
                    scored[layers] = proxies.evaluate(layers)
                    is_new = True
                plan = proxies.plan([*plan.evaluations, scored[layers]])
                strategy.tell(scored[layers].fitness)
                if is_new:
                    keep(plan)
                    if self.cache is not None:
                        plan.save(self.cache)
                step(1, plan.summary)
        _warn_of_nothing(plan, proxies.num_held_out)
        return plan

    def _cached(self, mine: LayerPlan) -> tuple[Evaluation, ...]:
        if self.cache is None or not Path(self.cache).exists():
            return ()
        found = LayerPlan.load(self.cache)
        differences = [
            f"{key}: {found.settings.get(key)} there, {mine.settings.get(key)} here"
            for key in sorted({*found.settings, *mine.settings})
            if found.settings.get(key) != mine.settings.get(key)
        ]
        if differences:
            raise TransferConfigError(
                f"{self.cache} keeps another search: {'; '.join(differences)}. Name another file, or remove it."
            )
        return found.evaluations


class Proxies:
    """Trains candidates on a part of the training images, and scores them on the rest.

    Args:
        search: how.
        module: the user's, its network alone.
        loader: its train loader.
        using: the callback that a candidate is trained with.
        make: Lightning's Trainer.
        options: of it.

    Raises:
        TransferConfigError: the loader cannot be split, or no network fits beside the user's own.
    """

    def __init__(
        self,
        search: LayerSearch,
        module: Any,
        loader: Any,
        using: "CollaborativeFinetuning",
        make: type,
        options: Mapping[str, Any],
    ) -> None:
        proxy.check_loader(loader)
        self.search, self.module, self.using, self.make, self.options = search, module, using, make, dict(options)
        with seeded(search.seed, 0):
            labels = labels_of(loader.dataset)
            out = held_out(labels, search.validation, groups=groups_of(loader.dataset), seed=search.seed)
        kept = sorted({*range(len(labels))} - {*out})
        clean: Any = search.unaugmented or loader.dataset
        if len(clean) != len(labels):
            raise TransferConfigError(
                f"unaugmented has {len(clean)} images, the training data {len(labels)}; give the same, in order."
            )
        self.num_held_out = len(out)
        self.train = partial(proxy.part_of, loader, kept)
        self.rest = partial(proxy.part_of, loader, out, dataset=clean)
        with seeded(search.seed, 0):
            self.networks = {name: loaded(source) for name, source in named(using.sources).items()}
            self._check_batch(next(iter(self.rest())))
            seen = [fingerprint(dataset) for dataset in (loader.dataset, clean)]
        twin = copy.deepcopy(module)
        apply_collaborative(twin, self.networks, model=using.model)
        found = find_ensemble(twin)
        assert found is not None  # just made
        depths = found[1].depths(getattr(module, "example_input_array", None))
        self.num_layers = {name: len(depth.convs) for name, depth in depths.items()}
        self.most = {name: depth.most for name, depth in depths.items()}
        self.settings = {
            **{key: str(getattr(search, key)) for key in SETTINGS},
            "networks": str({name: f"{number} convolutions" for name, number in self.num_layers.items()}),
            "weights": f"{weights_of(module, *self.networks.values()):08x}",
            "batch size": str(loader.batch_size),
            "training images": f"{len(labels)}, {zlib.crc32(repr(labels).encode()):08x}, {seen}",
            "held out": f"{len(out)}, {zlib.crc32(repr(out).encode()):08x}",
            "hyperparameters": str(dict(getattr(module, "hparams", {}))),
            "trainer": str({key: self.options.get(key, usual) for key, usual in STEPPING.items()}),
            "weight": str(using.weight),
            "loss": name_of(using.loss),
        }

    def plan(self, evaluations: Sequence[Evaluation]) -> LayerPlan:
        """What these candidates tell: the best; of equals that which freezes least; nothing where all have failed."""
        best = max(evaluations, key=lambda evaluation: (evaluation.fitness, -sum(evaluation.layers)), default=None)
        layers = (0,) * len(self.most) if best is None or best.accuracy is None else best.layers
        return LayerPlan(dict(zip(self.most, layers, strict=True)), self.num_layers, tuple(evaluations), self.settings)

    def evaluate(self, layers: Layers) -> Evaluation:
        """Train a candidate, and score it; one that fails costs nothing but itself."""
        frozen = dict(zip(self.most, layers, strict=True))
        twin = copy.deepcopy(self.module)
        try:
            devices = range(torch.cuda.device_count())
            with seeded(self.search.seed, 1), torch.random.fork_rng(devices):
                torch.cuda.manual_seed_all(self.search.seed)  # for dropout there
                scoring = proxy.Scoring(self.rest(), self._right)
                callbacks = [self.using.candidate(self.networks, frozen), scoring]
                proxy.train(self.make, self.options, twin, self.train(), callbacks, self.search.proxy_epochs)
        except Exception as error:  # whatever a candidate may die of, such as its memory
            return Evaluation(layers, None, f"{type(error).__name__}: {error}".partition("\n")[0])
        return Evaluation(layers, scoring.best)

    def _check_batch(self, batch: Any) -> None:
        """Refuse batches that candidates could not be scored by."""
        if not isinstance(batch, list | tuple) or not isinstance(batch[0], Tensor):
            raise TransferConfigError(
                f"A search scores candidates on batches (images, ...), and the train loader gives a "
                f"{type(batch).__name__}. Give frozen_layers in place of a search, or a loader of tuples."
            )
        self.using.labels(batch)

    def _right(self, module: Any, batch: Any) -> Tensor:
        """(B,) whether the networks together are right."""
        found = find_ensemble(module)
        assert found is not None  # it is what is trained
        with evaluating(module), found[1].passes.followed() as passes:
            (module if has_forward(module) else found[1])(batch[0])
            assert passes.logits is not None  # they have just run
            logits = passes.logits.mean(0)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("what the networks say is not finite")
        return logits.argmax(1) == self.using.labels(batch)


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


def fingerprint(dataset: Any) -> str:
    """A number that tells images apart, by a few of them."""
    number = 0
    for index in range(0, len(dataset), max(1, len(dataset) // LOOKED_AT)):
        number = zlib.crc32(repr(np.asarray(load(dataset, index)[0]).tobytes()).encode(), number)
    return f"{number:08x}"


def weights_of(*modules: Any) -> int:
    """A number that tells weights apart."""
    number = 0
    for module in modules:
        for value in module.state_dict().values():
            if not isinstance(value, Tensor):
                continue
            number = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), number)
    return number
