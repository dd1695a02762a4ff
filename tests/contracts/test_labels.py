"""Labels and losses of every kind beside every method that reads them: learned as meant, or said before any step."""

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.collaborative.search.candidates import Candidates
from tests import toys
from tests.methods import borrowed
from tests.test_batches import loss_by_hand, right_by_hand

BCE = F.binary_cross_entropy_with_logits
ALWAYS = lt.Schedule(1.0, 1.0)


def binary(logits, labels):
    return BCE(logits.flatten(), labels.flatten().float())


def mixup(logits, labels):
    return 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, labels.roll(1))


def several(labels):
    return (torch.arange(toys.TARGET_CLASSES) <= labels[:, None]).float()


def rows(labels):
    return F.one_hot(labels, toys.TARGET_CLASSES).float()


# labels of the dataset, the step's criterion, outputs, kind
CASES = {
    "numbers": (lambda y: y, F.cross_entropy, 5, "class numbers"),
    "int16": (lambda y: y.short(), lambda z, y: F.cross_entropy(z, y.long()), 5, "class numbers"),
    "column": (lambda y: y[:, None], lambda z, y: F.cross_entropy(z, y[:, 0]), 5, "class numbers"),
    "one logit": (lambda y: (y % 2).float(), binary, 1, "one logit"),
    "one logit, column": (lambda y: (y % 2).float()[:, None], binary, 1, "one logit"),
    "multi-hot": (several, BCE, 5, "multi-hot"),
    "soft": (lambda y: 0.7 * rows(y) + 0.3 * rows(y.roll(1)), F.cross_entropy, 5, "soft"),
    "mixup in the step": (lambda y: y, mixup, 5, "class numbers"),
    "sum": (lambda y: y, lambda z, y: F.cross_entropy(z, y, reduction="sum"), 5, "class numbers"),
    "times the batch": (lambda y: y, lambda z, y: F.cross_entropy(z, y) * len(y), 5, "class numbers"),
    "features": (lambda y: y, lambda z, y: z.pow(2).mean(), 3, "class numbers"),
    "strings": (lambda y: y, lambda z, y: F.cross_entropy(z, torch.arange(len(z)) % 5), 5, "class numbers"),
}
RAW = {"labels": lambda batch: batch[1]}
SUM = ("refused", "4 times cross_entropy.*Return the mean over the images", {})
BOTH = ("refused", r"labels=lambda batch: batch\[1\], loss=", {**RAW, "loss": BCE})
AUX = {  # what becomes of a case, in which words, and the options with which it works
    "one logit": ("refused", r"labels=lambda batch: batch\[1\]", RAW),
    "one logit, column": ("refused", r"labels=lambda batch: batch\[1\]", RAW),
    "multi-hot": ("refused", "several labels for each image.*labels=lambda", RAW),
    "soft": ("refused", "soft labels.*labels=lambda", RAW),
    "mixup in the step": ("warned", "If images are mixed.*aux_weight=0", {}),
    "sum": SUM,
    "times the batch": SUM,
    "features": ("refused", "up to 4, and the head 'model.fc' gives 3.*labels=lambda.*aux_weight=0", {}),
    "strings": ("refused", "labels=lambda", {}),
}
SEVERAL = {
    "one logit": ("refused", "one logit.*loss=lambda", {**RAW, "loss": binary}),
    "one logit, column": ("refused", "one logit.*loss=lambda", {**RAW, "loss": binary}),
    "multi-hot": BOTH,
    "soft": ("refused", "soft labels.*labels=lambda", RAW),
    "mixup in the step": ("warned", "mixup", {}),
    "sum": SUM,
    "times the batch": SUM,
    "features": ("refused", "up to 4, and the networks give 3 logits.*labels=lambda", {}),
    "strings": ("refused", "labels=lambda", {}),
}
ROUNDS = {
    "one logit": ("refused", r"batch\[1\].long\(\).*Neighbors\(rounds=0\)", {}),
    "one logit, column": ("refused", r"batch\[1\].long\(\).*Neighbors\(rounds=0\)", {}),
    "multi-hot": ("refused", r"several labels for each image.*Neighbors\(rounds=0\)", {}),
    "soft": ("refused", r"soft labels.*Neighbors\(rounds=0\)", {}),
    "sum": SUM,
    "times the batch": SUM,
}


class Named(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], "a cat"


class Module(toys.LitToy):
    def __init__(self, criterion, outputs):
        super().__init__()
        self.criterion = criterion
        self.model.fc = nn.Linear(toys.WIDTH, outputs)

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Taken(L.Callback):
    """What optimizer steps were taken, and what a module gave in its first training pass."""

    def __init__(self, module=None):
        self.steps, self.find, self.given = 0, module, []

    def on_train_start(self, trainer, module):
        if self.find is not None:
            self.find(module).register_forward_hook(
                lambda layer, args, given: self.given.append(given.detach().clone())
            )

    def on_before_optimizer_step(self, *args):
        self.steps += 1


