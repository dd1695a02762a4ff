"""Train and score candidates of a search for layers, as the user's module would be trained (ours)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_transfer.batches import is_right
from lightning_transfer.datasets import load
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.first_loss import kind_by
from lightning_transfer.glue.namespaces import AnyCallback
from lightning_transfer.glue.trials import Scoring, Trials
from lightning_transfer.methods.collaborative.apply import ensemble_of, put_together
from lightning_transfer.methods.collaborative.members import by_name
from lightning_transfer.methods.collaborative.search.options import LayerSearch
from lightning_transfer.methods.collaborative.search.plan import Evaluation, LayerPlan
from lightning_transfer.methods.collaborative.search.strategies import Layers
from lightning_transfer.methods.collaborative.together import Together
from lightning_transfer.networks import loaded
from lightning_transfer.randomness import seeded
from lightning_transfer.reading import apart
from lightning_transfer.splitting import held_out
from lightning_transfer.stamps import digest
from lightning_transfer.tracing import evaluating
from lightning_transfer.twins import copied
from lightning_transfer.values import value_of

SETTINGS = ("strategy", "particles", "iterations", "proxy_epochs", "seed", "validation")  # that change the result
STEPPING = {  # options of a Trainer that change what a step does, with their defaults
    "precision": "32-true",
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
}
NUM_DIGESTED = 16  # images that go into the digest of a dataset


class Candidates:
    """Train candidates, numbers of frozen layers, on a part of the training images, and score them on the others.

    Args:
        options: of the search.
        module: the user's, without other networks.
        together: how candidates are trained.
        trials: on parts of the user's training images.
        callback: returns the callback that trains with given options.

    Raises:
        TransferConfigError: a network does not fit beside the user's own, or candidates cannot be scored.
    """

    def __init__(
        self,
        options: LayerSearch,
        module: Any,
        together: Together,
        trials: Trials,
        callback: Callable[[Together], AnyCallback],
    ) -> None:
        self.options, self.module, self.trials, self.callback = options, module, trials, callback
        labels, loader = trials.labels, trials.loader
        out = held_out(labels, options.validation, groups=trials.groups, seed=options.seed)
        self.kept = sorted({*range(len(labels))} - {*out})
        self.num_held_out = len(out)
        self.held = partial(trials.held, out)
        with seeded(options.seed, 0):
            networks = {name: loaded(source) for name, source in by_name(together.sources).items()}
            self.together = replace(together, sources=networks, frozen_layers=None)
            self._check_batch(next(iter(self.held())))
        seen = apart(lambda: _seen((trials.dataset, trials.clean), options.seed), loader.num_workers)
        twin = copied(module)
        put_together(twin, self.together)
        ensemble = ensemble_of(twin)
        ensemble.check_forward()
        depths = ensemble.depths(getattr(module, "example_input_array", None))
        self.num_layers = {name: len(depth.convs) for name, depth in depths.items()}
        self.most = {name: depth.most for name, depth in depths.items()}
        self.settings = {
            **{key: str(getattr(options, key)) for key in SETTINGS},
            "networks": str({name: f"{number} convolutions" for name, number in self.num_layers.items()}),
            "weights": digest([_weights(each) for each in (module, *networks.values())]),
            "batch size": str(loader.batch_size),
            "training images": f"{len(labels)}, {digest(labels)}, {seen}",
            "held out": f"{len(out)}, {digest(out)}",
            "hyperparameters": re.sub(" at 0x[0-9a-f]+", "", str(dict(getattr(module, "hparams", {})))),
            "trainer": str({key: trials.options.get(key, usual) for key, usual in STEPPING.items()}),
            "weight": str(together.weight),
            "loss": value_of(together.loss),
        }

    def plan(self, evaluations: Sequence[Evaluation]) -> LayerPlan:
        """Return the plan of the best candidate; of equal ones the one that freezes least; of failed ones no layers."""
        best = max(evaluations, key=lambda evaluation: (evaluation.fitness, -sum(evaluation.layers)), default=None)
        layers = (0,) * len(self.most) if best is None or best.accuracy is None else best.layers
        return LayerPlan(dict(zip(self.most, layers, strict=True)), self.num_layers, tuple(evaluations), self.settings)

    def evaluate(self, layers: Layers) -> Evaluation:
        """Train a candidate and score it; if it fails, return the reason."""
        together = replace(self.together, frozen_layers=dict(zip(self.most, layers, strict=True)))
        try:
            scoring = Scoring(self.held(), self._right)
            callbacks = [self.callback(together), scoring]
            self.trials.train(
                self.module, self.kept, callbacks, seed=self.options.seed, epochs=self.options.proxy_epochs
            )
        except Exception as error:  # of any kind, such as a lack of memory
            return Evaluation(layers, None, f"{type(error).__name__}: {error}".partition("\n")[0])
        return Evaluation(layers, scoring.best)

    def _check_batch(self, batch: Any) -> None:
        """Refuse batches on which candidates cannot be scored."""
        if not isinstance(batch, list | tuple) or not isinstance(batch[0], Tensor):
            raise TransferConfigError(
                f"A search scores candidates on batches (images, ...), and the train loader gives a "
                f"{type(batch).__name__}. Give frozen_layers instead of a search, or a loader of tuples."
            )
        self.together.labels(batch)

    def _right(self, module: Any, batch: Any) -> Tensor:
        """Return (B,) how right the mean of the networks is, 0 to 1."""
        with evaluating(module):
            logits = ensemble_of(module).ask(batch[0], module).mean(0)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the logits of the networks are not finite")
        labels = self.together.labels(batch)
        return is_right(logits, labels, kind_by(self.together.loss, logits, labels))


def _seen(datasets: Sequence[Any], seed: int) -> str:
    """Return a digest of a few images of each dataset, in any process the same."""

    def images(dataset: Any) -> list[Tensor]:
        places = range(0, len(dataset), max(1, len(dataset) // NUM_DIGESTED))
        return [torch.as_tensor(np.asarray(load(dataset, index, of="target")[0])) for index in places]

    with seeded(seed, 0):  # they may be augmented
        return digest([images(dataset) for dataset in datasets])


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
