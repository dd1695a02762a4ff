"""Compare methods by paired trials on the training images, within a budget of time (ours)."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_transfer.advising.advice import Advice, Compared, Measured
from lightning_transfer.advising.candidates import Candidate, own, usual
from lightning_transfer.advising.race import Race, Racer
from lightning_transfer.advising.reading import ADAPT, FORWARD, Reading
from lightning_transfer.advising.trials import OutOfTimeError, PairedTrials
from lightning_transfer.advising.verdicts import is_above
from lightning_transfer.datasets import AnyDataset
from lightning_transfer.errors import TransferConfigError, check_count, check_number
from lightning_transfer.glue.loaders import part_of
from lightning_transfer.glue.trainer import named
from lightning_transfer.glue.trials import Trials, callbacks_of, trials_of
from lightning_transfer.methods.soft.knowledge import SourceKnowledge
from lightning_transfer.naming import a_class
from lightning_transfer.normalizing import are_new, normalizing_layers
from lightning_transfer.progress import Progress, no_progress, tqdm_progress
from lightning_transfer.source.task import SourceTask
from lightning_transfer.splitting import FOLDS, check_divisible
from lightning_transfer.twins import copied

EPOCHS = 25  # if no length is given
LENGTHS = "max_epochs", "max_steps"
WATCHING = {  # callbacks of Lightning that do not change what a step learns
    "Checkpoint",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelSummary",
    "ProgressBar",
    "ThroughputMonitor",
    "Timer",
}


def advise(
    module: Any,
    data: Any,
    *,
    source: SourceTask | SourceKnowledge | None = None,
    candidates: Mapping[str, Callable[[], Sequence[Any]]] | None = None,
    steps: int | None = None,
    minutes: float = 30.0,
    unaugmented: AnyDataset | None = None,
    head: str = "auto",
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Advice:
    """Compare methods with fine-tuning on held-out parts of your training images.

    Copies of the module are trained on all but one of five parts of the images, by plain fine-tuning and by each
    candidate, and scored on that part (at most 1,000 of its images). Parts, batches, new head and seed are the same for
    all. A linear probe is scored too. Each round adds a part for the candidates that are left: those that are clearly
    worse are dropped, and if there is not enough time for all, the worse half is. Callbacks that the module's
    configure_callbacks returns are not used. The module and the random state are not changed, and validation and test
    data are not read.

    Args:
        module: the LightningModule that is to be trained, with its pretrained network.
        data: its DataModule, or its train loader. Images of one group, if the dataset has a list `groups`, stay
            together.
        source: what the network was pretrained on, if it is at hand, or a `SourceKnowledge`; adds the methods that
            learn from it.
        candidates: a mapping of names to functions that make a list of callbacks, instead of this package's methods:
            {"gated": lambda: [lt.GatedTransfer(ratio=8)]}. The callbacks have to be new ones each time.
        steps: of each training; by default those of max_steps or max_epochs in `trainer`, whose limit_train_batches is
            followed, or 25 epochs. Give as many as you will train: with few, a term that is added to the loss costs
            more than it gains.
        minutes: that all trainings may take. A training is begun if it may fit, and stopped after some steps if it does
            not. The work of a callback before the first step, and scoring, are not interrupted.
        unaugmented: the training images without augmentation; they are scored, and this package's methods read them
            before the first step. By default those of the loader.
        head: dotted path of the classifier, or "auto".
        adapt: turns a batch into (images, labels), for example a dictionary.
        forward: runs images through the module, if its own forward takes more than images; by default the source's.
        trainer: options of the Trainer, such as {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}.

    Raises:
        TransferConfigError: the images cannot be split, the module has no head that takes one row an image, or not
            even one fine-tuning fits into the minutes.
        FloatingPointError: fine-tuning ends in outputs that are not a number.
        Exception: any other error of fine-tuning. A candidate that raises one is listed as refused, and the others go
            on.

    Returns:
        What was measured, and what to do; `print` shows it with the code to write.

    Example:
        >>> import lightning as L
        >>> class Lit(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
        ...     def forward(self, images):
        ...         return self.net(images)
        ...     def training_step(self, batch, batch_idx):
        ...         return nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> images = [(torch.full((3, 2, 2), index % 2.0), index % 2) for index in range(20)]
        >>> few_images = torch.utils.data.DataLoader(images, batch_size=4)
        >>> quiet = {"accelerator": "cpu", "enable_progress_bar": False}
        >>> advice = advise(Lit(), few_images, candidates={"mine": lambda: []}, steps=2, trainer=quiet)
        >>> advice.measured.images, sorted(each.name for each in advice.candidates)
        (20, ['linear probe', 'mine'])
    """
    _check(source, steps, minutes, adapt, forward, unaugmented)
    if forward is None and isinstance(source, SourceTask) and callable(source.forward):
        forward = source.forward
    said: dict[str, Any] = {"head": head, "forward": forward, "adapt": adapt, "unaugmented": unaugmented}
    lengths, options = _split({} if trainer is None else trainer)
    trials = trials_of(module, data, options, unaugmented=unaugmented, adapt=adapt)
    check_divisible(trials.labels, trials.groups, least=2 * FOLDS)
    _warn_of_callbacks(module)
    has_statistics = not all(are_new(dict(normalizing_layers(module))).values())
    probe, *methods = usual(source, has_statistics=has_statistics, **said)
    return compare(
        module,
        trials,
        [probe, *(methods if candidates is None else own(candidates))],
        Reading(head, adapt, forward),
        steps=steps,
        lengths=lengths,
        minutes=minutes,
        progress=tqdm_progress if trials.options.get("enable_progress_bar", True) else no_progress,
    )


def _warn_of_callbacks(module: Any) -> None:
    own = callbacks_of(copied(module))
    watching = named(own, WATCHING)
    if active := sorted({type(one).__name__ for one in own} - {*watching}):
        warnings.warn(
            f"The trials train without {', '.join(active)}, which configure_callbacks of {type(module).__name__} "
            "returns, so fine-tuning may be another one than yours. To include them, pass candidates= with "
            "callbacks that do the same.",
            stacklevel=3,
        )


def compare(
    module: Any,
    trials: Trials,
    rivals: list[Candidate],
    reading: Reading,
    *,
    steps: int | None,
    lengths: Mapping[str, int],
    minutes: float,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> Advice:
    """Run fine-tuning and its rivals, and return the advice: what `advise` does after it has checked its arguments."""
    deadline = clock() + 60 * minutes
    paired = PairedTrials(module, trials, reading, clock=clock, deadline=deadline)
    loader = part_of(trials.loader, paired.kept(0))
    per_pass = math.ceil(len(loader) / trials.options.get("accumulate_grad_batches", 1))
    paired.steps = steps or length(lengths, trials.steps_in_epoch(loader))
    race = Race(
        rivals,
        num_folds=len(paired.parts),
        train=paired.train,
        groups=lambda fold: paired.groups(paired.scored(fold)),
        clock=clock,
        deadline=deadline,
        skip=lambda number: paired.step(number * paired.steps),
    )
    total = len(paired.parts) * paired.steps * (1 + len(race.trained))
    with progress("Fine-tuning and the candidates", total, unit="steps") as paired.step:
        try:
            race.run()
        except OutOfTimeError as error:
            each = error.args[0] / 60
            one = each * (1 + sum(rival.cost for rival in rivals))
            raise TransferConfigError(
                f"One fine-tuning of {paired.steps} steps takes about {each:.1f} minutes here, and fine-tuning with "
                f"all candidates, once each, about {one:.1f}; minutes={minutes:g}. Pass minutes={math.ceil(one)} or "
                "more, fewer steps= if you will train for fewer, or a faster device: trainer={'accelerator': 'gpu'}."
            ) from None
    return _advice(race, paired, passes=paired.steps / per_pass)


def length(lengths: Mapping[str, int], per_epoch: int) -> int:
    """Return the steps of a Trainer's max_steps and max_epochs, whichever ends first; without any of 25 epochs.

    >>> length({"max_epochs": 3}, 10), length({"max_steps": 7, "max_epochs": 3}, 10), length({}, 10)
    (30, 7, 250)
    """
    each = {"max_epochs": per_epoch, "max_steps": 1}
    return min((number * each[name] for name, number in lengths.items()), default=EPOCHS * per_epoch)


def _advice(race: Race, paired: PairedTrials, *, passes: float) -> Advice:
    labels, groups = paired.trials.labels, paired.trials.groups
    counts, plain = Counter(labels), race.plain
    probe, commonest = race.rivals[0], max(counts.values()) / len(labels)
    scored_groups = [group for fold in plain.found for group in race.groups(fold)]
    return Advice(
        Measured(
            images=len(labels),
            classes=len(counts),
            fewest=min(counts.values()),
            groups=None if groups is None else len({*groups}),
            commonest=commonest,
            scored=len(_right(plain)),
            probe=float(_right(probe).mean()),
            tuned=float(_right(plain).mean()),
            is_guessing=not any(is_above(_right(racer), commonest, scored_groups) for racer in (plain, probe)),
            falls_short=race.falls_short(),
            steps=paired.steps,
            passes=passes,
            parts=len(paired.parts),
            folds=len(plain.found),
            guess=paired.places.guess if paired.places else "",
            trainings=sum(len(racer.found) for racer in [plain, *race.rivals]) - len(probe.found),
            seconds=race.price(plain),
            round_seconds=sum(map(race.price, [plain, *race.rivals])),
        ),
        tuple(sorted((outcome(race, racer) for racer in race.rivals), key=_rank)),
    )


def outcome(race: Race, racer: Racer) -> Compared:
    """Return what became of a racer; one that was dropped has no verdict, since its result chose its last part."""
    seen = race.difference(racer)
    return Compared(
        racer.candidate.name,
        racer.candidate.line,
        seen,
        len(racer.found),
        is_dropped=racer.is_out and len(racer.found) < len(race.plain.found),
        is_refused=racer.is_refused,
        reason=racer.reason,
        cost=race.price(racer) / race.price(race.plain) if seen else 0.0,
    )


def _rank(compared: Compared) -> float:
    return math.inf if compared.difference is None else -compared.difference.points


def _right(racer: Racer) -> Tensor:
    """Return which (n,) of the images that a racer was scored on are right."""
    return torch.cat([scored.right for scored in racer.found.values()]).double()


def _split(trainer: Mapping[str, Any]) -> tuple[dict[str, int], Mapping[str, Any]]:
    """Return the length that options of a Trainer give, and the other options."""
    if not isinstance(trainer, Mapping):
        return {}, trainer  # which trials refuse
    lengths = {name: trainer[name] for name in LENGTHS if trainer.get(name) not in (None, -1)}
    for name, value in lengths.items():
        check_count(f"trainer[{name!r}]", value, least=1)
    return lengths, {name: value for name, value in trainer.items() if name not in LENGTHS}


def _check(source: Any, steps: Any, minutes: Any, adapt: Any, forward: Any, unaugmented: Any) -> None:
    if not isinstance(source, SourceTask | SourceKnowledge | None):
        raise TransferConfigError(
            f"source is {a_class(source)}; wrap the dataset: source=lt.SourceTask.from_timm(network, dataset), "
            "before the network's classifier is replaced, or lt.SourceTask(dataset, head=pretrained_classifier)."
        )
    if steps is not None:
        check_count("steps", steps, least=1)
    check_number("minutes", minutes)
    if adapt is not None and not callable(adapt):
        raise TransferConfigError(f"adapt={adapt!r} is not a function. {ADAPT}")
    if isinstance(unaugmented, DataLoader):
        raise TransferConfigError("unaugmented is a DataLoader; it takes a dataset: unaugmented=loader.dataset.")
    if forward is not None and not callable(forward):
        raise TransferConfigError(f"forward={forward!r} is not a function. {FORWARD.format('module.model(images)')}")