def run(case, callback, taken, steps=1):
    form, criterion, outputs, _ = CASES[case]
    images, labels = toys.target_data().tensors
    data = (Named if case == "strings" else TensorDataset)(images, form(labels))
    module = Module(criterion, outputs)
    runner = toys.fit(module, [callback, taken], loader=DataLoader(data, batch_size=4), max_steps=steps)
    return module, runner, data[:4] if case != "strings" else None


def source(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, **options)


def cure(case, expected, make, steps=1):
    """Check what becomes of a case as it comes; give the options with which it works, or None if nothing cures it."""
    kind, words, options = expected.get(case, ("works", "", {}))
    if kind != "works":
        taken = Taken()
        with pytest.raises({"warned": UserWarning, "refused": lt.TransferConfigError}[kind], match=words):
            run(case, make(), taken, steps)
        assert taken.steps == 0  # of the optimizer
    return options if options or kind == "works" else None


def auxiliary(**options):
    return lt.GatedTransfer(ratio=None, dropout=0.0, tap="model.bn", aux_weight=0.2, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_auxiliary_classifier_learns_what_the_step_learns(case):
    if (options := cure(case, AUX, auxiliary)) is not None:
        callback = auxiliary(**options)
        taken = Taken(lambda module: callback.part.classifier)
        _, runner, (_, labels) = run(case, callback, taken)
        expected = loss_by_hand(taken.given[0], labels, CASES[case][3])
        assert float(runner.callback_metrics["transfer/aux_loss"]) == pytest.approx(expected, rel=1e-5)


def test_rows_of_one_label_are_learned_by_the_criterion_of_the_step():
    callback = auxiliary(**RAW)
    taken = Taken(lambda module: callback.part.classifier)
    images, labels = toys.target_data().tensors
    data = DataLoader(TensorDataset(images, rows(labels)), batch_size=4)
    runner = toys.fit(Module(BCE, 5), [callback, taken], loader=data, max_steps=1)
    expected = loss_by_hand(taken.given[0], rows(labels)[:4], "multi-hot")
    assert float(runner.callback_metrics["transfer/aux_loss"]) == pytest.approx(expected, rel=1e-5)


def several_networks(**options):
    return lt.CollaborativeFinetuning([toys.OtherNet()], **options)


@pytest.mark.parametrize("case", CASES)
def test_several_networks_are_scored_as_the_step_says(case):
    if (options := cure(case, SEVERAL, several_networks)) is None:
        return
    taken = Taken(lambda module: module.model.members["own"])
    module, runner, (_, labels) = run(case, several_networks(**options), taken)
    kind = CASES[case][3]
    expected = right_by_hand(taken.given[0], labels, kind).mean()
    assert float(runner.callback_metrics["transfer/accuracy/own"]) == pytest.approx(expected)
    images, every = toys.target_data().tensors
    every = CASES[case][0](every)
    shares = module.model.measure(DataLoader(TensorDataset(images, every), batch_size=5))
    with torch.no_grad():
        logits = module.model.eval().members["own"](images)
    assert shares["own"] == pytest.approx(right_by_hand(logits, every, kind).mean(), rel=1e-5)


def test_rows_of_one_label_do_not_hide_that_an_image_may_have_several():
    """The first batch, of training as of validation, has one label an image."""
    images, labels = toys.target_data().tensors
    every = torch.cat([rows(labels[:8]), several(labels[8:])])
    data = DataLoader(TensorDataset(images, every), batch_size=4)
    callback, module = several_networks(**RAW, loss=BCE), Module(BCE, 5)
    taken = Taken(lambda module: module.model.members["own"])
    runner = toys.trainer([callback, taken], max_steps=5, limit_val_batches=0)
    runner.fit(module, data)
    expected = right_by_hand(taken.given[4], every[16:20], "multi-hot").mean()
    assert float(runner.callback_metrics["transfer/accuracy/own"]) == pytest.approx(expected)
    by_hand = ByHand(BCE, **RAW, loss=BCE)
    toys.trainer().validate(by_hand, data, verbose=False)
    with torch.no_grad():
        logits = by_hand.eval().model.members["own"](images)
    assert by_hand.model.accuracies["own"] == pytest.approx(right_by_hand(logits, every, "multi-hot").mean(), rel=1e-5)
    candidates = Candidates.__new__(Candidates)
    candidates.together = callback.together
    with torch.no_grad():
        mean = by_hand.model.each(images[:4]).mean(0)
    found = candidates._right(by_hand, (images[:4], every[:4]))
    np.testing.assert_allclose(found.numpy(), right_by_hand(mean, every[:4], "multi-hot"), rtol=1e-5)


def test_labels_of_several_classes_need_their_criterion_too():
    with pytest.raises(lt.TransferConfigError, match=r"labels=lambda batch: batch\[1\], loss=torch.nn.functional.bin"):
        run("multi-hot", several_networks(**RAW), Taken())


@pytest.mark.parametrize("labels", [0, 1])
def test_a_search_scores_one_logit_by_its_sign(labels):
    module = Module(binary, 1)
    lt.functional.apply_collaborative(module, [toys.OtherNet()])
    for member in module.model.members.values():
        member.network.fc.weight.data.zero_()
        member.network.fc.bias.data.fill_(3.0)
    candidates = Candidates.__new__(Candidates)
    candidates.together = several_networks(loss=binary).together
    right = candidates._right(module, (torch.rand(4, 3, 6, 6), torch.full((4,), labels)))
    assert right.tolist() == [float(labels)] * 4


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("strings", "features")])
def test_rounds_ask_who_is_right_as_the_step_says(case):
    images, labels = toys.target_data().tensors
    target = TensorDataset(images, CASES[case][0](labels))
    neighbors = borrowed(every=1, hard_entropy=9)
    answers = []

    def make():
        return lt.SelectiveJointFinetuning(source(), neighbors=neighbors, target=target, weight=ALWAYS)

    class Ask(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:
                module.eval()
                with torch.no_grad():
                    answers.append(module(images))
                module.train()

    if cure(case, ROUNDS, make, steps=2) is not None:
        callback, data = make(), DataLoader(target, batch_size=4)
        toys.fit(Module(*CASES[case][1:3]), [callback, Ask()], loader=data, max_steps=2)
        right = right_by_hand(answers[0], target.tensors[1], CASES[case][3])
        np.testing.assert_array_equal((callback.target_weights > 1).numpy(), right == 0)


def test_of_several_validation_loaders_the_first_says_who_is_right():
    callback, module = lt.CollaborativeFinetuning([toys.OtherNet()]), Module(F.cross_entropy, 5)
    images, labels = toys.target_data().tensors
    right, wrong = (DataLoader(TensorDataset(images, y), batch_size=8) for y in (labels, (labels + 1) % 5))
    module.validation_step = _validation(module)
    toys.trainer([callback], max_epochs=1).fit(module, toys.target_loader(), [right, wrong])
    found = dict(module.model.accuracies)
    assert found == pytest.approx(module.model.measure(right))
    assert found != pytest.approx(module.model.measure(wrong))


def test_an_error_in_the_users_labels_is_not_taken_for_a_validation_without_labels():
    """Labels of another loader than the first are not read."""
    images, numbers = toys.target_data().tensors
    labelled, bare = (DataLoader(TensorDataset(*tensors), batch_size=8) for tensors in ((images, numbers), (images,)))
    for callback, loaders in ((several_networks(**RAW), [labelled, bare]), (several_networks(), [bare])):
        module = Module(F.cross_entropy, 5)
        module.validation_step = _validation(module)
        toys.trainer([callback], max_epochs=1).fit(module, toys.target_loader(), loaders)
    runner, module = toys.trainer([several_networks(**RAW)], max_epochs=1), Module(F.cross_entropy, 5)
    with pytest.raises(IndexError) as raised:
        runner.fit(module, toys.target_loader(), bare)
    assert "labels= with a validation batch, [Tensor(8, 3, 6, 6)]" in raised.value.__notes__[0]


class ByHand(lt.CollaborativeMixin, Module):
    def __init__(self, criterion=F.cross_entropy, **options):
        super().__init__(criterion, 5)
        self.add_sources([toys.OtherNet()], **options)

    def training_step(self, batch, batch_idx):
        return self.collaborative_loss(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("again", ["fit", "validate"])
def test_an_interrupted_validation_leaves_no_counts_for_the_next(again):
    class Stop(L.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise ValueError("stopped")

    module, runner = ByHand(), toys.trainer(max_epochs=1)
    images, labels = toys.target_data().tensors
    right, wrong = (DataLoader(TensorDataset(images, y), batch_size=8) for y in (labels, (labels + 1) % 5))
    with pytest.raises(ValueError, match="stopped"):
        toys.trainer([Stop()]).validate(module, wrong, verbose=False)
    runner.fit(module, toys.target_loader(), right) if again == "fit" else runner.validate(module, right, verbose=False)
    assert dict(module.model.accuracies) == pytest.approx(module.model.measure(right))


def _validation(module):
    def validation_step(batch, batch_idx, dataloader_idx=0):
        module(batch[0])

    return validation_step


def test_a_target_image_that_is_not_finite_is_not_called_a_source_image():
    images, labels = toys.target_data().tensors
    images = images.clone()
    images[2, 0, 0, 0] = torch.nan
    data = DataLoader(TensorDataset(images, labels), batch_size=4)
    callback = lt.SoftFinetuning(source(forward="joint"), weight=ALWAYS)
    with pytest.raises(FloatingPointError, match=r"images \[2\] of the target batch are not finite.*Stopped before"):
        toys.fit(toys.LitToy(), [callback], loader=data)
