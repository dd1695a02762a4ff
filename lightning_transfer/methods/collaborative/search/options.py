"""Define the options of a search for how many layers of each network to freeze (PeerJ CS 10:e2107).

The swarm, its numbers and what is searched are the authors'. Ours: candidates are scored on images held out of the
training data, equal candidates are scored once, and an interrupted search resumes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError, check_choice, check_count, check_number, check_positive
from lightning_transfer.methods.collaborative.search.plan import LayerPlan
from lightning_transfer.methods.collaborative.search.strategies import STRATEGIES


@dataclass(frozen=True)
class LayerSearch:
    """Search how many convolutions of each network to freeze.

    Each candidate is trained for a few epochs, from the same start and with the same random numbers, on a part of the
    training images, and scored on the others. Validation and test data are not used.

    Args:
        particles: candidates of a round; the authors' 10.
        iterations: rounds after the first; the authors' 5, so 60 candidates, of which equal ones are trained once.
        proxy_epochs: epochs of each candidate, of which the best counts; the authors' 5.
        seed: of everything random.
        strategy: "swarm", or "tpe" (optuna's, needs the extra `search`) with as many candidates.
        validation: share of the training images that is held out, the same of each class; images of one of the
            dataset's `groups` stay together. Of equally accurate candidates the one that freezes least is taken (ours).
        unaugmented: the training images without augmentation, in the same order, to score candidates on; by default
            those of the train loader.
        max_evaluations: how many candidates are scored at most, with those in `cache`.
        max_seconds: time after which no further candidate is started.
        cache: file that keeps finished candidates; an interrupted search resumes from it, to the same result. It is
            refused for other networks, images, Trainer options or saved hyperparameters. If anything else of your
            training changes, such as an optimizer's constants, name another file.

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
    strategy: Literal["swarm", "tpe"] = "swarm"
    validation: float = 0.2
    unaugmented: AnyDataset | None = None
    max_evaluations: int | None = None
    max_seconds: float | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("particles", 1), ("iterations", 0), ("proxy_epochs", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least=least)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_positive("validation", self.validation)
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
        """Return a search of one candidate and one epoch without a cache, for a dry run."""
        return replace(self, particles=1, iterations=0, proxy_epochs=1, cache=None)

    @property
    def num_candidates(self) -> int:
        """Return how many candidates are asked for."""
        return self.particles * (self.iterations + 1)

    def run(self, module: Any, data: Any, using: Any, *, trainer: Mapping[str, Any] | None = None) -> LayerPlan:
        """Search before training.

        Args:
            module: the LightningModule to be trained; only copies of it are changed.
            data: its DataModule, or its train loader.
            using: the `CollaborativeFinetuning` that will train it.
            trainer: options of the Trainer of the candidates, such as {"accelerator": "gpu", "devices": 1}.

        Returns:
            The plan, for `CollaborativeFinetuning(..., frozen_layers=plan)`.

        Raises:
            TransferConfigError: `using` is not the callback, or `trainer` is not a mapping of options.
        """
        from lightning_transfer.methods.collaborative.search import loop  # which imports these options

        return loop.search_ahead(self, module, data, using, trainer=trainer)
