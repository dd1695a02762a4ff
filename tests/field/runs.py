"""Each method on one module, and what it then has to have done; oracles are plain runs and passes written out."""

import copy
import functools
import random
import warnings
from contextlib import contextmanager

import lightning.pytorch as L
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate

import lightning_transfer as lt
from tests import toys
from tests.field import nets, shapes
from tests.field.shapes import CLASSES, SOURCE_CLASSES, Pictures

BATCH = 4
STEPS = 3  # of an epoch
WEIGHT = 0.5  # of the source loss
OF_THE_SOURCE = ("adapt", "forward", "loss", "batch_hooks")  # options of a SourceTask, not of a callback
FAR = 10.0  # what the source's pixels are shifted by, where it has to lie far


def build(shape):
    torch.manual_seed(0)
    return shape()


def built(shape):
    """The module as it is once its network exists."""
    module = build(shape)
    if hasattr(shape, "configure_model"):
        module.setup("fit")
        module.configure_model()
    return module


def target(shape):
    return Pictures(shape, BATCH * STEPS, CLASSES, seed=1)


def source(shape, shift=0.0):
    return Pictures(shape, 14, SOURCE_CLASSES, seed=2, shift=shift)


class Watching:
    """Notes losses, the first step's gradients and which parameters moved; made a Callback by `watch`."""

    def __init__(self):
        self.gradients, self.losses, self.steps = {}, [], 0

    def on_train_start(self, trainer, module):
        self.first = {name: param.detach().clone() for name, param in module.named_parameters()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps += 1
        if self.steps == 1:
            self.gradients = gradients(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer, module):
        now = module.named_parameters()
        self.moved = {name for name, param in now if not torch.equal(param, self.first.get(name, param))}


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None and "transfer" not in n}


def namespace(module):
    return pl if isinstance(module, pl.LightningModule) else L


def fit(module, *callbacks, max_steps=-1):
    """Fit, and give the Trainer and what was seen."""
    packages = namespace(module)
    watch = type("Watch", (Watching, packages.Callback), {})()
    callbacks = [*type(module).callbacks(), *callbacks, watch]
    runner = toys.trainer(callbacks, namespace=packages, max_epochs=type(module).epochs, max_steps=max_steps)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    shape = type(module)
    loaders = (DataLoader(data, batch_size=BATCH) for data in (target(shape), target(shape)))
    try:
        runner.fit(module, *loaders)
    except (lt.TransferConfigError, UserWarning) as error:
        error.steps, error.module = watch.steps, module
        raise
    return runner, watch


@functools.cache
def plain(shape):
    """Weights and what was seen of a run without this package."""
    module = build(shape)
    _, watch = fit(module)
    return toys.weights(module), watch


def anatomy(module):
    """Everything of a module that a callback could leave something in."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_load_state_dict_post_hooks")
    return {
        "attributes": {name for name in vars(module) if name not in ("_hparams", "order", "_log_hyperparams")},
        "modules": [(name, type(child)) for name, child in module.named_modules()],
        "training": [child.training for child in module.modules()],
        "trainable": [(name, param.requires_grad) for name, param in module.named_parameters()],
        "hooks": [(name, [len(getattr(child, hook)) for hook in hooks]) for name, child in module.named_modules()],
        "state": list(module.state_dict()),
    }


def run_all(runner, module):
    """Validation, test and prediction of the module as it is trained."""
    loader = DataLoader(target(type(module)), batch_size=BATCH)
    runner.validate(module, loader, verbose=False)
    runner.test(module, loader, verbose=False)
    runner.predict(module, loader)


@functools.cache
def untouched(shape):
    """What there is of a module that was run without this package."""
    module = build(shape)
    run_all(fit(module)[0], module)
    return anatomy(module)


def as_found(module, *, besides=()):
    """Assert that nothing is left of a method in a module."""
    found, expected = anatomy(module), untouched(type(module))
    assert [what for what in found if what not in besides and found[what] != expected[what]] == []


@contextmanager
def left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.NoEffectWarning)
        yield


def task(data, options, **given):
    mine = {key: value for key, value in options.items() if key in OF_THE_SOURCE}
    return lt.SourceTask(data, num_classes=SOURCE_CLASSES, **{**given, **mine})


def for_callback(options):
    return {key: value for key, value in options.items() if key not in OF_THE_SOURCE}


def source_loss(features, data, source_task, drawn, head):
    """What the source adds to a step, by hand."""
    batch = default_collate([data[index] for index in drawn])
    labels = source_task.adapt(batch)[1] if source_task.adapt else batch[1]
    return WEIGHT * source_task.loss(head(features), labels)


def close(found, expected):
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * scale, name


def twin_of(module, callback):
    """The module before its first step, in training, and the source head that joins it."""
    twin = built(type(module))
    for own in type(module).callbacks():
        own.freeze_before_training(twin)
    twin.train()
    head = callback.part.source.make_head(twin.get_submodule(type(module).head_path), "")
    return twin, head


def added_apart(module, watch, callback, data, drawn):
    """The first gradient is the plain run's and that of the source loss on a pass of its own."""
    assert callback.part.head_path == type(module).head_path
    twin, head = twin_of(module, callback)
    features = twin.features(twin.seen(data.images[drawn]))
    source_loss(features, data, callback.part.source, drawn, head).backward()
    theirs = gradients(twin)
    expected = {name: value + theirs.get(name, 0) for name, value in plain(type(module))[1].gradients.items()}
    assert watch.gradients.keys() <= expected.keys() | theirs.keys()
    close(watch.gradients, {**theirs, **expected})


