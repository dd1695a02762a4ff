"""Propose which depths to try next: a particle swarm (PeerJ CS 10:e2107), or tree-structured Parzen estimators.

A strategy proposes a candidate and takes its score, and nothing else decides its next proposal: the same scores lead to
the same proposals. So an interrupted search resumes by repeating the scores that are known.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from lightning_transfer.errors import TransferConfigError

Layers: TypeAlias = tuple[int, ...]  # how many convolutions are frozen, in each network

PULL = 1.5  # the authors' c1 and c2
INERTIA = (1.40, 0.84)  # the authors', in the first iteration and in the last
FASTEST = 5.0  # the authors', in layers an iteration


class Strategy(Protocol):
    """Propose candidates, one at a time, and take the score of each."""

    def ask(self) -> Layers:
        """Return the next candidate."""

    def tell(self, fitness: float) -> None:
        """Take the score of the last candidate; minus infinity if it failed."""


class Swarm:
    """Move particles towards the best position that each has visited, and towards the best of all.

    When every particle has been scored, all of them move:
    v <- inertia * v + 1.5 * r1 * (own best - x) + 1.5 * r2 * (best of all - x), x <- x + v.
    The constants are the authors'. Ours: r1 and r2 are drawn for each number separately, and velocities start random.

    Args:
        most: the largest number for each network.
        particles: how many.
        iterations: how many moves; inertia falls over them in equal steps from 1.40 to 0.84.
        seed: of everything random.

    Example:
        >>> swarm, best = Swarm([9], particles=4, iterations=3, seed=0), []
        >>> for _ in range(16):
        ...     (layers,) = swarm.ask()
        ...     swarm.tell(-abs(layers - 7))
        >>> int(swarm.best[0])
        7
    """

    def __init__(self, most: Sequence[int], *, particles: int = 10, iterations: int = 5, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self.most = np.asarray(most, dtype=float)
        self.inertia = np.linspace(*INERTIA, iterations)
        self.positions = self._random.uniform(0, self.most, (particles, len(most)))
        self.velocities = self._random.uniform(-FASTEST, FASTEST, (particles, len(most)))
        self.own_best = self.positions.copy()
        self.own_fitness = np.full(particles, -np.inf)
        self._particle = self._iteration = 0

    @property
    def best(self) -> Any:
        """Return the best position so far; of equally good ones the first."""
        return self.own_best[self.own_fitness.argmax()]

    def ask(self) -> Layers:
        """Return the next particle's position, truncated."""
        return tuple(int(number) for number in self.positions[self._particle])

    def tell(self, fitness: float) -> None:
        """Take its score; after the last particle of a round, move all of them."""
        if fitness > self.own_fitness[self._particle]:
            self.own_fitness[self._particle] = fitness
            self.own_best[self._particle] = self.positions[self._particle]
        self._particle += 1
        if self._particle == len(self.positions):
            self._particle = 0
            if self._iteration < len(self.inertia):
                self._move()

    def _move(self) -> None:
        to_own, to_best = (PULL * self._random.random(self.positions.shape) for _ in range(2))
        self.velocities = (
            self.inertia[self._iteration] * self.velocities
            + to_own * (self.own_best - self.positions)
            + to_best * (self.best - self.positions)
        ).clip(-FASTEST, FASTEST)
        self.positions = (self.positions + self.velocities).clip(0, self.most)
        self._iteration += 1


class Parzen:
    """Ask optuna's tree-structured Parzen estimator.

    Args:
        most: the largest number for each network.
        seed: of everything random.

    Raises:
        TransferConfigError: optuna is not installed.
    """

    def __init__(self, most: Sequence[int], *, seed: int = 0) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise TransferConfigError(
                "strategy='tpe' needs optuna: pip install 'lightning_transfer[search]'."
            ) from None
        self.most = most
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce each study
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        optuna.logging.set_verbosity(level)
        self._trial: Any = None

    def ask(self) -> Layers:
        """Return the candidate of which it expects most."""
        self._trial = self._study.ask()
        return tuple(self._trial.suggest_int(str(number), 0, most) for number, most in enumerate(self.most))

    def tell(self, fitness: float) -> None:
        """Take its score."""
        import optuna

        if np.isfinite(fitness):
            self._study.tell(self._trial, fitness)
        else:
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "swarm": Swarm,
    "tpe": lambda most, *, particles, iterations, seed: Parzen(most, seed=seed),
}
