"""Run short trial trainings, in one process, without output and without side effects."""

import copy
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_transfer.compiling import forget_graphs
from lightning_transfer.datasets import groups_of
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.loaders import check_loader, loader_of, part_of, served
from lightning_transfer.glue.moving import as_in_steps, as_validated
from lightning_transfer.glue.namespaces import AnyCallback
from lightning_transfer.glue.quiet import silent, trainer_of
from lightning_transfer.glue.trainer import trainer_class
from lightning_transfer.naming import a_class
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import labels_of
from lightning_transfer.twins import copied, only_copies_run

OWN = {"callbacks", "max_epochs", "max_steps", "min_epochs", "min_steps", "max_time", "plugins"}  # trials decide these
UNEQUAL = "fast_dev_run", "overfit_batches"  # with these a trial would not be a training


class _InTrial(AnyCallback):
    """Keeps a scheduler that monitors a validation value from failing, and an optimizer from training the original.

    Args:
        original: of which the trained module is a copy.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make all schedulers tolerate a missing value, because trials run no validation; look at the optimizers.

        Raises:
            TransferConfigError: an optimizer holds parameters of the original.
        """
        theirs = {id(param) for param in self.original.parameters()} - {id(param) for param in pl_module.parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if any(id(param) in theirs for group in groups for param in group["params"]):
            raise TransferConfigError(
                f"A copy of {type(self.original).__name__} is trained here, and its configure_optimizers returns an "
                "optimizer of the original's parameters. Write it as a method that passes self.parameters()."
            )
        for config in trainer.lr_scheduler_configs:
            config.strict = False


class Scoring(AnyCallback):
    """Remembers the best accuracy, over epochs, of a network on held-out images.

    Args:
        loader: the images.
        score: takes a module and a batch, and returns which images are right.
    """

    def __init__(self, loader: DataLoader[Any], score: Any) -> None:
        self.loader = loader
        self.score = score
        self.best = 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Score the network on the images."""
        right, total = 0.0, 0
        with as_in_steps(trainer):
            for batch in self.loader:
                correct = self.score(pl_module, as_validated(trainer, batch))
                right, total = right + float(correct.sum()), total + len(correct)
        self.best = max(self.best, right / total)


class Trials:
    """Trains copies of a module on a part of its training images, to score them on the rest.

    Args:
        loader: the train loader.
        make: Lightning's Trainer class.
        options: of the Trainer.
        datamodule: the user's DataModule, whose hooks move batches; None if there is none.
        unaugmented: the images to score on, without augmentation; None for the loader's own.
        adapt: turns a batch into images and labels, if the dataset does not list labels; None if a batch is both.

    Raises:
        TransferConfigError: the loader cannot be split, or `unaugmented` has another number of images.
    """

    def __init__(
        self,
        loader: Any,
        make: type,
        options: Mapping[str, Any],
        *,
        datamodule: Any = None,
        unaugmented: Any = None,
        adapt: Callable[[Any], Any] | None = None,
    ) -> None:
        check_loader(loader)
        self.loader, self.make, self.options, self.datamodule = loader, make, options, datamodule
        self.dataset = served(loader)
        self.clean: Any = self.dataset if unaugmented is None else served(loader, unaugmented)
        self.groups = groups_of(self.dataset)
        read = adapt and (lambda sample: adapt(loader.collate_fn([sample])))
        with seeded(0, 0):  # images may have to be loaded, and augmented at random
            self.labels = labels_of(self.dataset, read, num_workers=loader.num_workers)

    def held(self, indices: Sequence[int]) -> DataLoader[Any]:
        """Return a loader of some of the images, without augmentation and in order."""
        return part_of(self.loader, indices, dataset=self.clean)

    def steps_in_epoch(self, loader: DataLoader[Any]) -> int:
        """Return how many optimizer steps an epoch has, one at least."""
        limit = self.options.get("limit_train_batches") or 1.0
        batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
        accumulated: int = self.options.get("accumulate_grad_batches", 1)
        return max(1, -(-batches // accumulated))

    def train(
        self,
        module: Any,
        indices: Sequence[int],
        callbacks: Sequence[Any],
        *,
        seed: int,
        epochs: int | None = None,
        steps: int = -1,
    ) -> None:
        """Fit a copy of a module on some of the images, without its own callbacks, without validation and without logs.

        Args:
            module: the user's, of which a copy is trained.
            indices: of the images.
            callbacks: used instead of the user's.
            seed: of everything random; the program's own random state does not change.
            epochs: how many; by default as many as `steps` needs.
            steps: optimizer steps after which training ends.
        """
        forget_graphs(module)  # those of earlier copies count towards torch's limit
        twin = copied(module)
        twin.configure_callbacks = list
        loader = part_of(self.loader, indices)
        epochs = epochs or math.ceil(steps / self.steps_in_epoch(loader))  # a user's schedule may use it as its length
        own = {"max_epochs": epochs, "max_steps": steps, "callbacks": [_InTrial(module), *callbacks]}
        options = {**self.options, **own}
        with _explaining_schedules(epochs), only_copies_run(module, twin):
            fit_alone(self.make, twin, loader, self.datamodule, options, seed=seed)


def fit_alone(
    make: type, module: Any, loader: Iterable[Any], datamodule: Any, options: Mapping[str, Any], *, seed: int
) -> None:
    """Fit a copy of the user's module in this process, without validation and without logs.

    Args:
        make: Lightning's Trainer class.
        module: the copy.
        loader: its batches.
        datamodule: the user's DataModule, whose hooks move batches; None if there is none.
        options: of the Trainer.
        seed: of everything random; the program's own random state does not change.
    """
    devices = range(torch.cuda.device_count())
    with silent(), seeded(seed, 1), torch.random.fork_rng(devices):
        torch.cuda.manual_seed_all(seed)  # for dropout on a GPU
        trainer = trainer_of(make, {**options, "limit_val_batches": 0, "num_sanity_val_steps": 0})
        trainer.fit(module, loader if datamodule is None else _serving(datamodule, loader))


def callbacks_of(module: Any) -> list[Any]:
    """Return the callbacks that a copy of the user's module brings; none if it needs a Trainer for that."""
    try:
        return tree_leaves(module.configure_callbacks())
    except Exception:  # of the user's method
        return []


@contextmanager
def _explaining_schedules(epochs: int) -> Iterator[None]:
    """Add a note to a schedule's error: it happened in a trial, which is shorter than the user's training."""
    try:
        yield
    except Exception as error:
        if any(frame.filename.endswith("lr_scheduler.py") for frame in traceback.extract_tb(error.__traceback__)):
            error.add_note(
                f"This happened in a trial of {epochs} epochs; if the schedule needs more, ask for more steps=, or for "
                "more proxy_epochs= of a search."
            )
        raise


def trials_of(
    module: Any,
    data: Any,
    options: Mapping[str, Any],
    *,
    unaugmented: Any,
    adapt: Callable[[Any], Any] | None = None,
) -> Trials:
    """Return trials on a DataModule or a train loader, with a Trainer of these options on one device.

    Raises:
        TransferConfigError: an option is one that trials set themselves.
    """
    if not isinstance(options, Mapping):
        raise TransferConfigError(
            f"trainer is {a_class(options)}; pass a dict of its options: trainer={{'accelerator': 'gpu'}}."
        )
    devices = options.get("devices", 1)
    is_one = devices in (1, "1") or (isinstance(devices, list | tuple) and len(devices) == 1)
    taken = sorted({*options} & OWN | {name for name in UNEQUAL if options.get(name)})
    taken += [f"devices={devices!r}"] * (not is_one)
    if taken:
        raise TransferConfigError(
            f"trainer= has {', '.join(taken)}: trials set their own callbacks and length, and use one device. Leave "
            "that out."
        )
    if isinstance(data, type):
        raise TransferConfigError(f"The data is the class {data.__name__}; write {data.__name__}().")
    make, given = trainer_class(module), {"devices": 1, **options}
    trainer_of(make, given)  # refuses options
    loader = loader_of(data, make, given)
    datamodule = None if loader is data else data
    return Trials(loader, make, given, datamodule=datamodule, unaugmented=unaugmented, adapt=adapt)


def _serving(datamodule: Any, loader: Any) -> Any:
    """Return a copy of a DataModule that has the user's hooks, is already set up and returns this loader."""
    twin = copy.copy(datamodule)
    twin.prepare_data = twin.setup = twin.teardown = lambda *args, **options: None
    twin.train_dataloader = lambda: loader
    return twin