def soft(shape, options):
    """The source task with a given weight, in passes of its own."""
    data, module = source(shape), build(shape)
    callback = lt.SoftFinetuning(task(data, options), weight=lt.Schedule(WEIGHT, WEIGHT), **for_callback(options))
    runner, watch = fit(module, callback)
    drawn = data.loaded[-watch.steps * BATCH :][:BATCH]
    run_all(runner, module)
    as_found(module)
    added_apart(module, watch, callback, data, drawn)


def auto(shape, options):
    """Far from the source the run is plain fine-tuning, to the bit."""
    module = build(shape)
    callback = lt.SoftFinetuning(task(source(shape, FAR), options), **for_callback(options))
    with left_out():
        runner, _ = fit(module, callback)
    assert callback.part.gap > 0.8
    assert callback.part.is_left_out
    toys.assert_same(toys.weights(module), plain(shape)[0])
    run_all(runner, module)
    as_found(module)


def bank():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = nn.Sequential(nn.Conv2d(3, 4, 3))
    return lt.FilterBank.from_model(network, layers=["0"], normalize=False)


class Asking:
    """Asks the network by hand before the second step; made a Callback by `selective`."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            modes = [(layer, layer.training) for layer in module.modules()]
            module.eval()
            with torch.no_grad():
                features = module.features(module.seen(target(type(module)).images))
                self.logits = module.get_submodule(type(module).head_path)(features).flatten(1)
            for layer, mode in modes:
                layer.training = mode


def selective(shape, options):
    """Borrowed images join as a source's, and a round asks the network what its owner would."""
    data, module = source(shape), build(shape)
    neighbors = lt.Neighbors(k=2, bank=bank(), rounds=1, every=1, hard_entropy=1.5)
    weight = lt.Schedule(WEIGHT, WEIGHT)
    callback = lt.SelectiveJointFinetuning(
        task(data, options), neighbors=neighbors, weight=weight, **for_callback(options)
    )
    ask = type("Ask", (Asking, namespace(module).Callback), {})()
    runner, watch = fit(module, callback, ask)
    run_all(runner, module)
    as_found(module)
    drawn = data.loaded[-watch.steps * BATCH :][:BATCH]
    added_apart(module, watch, callback, data, drawn)
    is_binary = ask.logits.shape[1] == 1
    logits = torch.cat([torch.zeros_like(ask.logits), ask.logits], 1) if is_binary else ask.logits
    probabilities = logits.softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1)
    right = logits.argmax(1) == target(shape).labels % logits.shape[1]
    hard = zip(right, entropy, strict=True)
    assert callback.part.chooser.budget.tolist() == [2 if ok and e < 1.5 else 6 if ok else 10 for ok, e in hard]


def joint(shape, options):
    """The source task in the same pass."""
    data, module = source(shape), build(shape)
    given = task(data, options, forward="joint")
    callback = lt.SoftFinetuning(given, weight=lt.Schedule(WEIGHT, WEIGHT), **for_callback(options))
    runner, watch = fit(module, callback)
    run_all(runner, module)
    as_found(module)
    assert callback.part.head_path == shape.head_path
    drawn = data.loaded[-watch.steps * BATCH :][:BATCH]
    twin, head = twin_of(module, callback)
    both = Together(twin, lambda features: source_loss(features, data, given, drawn, head))
    both.images = twin.seen(data.images[drawn])
    close(watch.gradients, fit(twin, max_steps=1)[1].gradients)


