"""Start a new head as the linear probe of the pretrained features, as a callback (LP-FT, arXiv 2202.10054)."""

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_transfer import ranks
from lightning_transfer.datasets import AnyDataset, AnyLoader, groups_of
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.checkpoints import check_structure
from lightning_transfer.glue.copies import holders_of
from lightning_transfer.glue.hearing import Hearing
from lightning_transfer.glue.loaders import target_dataset
from lightning_transfer.glue.logs import log_options, progress_of, say
from lightning_transfer.glue.moving import as_validated
from lightning_transfer.glue.namespaces import AnyCallback
from lightning_transfer.glue.samplers import importance_of
from lightning_transfer.glue.sides import Side, target_side
from lightning_transfer.glue.standin import Before
from lightning_transfer.glue.trainer import Weakly, averages_of, check_supported, named
from lightning_transfer.methods.probe.drawing import draw
from lightning_transfer.methods.probe.functional import Start, fit_start
from lightning_transfer.methods.probe.reading import (
    HOW,
    UNMIXED,
    check_comes_out,
    check_untied,
    features_of,
    images_and_classes,
    last_linear,
)
from lightning_transfer.methods.probe.watching import FirstSteps
from lightning_transfer.naming import nesting, options_of, plain
from lightning_transfer.normalizing import are_new, normalizing_layers
from lightning_transfer.randomness import seeded
from lightning_transfer.roles import find_heads

MOST = 5000  # images that a probe learns from: with more, where training starts matters little
BATCH = 32  # if the loader does not say


