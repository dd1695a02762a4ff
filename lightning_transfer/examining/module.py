"""Find what is wrong with a module, its step and its Trainer: modes, optimizers, criteria, hyperparameters, order."""

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_transfer.batches import class_numbers, label_hint
from lightning_transfer.criteria import CriterionCall
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.examining.diagnosis import Finding, listed
from lightning_transfer.examining.step import Seen
from lightning_transfer.glue.base import TransferCallback
from lightning_transfer.glue.namespaces import NAMESPACES, namespaces_of

CLASSES = ("cross_entropy", "nll_loss")  # criteria of class numbers
LOGITS = ("cross_entropy", "binary_cross_entropy_with_logits")  # criteria that turn scores into probabilities
STEEP = 10.0  # a loss that is so many times as high as before, or as chance, is not noise (ours)
SEE_WHERE = "fit with your own Trainer and max_steps=1, to see where. Leave it if that works: a callback may be needed"
TWICE = 0.1  # by which the ratio of a sum over two halves to one of them may miss 2


def modes_and_optimizers(seen: Seen) -> Iterator[Finding]:
    """Yield what is wrong with a module before its first step."""
    if seen.evaluating:
        yield Finding(
            "eval mode",
            listed(seen.evaluating),
            f"{len(seen.evaluating)} layers are in eval mode, and Lightning does not change that, but their weights "
            "are trained: BatchNorm keeps its old statistics, Dropout is off",
            "self.train() at the end of __init__; or, to keep eval mode, requires_grad_(False) for their weights",
        )
    if seen.drifting:
        yield Finding(
            "frozen BatchNorm drifts",
            listed(seen.drifting),
            f"the weights of {len(seen.drifting)} BatchNorm layers are not trained, but their running statistics "
            "change in each step",
            "network.eval() in on_train_epoch_start, for the frozen network",
        )
    if seen.untrained:
        yield Finding(
            "in no optimizer",
            listed(seen.untrained),
            f"{len(seen.untrained)} parameters get a gradient, but no optimizer holds them, so they never change",
            "torch.optim.SGD(self.parameters(), ...) in configure_optimizers; or, if they are frozen, "
            "network.requires_grad_(False); or, if a callback adds them later, doctor(module, data, trainer)",
        )


def loss_and_labels(seen: Seen) -> Iterator[Finding]:
    """Yield what is wrong with what the criterion gets, and with the loss."""
    wrong = [finding for call in seen.calls for finding in _of_call(call)]
    yield from {finding.name: finding for finding in wrong}.values()
    if seen.step_error is not None and not wrong:
        text = str(seen.step_error).partition("\n")[0]
        yield Finding(
            "training_step fails",
            "training_step",
            f"{type(seen.step_error).__name__}: {text}",
            SEE_WHERE,
        )
    if seen.skipped and seen.skipped == len(seen.losses):
        yield Finding(
            "training_step returns nothing",
            "training_step",
            "it returns None for every batch, so Lightning takes no step, and nothing is trained",
            "return loss, at the end of training_step",
        )
    if "multiple optimizers" in str(seen.fit_error):  # Lightning's words
        yield Finding(
            "several optimizers",
            "configure_optimizers",
            "Lightning does not step several optimizers by itself, so fit raises an error",
            "self.automatic_optimization = False in __init__, and in training_step self.manual_backward(loss) and the "
            "steps of self.optimizers()",
        )
    elif seen.fit_error is not None:
        yield Finding(
            "fit fails",
            "Trainer.fit",
            "for a copy of the module, without loggers and most callbacks, it raises "
            f"{type(seen.fit_error).__name__}: {str(seen.fit_error).partition(chr(10))[0]}",
            SEE_WHERE,
        )
    yield from _rate(seen)
    if len(seen.losses) == 2 and abs(seen.losses[0] / (seen.losses[1] or math.nan) - 2) < TWICE:
        both, one = seen.losses
        yield Finding(
            "the loss is not a mean",
            "training_step",
            f"for some images it is {one:.4f}, for the same images twice {both:.4f}: a sum, or a mean times the batch "
            "size. The learning rate then depends on the batch size, and a term that is added counts less",
            'reduction="mean" in the criterion, and loss without "* len(images)"',
        )


def _rate(seen: Seen) -> Iterator[Finding]:
    """Yield a learning rate with which the loss explodes in the first step, of criteria whose chance level is known."""
    after = seen.loss_after
    if after is None or not seen.calls or not seen.losses or not math.isfinite(seen.losses[0]):
        return
    scores = seen.calls[0].scores
    chance = math.log(max(2, scores.shape[1] if scores.ndim > 1 else 2))
    if not after < STEEP * max(seen.losses[0], chance):
        yield Finding(
            "the first step explodes",
            "configure_optimizers",
            f"for the same images the loss is {seen.losses[0]:.4g} before the first step and {after:.4g} after it",
            "a learning rate ten times lower, or gradient_clip_val=1.0 in the Trainer",
        )


