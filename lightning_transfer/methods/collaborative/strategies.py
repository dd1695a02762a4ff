"""Which depths of freezing to try next: a particle swarm (PeerJ CS 10:e2107), a tree of Parzen estimators, or chance.

Each is asked for a candidate and told how it did, and nothing else decides what comes next: told the same again, it
asks the same again. So an interrupted search is one that is told what is known already.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from lightning_transfer.errors import TransferConfigError

Layers: TypeAlias = tuple[int, ...]  # how many are frozen, in each network

PULL = 1.5  # the authors' c1 and c2
INERTIA = (1.40, 0.84)  # theirs, in the first iteration and in the last
FASTEST = 5.0  # theirs, layers an iteration


class Strategy(Protocol):
    """Proposes a candidate, and takes its score."""

    def ask(self) -> Layers:
        """The next candidate."""

    def tell(self, fitness: float) -> None:
        """How the last candidate did; minus infinity where it failed."""


class Swarm:
    """Particles that are drawn to the best place each of them has seen, and to the best that any has.

    After each particle has been scored all of them move:
    v <- inertia * v + 1.5 * r1 * (own best - x) + 1.5 * r2 * (best of all - x), x <- x + v.
    Constants are the authors'; that r1 and r2 are drawn for each number apart, and velocities begin at random, is ours.

    Args:
        most: the largest number for each network.
        particles: how many.
        iterations: moves, over which inertia falls in equal steps from 1.40 to 0.84.
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
        """The best position so far; the first that was found, where several are."""
        return self.own_best[self.own_fitness.argmax()]

    def ask(self) -> Layers:
        """The next particle's position, truncated."""
        return tuple(int(number) for number in self.positions[self._particle])

    def tell(self, fitness: float) -> None:
        """How it did."""
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


class Chance:
    """Every candidate is as likely as any other, and nothing is learned: what a search has to beat."""

    def __init__(self, most: Sequence[int], *, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self.most = np.asarray(most)

    def ask(self) -> Layers:
        """A candidate."""
        return tuple(self._random.integers(0, self.most, endpoint=True).tolist())

    def tell(self, fitness: float) -> None:
        """Makes no difference."""


class Parzen:
    """Optuna's tree-structured Parzen estimator.

    Args:
        most: the largest number for each network.
        seed: of everything random.

    Raises:
        TransferConfigError: optuna is missing.
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
        """What it expects most of."""
        self._trial = self._study.ask()
        return tuple(self._trial.suggest_int(str(number), 0, most) for number, most in enumerate(self.most))

    def tell(self, fitness: float) -> None:
        """How it did."""
        import optuna

        if np.isfinite(fitness):
            self._study.tell(self._trial, fitness)
        else:
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "swarm": Swarm,
    "tpe": lambda most, *, particles, iterations, seed: Parzen(most, seed=seed),
    "random": lambda most, *, particles, iterations, seed: Chance(most, seed=seed),
}
