"""Define how many source images each target image borrows, and when it gets more."""

import warnings
from dataclasses import dataclass, fields

from lightning_transfer.errors import NoEffectWarning, TransferConfigError, check_choice, check_count, check_number
from lightning_transfer.methods.selective.banks import FilterBank

LIMIT = 5  # times k, the most a target image may borrow: the authors' code has 5 to 10
OF_ROUNDS = ("every", "hard_entropy", "limit", "oversample_hard")  # options that change nothing without rounds


@dataclass(frozen=True)
class Neighbors:
    """Holds the options of which source images a target image borrows: those with the nearest filter statistics.

    Args:
        k: how many at first (the authors': 300 to 1,000).
        bank: "gabor", or a `FilterBank`.
        bins: of each filter's histogram; by default the root of the number of positions, at most 100 (ours).
        rounds: how often during training the network decides which target images are hard. An image that it gets wrong
            gets 4 k more neighbors; an image that it gets right, but not surely, gets 2 k more (the paper's).
        every: optimizer steps between rounds; by default rounds are spread evenly over training (ours).
        hard_entropy: the entropy of the class probabilities, in nats, from which a right answer counts as unsure (0.1
            is ours), or a quantile of the right answers' entropies, such as "75%".
        limit: the largest number of neighbors of a target image; 5 k by default.
        min_per_class: source classes with fewer borrowed images are left out and not replaced (the authors': 0 to 50).
        oversample_hard: whether a target image that borrows m times as many neighbors is served m times as often when
            neighbors are drawn. The authors also repeat the target image itself, which your train loader decides: see
            the callback's `target_weights`.
        search: "exact", or "approximate" for tens of millions of source images.

    Raises:
        TransferConfigError: an option is out of range.

    Example:
        >>> Neighbors(k=300).limit is None
        True
    """

    k: int = 300
    bank: str | FilterBank = "gabor"
    bins: int | None = None
    rounds: int = 2
    every: int | None = None
    hard_entropy: float | str = 0.1
    limit: int | None = None
    min_per_class: int = 0
    oversample_hard: bool = False
    search: str = "exact"

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("rounds", 0), ("min_per_class", 0)):
            check_count(name, getattr(self, name), least=least)
        for name, least in (("bins", 2), ("every", 1), ("limit", self.k)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=least)
        if self.bank != "gabor" and not isinstance(self.bank, FilterBank):
            raise TransferConfigError(
                f"bank={self.bank!r} is not known. Write bank='gabor' or FilterBank.from_model(model, "
                "layers=['conv1'])."
            )
        check_choice("search", self.search, ("exact", "approximate"))
        if self.quantile is None:
            check_number("hard_entropy", self.hard_entropy)
        usual = {field.name: field.default for field in fields(self) if field.name in OF_ROUNDS}
        given = [name for name, default in usual.items() if getattr(self, name) != default]
        if given and not self.rounds:
            warnings.warn(
                f"With rounds=0 no target image gets more neighbors, so {', '.join(given)} changes nothing. Leave it "
                "out, or pass rounds=2.",
                NoEffectWarning,
                stacklevel=3,
            )

    @property
    def quantile(self) -> float | None:
        """Return the quantile of entropies in `hard_entropy`; None if it is a number of nats."""
        if not isinstance(self.hard_entropy, str):
            return None
        digits = self.hard_entropy.removesuffix("%")
        if digits == self.hard_entropy or not digits.replace(".", "", 1).isdigit() or not 0 <= float(digits) <= 100:
            raise TransferConfigError(
                f'hard_entropy={self.hard_entropy!r}; write nats, such as 0.1, or a quantile, such as "75%".'
            )
        return float(digits) / 100

    def longest(self, num_images: int) -> int:
        """Return the length of the longest list that may be needed, for a source of `num_images`."""
        limit = self.k if not self.rounds else LIMIT * self.k if self.limit is None else self.limit
        return min(limit, num_images)