def _of_call(call: CriterionCall) -> Iterator[Finding]:
    scores = call.scores
    if what := _misfit(call):
        yield Finding("labels do not fit", f"{call.name} in training_step", *what)
    if call.name == "nll_loss" and bool((scores > 0).any()):
        yield Finding(
            "probabilities for logits",
            "nll_loss in training_step",
            "it takes logarithms of probabilities, which are never above 0, and gets numbers above 0",
            "F.cross_entropy(logits, labels), of logits without a softmax",
        )
    is_even = call.name == "cross_entropy" and scores.ndim > 1 and bool((scores >= 0).all())
    is_softmax = is_even and bool(((scores.double().sum(1) - 1).abs() < 1e-3).all())
    if call.name in LOGITS and (is_softmax or call.maker.startswith("Sigmoid")):
        last = "softmax" if is_softmax else "sigmoid"
        yield Finding(
            "probabilities for logits",
            f"{call.name} in training_step",
            f"it applies a {last} itself and gets numbers from 0 to 1, as after a {last}: learning is slow",
            f"{call.name}(logits, labels), and the {last} only where you predict",
        )


def _misfit(call: CriterionCall) -> tuple[str, str] | None:
    """Return what is wrong with a criterion's labels and the code to write, or None."""
    scores, target = call.scores, call.target
    found = f"labels of shape {tuple(target.shape)} and type {target.dtype} beside scores {tuple(scores.shape)}"
    if call.name in CLASSES and not target.is_floating_point():
        kept = target[target != call.ignored]
        if kept.numel() and scores.ndim > 1 and not 0 <= int(kept.min()) <= int(kept.max()) < scores.shape[1]:
            return out_of_range(int(kept.min()), int(kept.max()), scores.shape[1])
    elif target.shape == scores.shape and not bool(((target >= 0) & (target <= 1)).all()):
        return (
            f"labels run from {float(target.min()):g} to {float(target.max()):g}; {call.name} takes 0 to 1",
            "labels = (labels == positive).float(), with the number of the positive class",
        )
    if call.error is None:
        return None
    change = ".flatten()" * (target.ndim > 1) + ".long()" * (target.dtype != torch.int64)
    if call.name in CLASSES and class_numbers(target) is not None:
        fix = f"labels{change}" if change else f"scores of shape ({len(target)}, classes), one row for each label"
    else:
        hint = label_hint(target, "{}").replace("batch[1]", "labels")
        fix = hint or f"labels of shape {tuple(scores.shape)}, type float"
    return f"{found}, which {call.name} refuses: {str(call.error).partition(chr(10))[0]}", fix


def out_of_range(least: int, largest: int, outputs: int, *, larger: str = "") -> tuple[str, str]:
    """Return what is said of class numbers that a head does not have, and the code to write.

    Args:
        least: of the labels.
        largest: of the labels.
        outputs: of the head.
        larger: the code to write for labels that are too large; "" for a larger head.
    """
    if least >= 1 and largest == outputs:
        return (
            f"labels run from {least} to {largest}; {outputs} outputs know 0 to {outputs - 1}: labels count from 1",
            "labels = labels - 1",
        )
    return (
        f"labels run from {least} to {largest}; {outputs} outputs know 0 to {outputs - 1}",
        larger or f"a head of {largest + 1} outputs"
        if least >= 0
        else f"ignore_index={least} in the criterion, or no such images",
    )


def hyperparameters(owners: dict[str, Any]) -> Iterator[Finding]:
    """Yield the hyperparameters with which a checkpoint does not load under `weights_only`."""
    for name, owner in owners.items():
        kept = copy.copy(owner).hparams  # which makes an empty set of them where there is none
        unsafe = [key for key, value in kept.items() if not _loads(value)]
        if unsafe:
            yield Finding(
                "unsafe hyperparameters",
                f"{name}.hparams: {listed(unsafe)}",
                "a checkpoint holds them whole, so it does not load with weights_only=True, the default of torch and "
                "Lightning",
                f"self.save_hyperparameters(ignore={unsafe})",
            )


def _loads(value: Any) -> bool:
    if isinstance(value, nn.Module):  # may be large
        return False
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever the object's own pickling raises
        return False
    return True


def namespaces(module: Any, data: Any, trainer: Any) -> Iterator[Finding]:
    """Yield what comes of the other namespace of Lightning than the module."""
    home = namespaces_of(module)
    rest = [data] if trainer is None else [data, trainer, *trainer.callbacks, *trainer.loggers]
    others = [type(one).__name__ for one in rest if (theirs := namespaces_of(one)) and not {*theirs} & {*home}]
    if others:
        mine = "".join(home)
        other = next(name for name in NAMESPACES if name != mine)
        yield Finding(
            "two Lightning namespaces",
            listed(others),
            f"{type(module).__name__} is of {mine}, these are of {other}: neither knows the other's classes",
            f"import {mine} everywhere, and {other} nowhere",
        )


def order(trainer: Any) -> Iterator[Finding]:
    """Yield callbacks of this package that stand on the wrong side of others."""
    for callback in trainer.callbacks if trainer is not None else ():
        if isinstance(callback, TransferCallback):
            try:
                callback.check_order(trainer.callbacks)
            except TransferConfigError as error:
                found, _, fix = str(error).partition(". ")
                yield Finding("order of callbacks", type(callback).__name__, found, fix)
