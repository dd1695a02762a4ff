"""Decide which trainings are worth their time: each round trains the remaining candidates on one more fold (ours)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from lightning_transfer.advising.candidates import PLAIN, PROBE, Candidate
from lightning_transfer.advising.trials import OutOfTimeError, Scored
from lightning_transfer.advising.verdicts import Difference, difference
from lightning_transfer.errors import TransferConfigError

LOST = 10.0  # points below a linear probe, from which fine-tuning itself looks wrong


@dataclass
class Racer:
    """Holds a candidate and its results.

    Attributes:
        candidate: what is trained.
        found: by fold, what it had right.
        reason: why it was refused or not trained.
        is_out: whether it is trained no more.
        is_refused: whether it does not fit the module.
    """

    candidate: Candidate
    found: dict[int, Scored] = field(default_factory=dict)
    reason: str = ""
    is_out: bool = False
    is_refused: bool = False

    def leave(self, reason: str = "") -> None:
        """Train it no more."""
        self.is_out, self.reason = True, reason


class Race:
    """Trains fine-tuning and its rivals on one fold after the other, and drops those that are hopeless or too many.

    Args:
        rivals: of fine-tuning; the one called "linear probe" is scored together with it and costs nothing.
        num_folds: how many there are.
        train: trains a candidate on a fold, and returns by name what was scored.
        groups: what the scored images of a fold belong to.
        clock: gives seconds.
        deadline: of the clock.
        skip: called with the number of trainings that will not run.
    """

    def __init__(
        self,
        rivals: list[Candidate],
        *,
        num_folds: int,
        train: Callable[[Candidate, int], dict[str, Scored]],
        groups: Callable[[int], list[Any]],
        clock: Callable[[], float],
        deadline: float,
        skip: Callable[[int], object] = lambda number: None,
    ) -> None:
        self.plain = Racer(Candidate(PLAIN, "", list, cost=1.0))
        self.rivals = [Racer(each) for each in rivals]
        self.num_folds, self.train, self.groups = num_folds, train, groups
        self.clock, self.deadline, self.skip = clock, deadline, skip

    def run(self) -> None:
        """Run all rounds.

        Raises:
            OutOfTimeError: not even the first training of fine-tuning fits.
            Exception: fine-tuning does not fit the module, or whatever else it raises.
        """
        for fold in range(self.num_folds):
            if not self._begin(fold):
                break
            if self.falls_short(looks=self.num_folds):
                for racer in self.trained:
                    if not racer.candidate.may_repair:
                        racer.leave("it builds on fine-tuning, which falls short of the probe")
                        self.skip(self.num_folds - fold)
                if not self.trained:
                    break
            for racer in sorted(self.trained, key=self.price):
                self._begin_one(racer, fold)
            if fold + 1 < self.num_folds:
                self._make_room(fold)

    @property
    def trained(self) -> list[Racer]:
        """Return the candidates that are still trained; the linear probe costs nothing and is not one of them."""
        return [racer for racer in self.rivals if not racer.is_out and racer.candidate.name != PROBE]

    def falls_short(self, *, looks: int = 1) -> bool:
        """Return whether fine-tuning is so much worse than the probe that it has to be repaired first."""
        probe = next((racer for racer in self.rivals if racer.candidate.name == PROBE), None)
        seen = None if probe is None else self.difference(probe, looks=looks)
        return seen is not None and seen.points > LOST and seen.verdict == "shown better"

    def difference(self, racer: Racer, *, looks: int = 1) -> Difference | None:
        """Return how a racer compares with fine-tuning on the folds of both; None without one.

        Args:
            racer: that is compared.
            looks: how often it is compared; intervals of all looks hold together (Bonferroni).
        """
        folds = [*racer.found]
        if not folds:
            return None
        mine, plain = ([each.found[fold].right for fold in folds] for each in (racer, self.plain))
        among = sum(bool(each.found) or not each.is_out for each in self.rivals)
        return difference(mine, plain, [group for fold in folds for group in self.groups(fold)], among=among * looks)

    def price(self, racer: Racer) -> float:
        """Return the seconds of a training, as seen or as a multiple of fine-tuning's."""
        if racer.found:
            return mean(scored.seconds for scored in racer.found.values())
        return racer.candidate.cost * self.price(self.plain)

    def _left(self) -> float:
        return self.deadline - self.clock()

    def _price_of_a_round(self) -> float:
        return sum(map(self.price, [self.plain, *self.trained]))

    def _begin(self, fold: int) -> bool:
        """Run fine-tuning and the probe if there is time for them and one rival; return whether they ran."""
        if fold and self.price(self.plain) + min(map(self.price, self.trained), default=0.0) > self._left():
            return False
        try:
            self._add(self.train(self.plain.candidate, fold), fold)
        except OutOfTimeError:
            if not fold:
                raise
            return False
        except Exception as error:
            if not isinstance(error, TransferConfigError):
                error.add_note("This happened in plain fine-tuning, without any candidate.")
            raise
        return True

    def _begin_one(self, racer: Racer, fold: int) -> None:
        """Train a rival if there is time."""
        if self.price(racer) > self._left():
            if not racer.found:
                racer.leave("no time was left for it")
            return
        try:
            self._add(self.train(racer.candidate, fold), fold)
        except OutOfTimeError:
            if not racer.found:
                racer.leave("no time was left for it")
        except Exception as error:  # of any kind: what the others have found is not lost by it
            kind = "" if isinstance(error, TransferConfigError | FloatingPointError) else f"{type(error).__name__}: "
            racer.leave(f"{kind}{error}".partition("\n")[0].partition(". ")[0].rstrip(".: "))
            racer.is_refused = True
            racer.found.clear()
            self.skip(self.num_folds - fold)

    def _add(self, found: dict[str, Scored], fold: int) -> None:
        for racer in [self.plain, *self.rivals]:
            if scored := found.get(racer.candidate.name):
                racer.found[fold] = scored

    def _make_room(self, fold: int) -> None:
        """Drop what is worse, then the worse half if not all can run all folds, and again until a round fits."""
        for racer in self.trained:
            seen = self.difference(racer, looks=self.num_folds)
            if seen is not None and seen.verdict == "shown worse":
                self._drop(racer, fold)
        rounds = self.num_folds - fold - 1
        while rounds * self._price_of_a_round() > self._left() and len(self.trained) > 1:
            self._halve(fold)
            rounds = 1

    def _halve(self, fold: int) -> None:
        """Drop the worse half of those that are trained."""
        order = sorted(self.trained, key=lambda racer: -self._points(racer))
        for racer in order[(len(order) + 1) // 2 :]:
            self._drop(racer, fold)

    def _points(self, racer: Racer) -> float:
        seen = self.difference(racer)
        return -100.0 if seen is None else seen.points

    def _drop(self, racer: Racer, fold: int) -> None:
        racer.leave()
        self.skip(self.num_folds - fold - 1)
