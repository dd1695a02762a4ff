"""Candidates of a search for layers: trained for a few epochs as the user's module would be, and scored (ours)."""

import copy
import re
import zlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.batches import is_right
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import proxy
from lightning_transfer.methods.collaborative.apply import apply_collaborative, find_ensemble
from lightning_transfer.methods.collaborative.members import loaded, named
from lightning_transfer.methods.collaborative.plan import Evaluation, LayerPlan
from lightning_transfer.methods.collaborative.strategies import Layers
from lightning_transfer.roles import has_forward
from lightning_transfer.source.datasets import load
from lightning_transfer.source.stream import seeded
from lightning_transfer.splitting import held_out
from lightning_transfer.tracing import evaluating
from lightning_transfer.values import value_of

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
    from lightning_transfer.methods.collaborative.layer_search import LayerSearch


class Candidates:
    """Numbers of frozen layers, each trained on a part of the training images and scored on the rest.

    Args:
        search: how.
        module: the user's, its network alone.
        using: the callback that a candidate is trained with.
        trials: on parts of the user's training images.

    Raises:
        TransferConfigError: no network fits beside the user's own.
    """

    def __init__(
        self,
        search: "LayerSearch",
        module: Any,
        using: "CollaborativeFinetuning",
        trials: proxy.Trials,
    ) -> None:
        self.search, self.module, self.using, self.trials = search, module, using, trials
        labels, loader = trials.labels, trials.loader
        out = held_out(labels, search.validation, groups=trials.groups, seed=search.seed)
        self.kept = sorted({*range(len(labels))} - {*out})
        self.num_held_out = len(out)
        self.rest = partial(trials.held, out)
        with seeded(search.seed, 0):
            self.networks = {name: loaded(source) for name, source in named(using.sources).items()}
            self._check_batch(next(iter(self.rest())))
            seen = [_fingerprint(dataset) for dataset in (trials.dataset, trials.clean)]
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
            "weights": f"{_weights_of(module, *self.networks.values()):08x}",
            "batch size": str(loader.batch_size),
            "training images": f"{len(labels)}, {zlib.crc32(repr(labels).encode()):08x}, {seen}",
            "held out": f"{len(out)}, {zlib.crc32(repr(out).encode()):08x}",
            "hyperparameters": re.sub(" at 0x[0-9a-f]+", "", str(dict(getattr(module, "hparams", {})))),
            "trainer": str({key: trials.options.get(key, usual) for key, usual in STEPPING.items()}),
            "weight": str(using.weight),
            "loss": value_of(using.loss),
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
            scoring = proxy.Scoring(self.rest(), self._right)
            callbacks = [self.using.candidate(self.networks, frozen), scoring]
            self.trials.train(twin, self.kept, callbacks, seed=self.search.seed, epochs=self.search.proxy_epochs)
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
        """(B,) how right the networks together are, 0 to 1."""
        found = find_ensemble(module)
        assert found is not None  # it is what is trained
        with evaluating(module), found[1].passes.followed() as passes:
            (module if has_forward(module) else found[1])(batch[0])
            assert passes.logits is not None  # they have just run
            logits = passes.logits.mean(0)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("what the networks say is not finite")
        return is_right(logits, self.using.labels(batch))


def _fingerprint(dataset: Any) -> str:
    """A number that tells images apart, by a few of them."""
    number = 0
    for index in range(0, len(dataset), max(1, len(dataset) // LOOKED_AT)):
        number = zlib.crc32(np.asarray(load(dataset, index, of="target")[0]).tobytes(), number)
    return f"{number:08x}"


def _weights_of(*modules: Any) -> int:
    """A number that tells weights apart."""
    number = 0
    for module in modules:
        for value in module.state_dict().values():
            if not isinstance(value, Tensor):
                continue
            number = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), number)
    return number