class Together:
    """Target and source images in one pass, written out: methods of a twin are replaced by what does both."""

    def __init__(self, twin, loss_of):
        self.twin, self.loss_of, self.loss, self.is_due = twin, loss_of, 0.0, False
        path = type(twin).entry
        network, head = twin.get_submodule(path) if path else twin, twin.get_submodule(type(twin).head_path)
        self.network, self.head, self.step = network.forward, head.forward, twin.training_step
        network.forward, head.forward = self.append, self.split
        twin.hparams.clear()  # which may hold the network that was just changed
        twin.training_step = functools.wraps(self.step)(lambda *args: self.add(*args))  # Lightning reads its signature

    def append(self, x):
        is_due, self.is_due = self.is_due, False  # the first pass of a step takes the source images along
        return self.network(torch.cat([x, self.images]) if is_due else x)

    def split(self, features):
        if len(features) > BATCH:
            self.loss = self.loss_of(features[BATCH:])
        return self.head(features[:BATCH])

    def add(self, *args):
        self.is_due = True
        output = self.step(*args)
        return (output["loss"] if isinstance(output, dict) else output) + self.loss


def moved_as_plain(shape, module, *, least_dims=1):
    """Assert that every parameter moved that moves in plain fine-tuning, and has so many dimensions."""
    first = dict(built(shape).named_parameters())
    moved = {name for name, param in module.named_parameters() if not torch.equal(param, first[name])}
    assert moved >= {name for name in plain(shape)[1].moved if first[name].ndim >= least_dims}


def is_plain(shape, callback, remove):
    """Assert that a method that is turned off trains as no method does, to the bit."""
    module = build(shape)
    fit(module, callback)
    remove(module)
    toys.assert_same(toys.weights(module), plain(shape)[0])


def adafilter(shape, options):
    """All gates open it is fine-tuning, to the bit; else gates and all that was tuned before move."""
    is_plain(shape, lt.AdaFilter(estimator="all_tuned", **options), lt.functional.remove_adafilter)
    module = build(shape)
    runner, watch = fit(module, lt.AdaFilter(gate_width=4, gate_bias=0.1, **options))
    assert any(".gate." in name for name in watch.moved)
    run_all(runner, module)
    lt.functional.remove_adafilter(module)
    moved_as_plain(shape, module)
    as_found(module)


def gated(shape, options):
    """Without a module it is fine-tuning, to the bit; else the transfer module and all that was tuned before move."""
    nothing = lt.GatedTransfer(ratio=None, dropout=0.0, aux_weight=0, **options)
    is_plain(shape, nothing, lt.functional.remove_gated_transfer)
    module = build(shape)
    runner, watch = fit(module, lt.GatedTransfer(ratio=4, gate_dropout=0.0, dropout=0.0, **options))
    parts = {"squeeze", "expand"}
    assert {name.split(".")[-2] for name in watch.moved} >= parts
    run_all(runner, module)
    lt.functional.remove_gated_transfer(module)
    moved_as_plain(shape, module)
    as_found(module)


class Keeping:
    """Keeps a copy of something before the first step; made a Callback where it is used."""

    def __init__(self, keep):
        self.keep, self.kept = keep, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.kept = self.kept or copy.deepcopy(self.keep(module))


def keeping(module, keep):
    return type("Keep", (Keeping, namespace(module).Callback), {})(keep)


def aux(shape, options):
    """The first loss is the plain run's and .2 of the auxiliary classifier's, by hand."""
    module = build(shape)
    callback = lt.GatedTransfer(ratio=None, dropout=0.0, aux_weight=0.2, **options)
    keep = keeping(module, lambda _: callback.part.classifier)
    runner, watch = fit(module, callback, keep)
    run_all(runner, module)
    twin, heard = built(shape), []
    twin.hparams.clear()  # which may hold the network that is listened to
    twin.get_submodule(callback.part.tap).register_forward_hook(lambda layer, args, given: heard.append(given))
    _, own = fit(twin, max_steps=1)
    logits, labels = keep.kept(heard[0]), target(shape).labels[:BATCH]
    aux_loss = shape.criterion(logits, labels, 2) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)
    torch.testing.assert_close(watch.losses[0], own.losses[0] + 0.2 * float(aux_loss.detach()), rtol=1e-5, atol=0)
    lt.functional.remove_gated_transfer(module)
    moved_as_plain(shape, module)
    as_found(module)