class ProbeStart(AnyCallback):
    """Start the head of a new classifier as the linear probe of the network's features (LP-FT, arXiv 2202.10054).

    Before the first step the training images run once through the network in eval mode. A logistic regression is fitted
    on the input of the head's last Linear, and its weight and bias are copied into that Linear. A resumed run keeps its
    head. Fitting the head first is the paper's. Fitting it to its optimum, with a penalty chosen by cross-validation
    and on about 5,000 images at most, is ours. The authors also keep the network in eval mode: if it has BatchNorm, add
    `FrozenStatistics`. With an ImageNet network and ten images of a class, the two are above fine-tuning on all six
    targets, by 2.9 ± 2.5 points on average; `ProbeStart` alone is 4 points above on two and 2 below on the others, and
    most of these intervals include 0 (examples/benchmarks/regime.md). It can be combined with every method; each of
    several networks starts with the probe of its own features. Put it before callbacks that copy the weights when
    training starts.

    Args:
        head: dotted path of the classifier, or "auto".
        unaugmented: the training images, in the same order, without augmentation; by default the train loader's. Pass
            a DataLoader of them if the train loader's `collate_fn` augments too, as MixUp does.
        forward: runs images through the module, if its own forward takes more than images: a function of (module,
            images) that reaches the head or returns the features.
        adapt: turns a batch into (images, class numbers), for example a dictionary.

    Raises:
        TransferConfigError: an option does not fit; before the first step: the labels are not class numbers, or the
            head is not a Linear with a bias.

    Example:
        >>> ProbeStart(head="model.fc")
        ProbeStart(head='model.fc')
    """

    def __init__(
        self,
        *,
        head: str = "auto",
        unaugmented: AnyDataset | AnyLoader | None = None,
        forward: Callable[[Any, Tensor], Any] | None = None,
        adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        for name, function in (("forward", forward), ("adapt", adapt)):
            if function is not None and not callable(function):
                raise TransferConfigError(f"{name}={function!r}; it takes a function.")
        images = unaugmented.dataset if isinstance(unaugmented, DataLoader) else unaugmented
        is_path = isinstance(images, str | os.PathLike)
        if is_path or (images is not None and not hasattr(images, "__getitem__")):
            raise TransferConfigError(
                f"unaugmented={unaugmented!r}; it takes the training images as a dataset, such as loader.dataset or "
                "ImageFolder(path, transform)."
            )
        self.head, self.unaugmented, self.forward, self.adapt = head, unaugmented, forward, adapt
        self._fit: Weakly | None = None  # the module of the last fit
        self._hearing: Hearing | None = None  # that computed the features of this run
        self._steps: FirstSteps | None = None  # while they are watched
        self._stand_in: Before | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies that spread parameters over processes, and a checkpoint whose layers are changed."""
        if stage == "fit":
            check_supported(trainer)
        alike = [each for each in trainer.callbacks if isinstance(each, ProbeStart) and each.head == self.head]
        if len(alike) > 1:
            raise TransferConfigError(f"The Trainer has {len(alike)} ProbeStart of the same head. Leave one.")
        if not any(isinstance(callback, TransferCallback) for callback in trainer.callbacks):  # these look themselves
            check = partial(check_structure, name="ProbeStart", structure=None)
            self._stand_in = Before(pl_module, "on_load_checkpoint", trainer, check)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the head, if no batch was trained on before."""
        last, self._fit = self._fit, Weakly(pl_module)
        has_trained = trainer.fit_loop.epoch_loop.total_batch_idx >= 0  # by a checkpoint, or in the Trainer's last fit
        is_other = last is not None and not last.is_of(pl_module) and trainer.ckpt_path is None
        if has_trained and not is_other:
            return
        log_options(trainer, plain({"transfer/ProbeStart": options_of(self)}))
        try:
            starts = ranks.from_first(lambda: self._fitted(trainer, pl_module))
        except Exception as error:
            error.add_note("This happened while ProbeStart looked at the training images, before the first step.")
            raise
        before = {path: pl_module.get_submodule(path).weight.detach().clone() for path in starts}
        for path, start in starts.items():  # all of them before any is set
            _check_precision(start.weight, before[path].dtype, path)
        with torch.no_grad():
            for module, (path, start) in product([pl_module, *averages_of(trainer)], starts.items()):
                layer = module.get_submodule(path)
                layer.weight[start.rows] = start.weight.to(layer.weight)
                layer.bias[start.rows] = start.bias.to(layer.bias)
        self._warn_of_copies(trainer, pl_module, before)
        keeps = named(trainer.callbacks, {"FrozenStatistics", "StochasticWeightAveraging"})  # which exclude each other
        layers = dict(normalizing_layers(pl_module))
        new = {path: is_new for path, is_new in are_new(layers).items() if layers[path].training}
        if not keeps and not all(new.values()):
            say(
                trainer,
                "ProbeStart: in training, BatchNorm uses the statistics of each batch, so the features differ from "
                "those that the probe was fitted to. Add FrozenStatistics() to keep the pretrained statistics.",
            )
        if any(new.values()):
            *_, last_new = (path for path in new if new[path])
            say(
                trainer,
                f"ProbeStart: {last_new!r} is a new BatchNorm. If the features pass through it, those of training "
                "differ from those that the probe was fitted to. Load pretrained weights, or leave it out of the head.",
            )
        num_classes = max(2, *(len(start.rows) for start in starts.values()))
        is_exact = not new or bool(named(trainer.callbacks, {"FrozenStatistics"}))
        self._steps = FirstSteps(trainer, num_classes, pl_module.device, self._hearing, is_exact=is_exact)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Listen to the first batch."""
        if self._steps is not None:
            self._steps.begin(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Look at the images of the first batch."""
        if self._steps is not None:
            self._steps.compare()
            self._steps.end()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of the first steps."""
        if self._steps is not None and self._steps.stepped(trainer, pl_module, outputs):
            self._steps.read()
            self._steps = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the loss if training had fewer steps."""
        if self._steps is not None:
            self._steps.read()
            self._steps = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was found."""
        if self._steps is not None:
            self._steps.end()
        self._steps = self._hearing = None
        if self._stand_in is not None and self._stand_in.run.is_of(trainer):
            self._stand_in.remove()
            self._stand_in = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was found after a crash or Ctrl-C, when Lightning does not call teardown."""
        self.teardown(trainer, pl_module, "")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stand_in": None, "_hearing": None, "_steps": None}  # a copy is not attached

    @staticmethod
    def _warn_of_copies(trainer: Any, module: Any, before: dict[str, Tensor]) -> None:
        for path, weight in before.items():
            if holders := holders_of(weight, trainer, module):
                warnings.warn(
                    f"The head {path!r} starts as a linear probe, and {', '.join(holders)} holds a copy of it from "
                    "before, for example for an average of the weights. Copy the weights when training starts, in "
                    "on_train_start, after ProbeStart.",
                    stacklevel=2,
                )

    def _fitted(self, trainer: Any, module: Any) -> dict[str, Start]:
        """Return what each head starts as, by the path of its Linear."""
        side = target_side(trainer, most=MOST, unaugmented=self.unaugmented)
        data = target_dataset(None, trainer)
        groups = groups_of(data)
        with seeded(0, 0), torch.random.fork_rng(range(torch.cuda.device_count())):  # images may be augmented at random
            drawn, importance = draw(data, importance_of(trainer.train_dataloader), most=MOST)
            heads = find_heads(module, self.head, probe=partial(self._run_one, trainer, module, side))
            hearing = Hearing(trainer, module, heads[0], forward=self.forward, how=HOW)
            layers = dict(last_linear(head) for head in heads)
            check_untied(module, layers)
            seen = list(self._look(hearing, layers, side, drawn))
            self._hearing = hearing
        labels, *features = (torch.cat(parts) for parts in zip(*seen, strict=True))
        belongs = None if groups is None else [groups[index] for index in drawn]
        starts = {}
        for (path, layer), rows in zip(layers.items(), features, strict=True):
            given: dict[str, Any] = {"groups": belongs, "importance": importance}
            start = starts[path] = fit_start(rows, labels, num_outputs=layer.out_features, **given)
            missing = max(layer.out_features, 2) - len(labels.unique())
            say(
                trainer,
                f"ProbeStart: the head {path!r} starts as a linear probe of {len(labels)} training images (penalty "
                f"{start.penalty:g}; accuracy on held-out images {start.accuracy:.1%})."
                + (f" {missing} of its classes have no image among these and keep their weights." if missing else ""),
            )
        return starts

    def _look(
        self, hearing: Hearing, layers: dict[str, nn.Linear], side: Side, drawn: list[int]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield labels, and features for each layer, a batch at a time."""
        path, layer = next(iter(layers.items()))
        with progress_of(hearing.trainer)("Linear probe of the training images", len(drawn)) as step:
            for indices, batch in side.batches(drawn, hearing.trainer.train_dataloader.batch_size or BATCH):
                given, what = self._moved(hearing.trainer, batch), "adapt= returned" if self.adapt else "A batch is"
                images, labels = images_and_classes(given, path, layer.out_features, what=what)
                if len(images) != len(indices):
                    raise TransferConfigError(
                        f"The loader's collate_fn made {len(images)} images of {len(indices)} samples; expected one of "
                        f"each. Pass a loader whose collate_fn keeps them: {UNMIXED}."
                    )
                heard, output = hearing.hear(images, list(layers.values()))
                each = zip(layers.items(), heard, strict=True)
                yield labels.cpu(), *(features_of(*named, calls, indices) for named, calls in each)
                if len(layers) == 1:  # several networks predict with their mean
                    check_comes_out(path, heard[0][0][1], output)
                step(len(images))

    def _run_one(self, trainer: Any, module: Any, side: Side) -> None:
        """Run an image, by which the last layer is found if no name shows it."""
        _, batch = next(side.batches([0], 1))
        (self.forward or type(module).__call__)(module, self._moved(trainer, batch)[0])

    def _moved(self, trainer: Any, batch: Any) -> Any:
        """Return a batch on the device, after the user's hooks and `adapt`."""
        moved = as_validated(trainer, batch)
        if self.adapt is None:
            return moved
        try:
            return self.adapt(moved)
        except Exception as error:
            error.add_note(f"This happened in ProbeStart(adapt=) with a batch {nesting(moved)}.")
            raise

    def __repr__(self) -> str:
        kept = {name: getattr(self, name) for name in ("unaugmented", "forward", "adapt")}
        shown = [f"{name}={value!r}" for name, value in kept.items() if value is not None]
        return f"ProbeStart({', '.join([f'head={self.head!r}', *shown])})"


def _check_precision(weight: Tensor, dtype: torch.dtype, path: str) -> None:
    """Raise if a head's precision cannot hold the weights of its probe."""
    if not bool(weight.to(dtype).isfinite().all()):
        raise TransferConfigError(
            f"The probe's weights reach {float(weight.abs().max()):.3g}, which {dtype} cannot hold, because the "
            f"features of {path!r} are small. Train in another precision, such as bf16-mixed, or leave ProbeStart out."
        )