def several(shape, options):
    """The first loss is each network's own and .2 of what they disagree by, by hand; alone it is plain fine-tuning."""
    alone = lt.functional.remove_collaborative
    is_plain(shape, lt.CollaborativeFinetuning([], **options), alone)
    module = build(shape)
    keep = keeping(module, lambda module: ensemble_in(module).members["other"])
    runner, watch = fit(module, lt.CollaborativeFinetuning({"other": nets.Other()}, **options), keep)
    run_all(runner, module)
    assert any(".other." in name for name in watch.moved)
    own = accuracy_of_the_first(module)
    assert abs(ensemble_in(module).accuracies["own"] - own) < 1e-6
    twin = built(shape).train()
    images, labels = twin.seen(target(shape).images[:BATCH]), target(shape).labels[:BATCH]
    logits = [twin.get_submodule(shape.head_path)(twin.features(images)).flatten(1), keep.kept(images)]
    mean = sum(logits) / 2
    apart = sum((each - mean).norm(dim=1).mean() for each in logits) / 2
    expected = sum(shape.criterion(each, labels, CLASSES) for each in logits) + 0.2 * apart
    torch.testing.assert_close(watch.losses[0], float(expected.detach()), rtol=1e-5, atol=0)
    alone(module)
    moved_as_plain(shape, module)
    as_found(module)


def accuracy_of_the_first(module):
    """Of the user's own network among others, by hand, on the images of the last validation."""
    module.eval()
    with torch.no_grad():
        images, own = module.seen(target(type(module)).images), ensemble_in(module).members["own"].network
        logits = own(module.features(images) if isinstance(own, nn.Linear) else images)  # whose head stands apart
    module.train()
    if isinstance(module, shapes.MultiLabel):
        rows = torch.stack([shapes.multi_hot(int(label), CLASSES) for label in target(type(module)).labels])
        return float(((logits > 0) == (rows > 0)).float().mean())
    says = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    return float((says == target(type(module)).labels % max(logits.shape[1], 2)).float().mean())


def ensemble_in(module):
    return next(child for child in module.modules() if isinstance(child, lt.nn.CollaborativeEnsemble))


def probe(shape, options):
    """Before the first step the head has moved, and nothing else; then all that was tuned before moves."""
    module = build(shape)
    first = dict(built(shape).named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "After ProbeStart the loss rose")  # the networks are not pretrained
        runner, watch = fit(module, lt.ProbeStart(**options))
    started = {name for name, param in watch.first.items() if not torch.equal(param, first[name])}
    assert {name.rpartition(".")[2] for name in started} == {"weight", "bias"}
    assert len({name.rpartition(".")[0] for name in started}) == 1
    run_all(runner, module)
    moved_as_plain(shape, module)
    as_found(module)


class Seen:
    """Gives BatchNorm the statistics of a pretraining; made a Callback where it is used."""

    def on_train_start(self, trainer, module):
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.fill_(0.25)


def statistics(shape, options):
    """The running statistics are kept, and all weights that were tuned before move."""
    module = build(shape)
    runner, _ = fit(
        module, type("Pretrained", (Seen, namespace(module).Callback), {})(), lt.FrozenStatistics(**options)
    )
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers
    assert all(bool((layer.running_var == 0.25).all()) for layer in layers)
    run_all(runner, module)
    moved_as_plain(shape, module, least_dims=2)  # the clipped step of BatchNorm's weight of 1 may be lost in rounding
    as_found(module)


def advise(shape, options):
    """All images are scored, by the probe and after fine-tuning, and the module is not touched."""
    module, untouched = build(shape), build(shape)
    data = DataLoader(target(shape), batch_size=BATCH)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    mine = {key: value for key, value in options.items() if key in ("head", "adapt")}
    packed = task(source(shape), {key: value for key, value in options.items() if key != "head"})
    advice = lt.advise(module, data, source=packed, candidates={}, steps=1, trainer=quiet, **mine)
    assert (advice.measured.images, advice.measured.classes) == (
        len(data.dataset),
        2 if shape is shapes.OneLogit else len({*data.dataset.labels.tolist()}),
    )
    assert advice.measured.scored == len(data.dataset)
    assert [each.name for each in advice.candidates] == ["linear probe"]
    assert anatomy(module) == anatomy(untouched)
    toys.assert_same(toys.weights(module), toys.weights(untouched))


def take_out(module):
    """Take out what a method has put into the network."""
    kinds = {type(child).__name__ for child in module.modules()}
    if "FilterGates" in kinds:
        lt.functional.remove_adafilter(module)
    if "GatedHead" in kinds:
        lt.functional.remove_gated_transfer(module)
    if "CollaborativeEnsemble" in kinds:
        lt.functional.remove_collaborative(module)


METHODS = {
    "statistics": statistics,
    "probe": probe,
    "soft": soft,
    "auto": auto,
    "selective": selective,
    "joint": joint,
    "adafilter": adafilter,
    "gated": gated,
    "aux": aux,
    "several": several,
    "advise": advise,
}
