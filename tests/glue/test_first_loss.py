"""What is learned is what was meant: the first loss of a step, and the labels that it is of."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from lightning_transfer.batches import class_numbers, find_labels, label_hint
from lightning_transfer.glue.first_loss import Heard, fitting_criteria, is_close
from lightning_transfer.methods.collaborative.agreement import Agreement
from lightning_transfer.tracing import images_and_labels
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights


class Summed(LitToy):
    def training_step(self, batch, batch_idx):
        self.stepped = True
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    def on_before_optimizer_step(self, optimizer):
        self.moved = True


class SummedByMixin(lt.SourceTaskMixin, Summed):
    def __init__(self):
        super().__init__()
        self.add_source_task(task(), weight=lt.Schedule(1.0, 1.0))

    def training_step(self, batch, batch_idx):
        return self.joint_loss(super().training_step(batch, batch_idx))


def task(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), **options)


def soft(weight=1.0, **options):
    return lt.SoftFinetuning(task(**options), weight=lt.Schedule(weight, weight))


def gated(**options):
    return lt.GatedTransfer(**{"ratio": None, "dropout": 0.0, "tap": "model.bn", "aux_weight": 0.2, **options})


def several(**options):
    return lt.CollaborativeFinetuning([toys.OtherNet()], backbone="model", **options)


SUMS = {
    "soft": lambda: (Summed(), soft()),
    "joint": lambda: (Summed(), soft(forward="joint")),
    "mixin": lambda: (SummedByMixin(), None),
    "aux": lambda: (Summed(), gated()),
    "several": lambda: (Summed(), several()),
}


@pytest.mark.parametrize("make", SUMS.values(), ids=SUMS)
def test_a_sum_is_refused_before_the_first_step(make):
    module, callback = make()
    with pytest.raises(lt.TransferConfigError, match="4 times cross_entropy .* Return the mean"):
        fit(module, [callback] * (callback is not None), max_steps=1)
    assert module.stepped
    assert not hasattr(module, "moved")
    assert not module.model.fc._forward_hooks


class Unreadable(Summed):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0], "y": batch[1]}

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


def test_with_a_weight_for_a_sum_or_labels_that_say_nothing_it_is_silent():
    module = Summed()
    fit(module, [soft(weight=4.0)], max_steps=2)
    assert module.moved
    fit(Summed(), [gated(aux_weight=0.8, labels=lambda batch: batch[1])], max_steps=1)
    fit(Unreadable(), [soft(batch_hooks=False)], max_steps=1)


def test_a_binary_sum_is_one_of_its_numbers():
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=random), torch.rand(6, 3, generator=random).round()
    binary = next(iter(fitting_criteria(logits, labels)))
    each = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log())
    assert binary.mean == pytest.approx(float(each.mean()), rel=1e-5)
    assert binary.is_sum(float(each.sum()))
    assert binary.is_sum(6 * float(each.mean()))
    assert not binary.is_sum(float(each.mean()))
    assert not binary.is_sum(5 * float(each.mean()))
    one = next(iter(fitting_criteria(logits[:, :1], labels[:, 0].long())))
    assert one.mean == pytest.approx(float(each[:, 0].mean()), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, -100], [0, 3], [0, 1, 2]], ids=["ignored", "beyond", "more"])
def test_labels_that_do_not_fit_the_logits_say_nothing(labels):
    assert list(fitting_criteria(torch.zeros(2, 3), torch.tensor(labels))) == []


class Counting(LitToy):
    """Counts, after each step, the hooks at the head."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.hooks = [*getattr(self, "hooks", []), len(self.model.fc._forward_hooks)]
        return loss


def test_a_copy_made_in_the_first_step_does_not_keep_outputs():
    class Copying(LitToy):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.twins = [copy.deepcopy(self.model)]
            for twin in self.twins:
                twin(batch[0])
            return super().training_step(batch, batch_idx)

    module = Copying()
    fit(module, [lt.SoftFinetuning(task(), weight=1.0)], max_steps=3)
    hooks = [hook for layer in module.twins[0].modules() for hook in layer._forward_hooks.values()]
    assert all(not hook.logits for hook in hooks if isinstance(hook, Heard))


def test_only_the_first_step_is_listened_to():
    module = Counting()
    fit(module, [soft()], max_steps=3)
    assert module.hooks == [1, 0, 0]


def smooth(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.3)


class Smooth(LitToy):
    def training_step(self, batch, batch_idx):
        return smooth(self(batch[0]), batch[1])


def test_what_the_auxiliary_classifier_learns_by_is_said_once_and_labels_settle_it():
    found, told = Smooth(), Smooth()
    with pytest.warns(UserWarning, match="from which the auxiliary classifier learns.*aux_weight=0") as caught:
        fit(found, [gated()], max_steps=3)
    assert sum("auxiliary" in str(warning.message) for warning in caught) == 1
    fit(told, [gated(labels=lambda batch: batch[1])], max_steps=3)
    assert_same(weights(found), weights(told))


class MixedLater(LitToy):
    """Mixes images and labels from the second epoch on."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if self.current_epoch:
            images = images.lerp(images.flip(0), 0.3)
        logits = self(images)
        self.hooks = [*getattr(self, "hooks", []), len(self.model.fc._forward_hooks)]
        loss = F.cross_entropy(logits, labels)
        return loss.lerp(F.cross_entropy(logits, labels.flip(0)), 0.3) if self.current_epoch else loss


def test_images_that_are_mixed_later_are_found_in_a_step_that_logs():
    """With four steps between logs, and six in an epoch, at whose end values may be monitored."""
    found, told = MixedLater(), MixedLater()
    with pytest.warns(UserWarning, match="If images are mixed.*aux_weight=0") as caught:
        fit(found, [gated()], log_every_n_steps=4)
    assert sum("auxiliary" in str(warning.message) for warning in caught) == 1
    assert found.hooks == [1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0]
    fit(told, [gated(labels=lambda batch: batch[1])], log_every_n_steps=4)
    assert told.hooks == [1] + [0] * 11
    assert_same(weights(found), weights(told))


def test_a_small_loss_that_is_rounded_otherwise_is_not_another_one():
    logits = torch.tensor([[14.0, 0.0, 0.0], [0.0, 15.0, 0.0]])
    rounded, exact = (float(F.cross_entropy(each, torch.tensor([0, 1]))) for each in (logits, logits.double()))
    assert abs(rounded / exact - 1) > 0.01
    assert is_close(rounded, exact, torch.float32)
    assert not is_close(0.1, 0.11, torch.float32)


@pytest.mark.parametrize("turned", [False, True], ids=["source first", "source last"])
def test_the_steps_own_loss_is_looked_at_beside_a_source_task(turned):
    parts = [soft(), gated()]
    fit(LitToy(), parts[::-1] if turned else parts, max_steps=2)  # warnings are errors


def test_a_network_far_below_the_others_is_named_once():
    agreement = Agreement.__new__(Agreement)
    agreement._has_warned = False
    agreement._warn_of_one_below({"own": 0.9, "other": 0.5}, 16)  # too few images to know
    agreement._warn_of_one_below({"own": 0.9, "other": 0.75}, 10_000)
    with pytest.warns(UserWarning, match="'other' has 50% of the validation images right and 'own' 90%"):
        agreement._warn_of_one_below({"own": 0.9, "other": 0.5}, 1000)
    agreement._warn_of_one_below({"own": 0.9, "other": 0.5}, 1000)


def test_the_warning_comes_of_validation():
    module, images = LitToy(), toys.images(800, 5, seed=1).tensors[0]
    with torch.no_grad():
        labels = module.eval()(images).argmax(1)
    images, labels = images[labels != labels.mode()[0]], labels[labels != labels.mode()[0]]  # no guess
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=50)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-9)
    module.train()
    runner = toys.trainer([several()], max_epochs=1)
    with pytest.warns(UserWarning, match="of the validation images right"):
        runner.fit(module, data, data)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.eye(3), "One-hot.*argmax"),
        (torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3]]), "soft labels.*mix"),
        (torch.tensor([[1.0, 1, 0], [0, 0, 0]]), "several labels"),
        (torch.tensor([[3, 8], [1, 2]]), r"2 numbers.*\[:, 0\]"),
        (torch.tensor([[1.0], [2.0]]), r"long\(\)"),
        (torch.tensor([0.5, 0.1]), "^$"),
    ],
    ids=["one-hot", "soft", "several", "pairs", "float column", "shares"],
)
def test_labels_are_called_what_they_are(labels, says):
    hint = label_hint(labels, "labels=lambda batch: {}")
    assert class_numbers(labels) is None
    assert re.search(says, hint), hint
    assert ("argmax" in hint) == says.startswith("One-hot")


def test_labels_in_a_column_are_class_numbers_everywhere():
    assert find_labels((0, torch.tensor([[2], [1]]))).tolist() == [2, 1]
    images, labels = toys.source_data().tensors
    column, plain = LitToy(), LitToy()
    data = torch.utils.data.TensorDataset(images, labels[:, None])
    given = lt.SourceTask(data, head=toys.source_head())
    fit(column, [lt.SoftFinetuning(given, weight=lt.Schedule(1.0, 1.0))], max_steps=3)
    fit(plain, [soft()], max_steps=3)
    assert_same(weights(column), weights(plain))


@pytest.mark.parametrize(
    ("label", "says"),
    [("cat", r"NUMBERS\[name\] for name in batch\[1\]"), ((1, 2), r"batch\[1\]\[0\]")],
    ids=["names", "pairs"],
)
def test_names_and_pairs_get_advice_that_changes_something(label, says):
    data = [(torch.rand(3, 6, 6), label)] * 8
    with pytest.raises(lt.TransferConfigError, match=says):
        fit(
            LitToy(), [lt.SoftFinetuning(lt.SourceTask(data, num_classes=3), weight=lt.Schedule(1.0, 1.0))], max_steps=1
        )


def test_of_two_columns_of_whole_numbers_none_is_taken_for_labels():
    images, domain, label = torch.rand(4, 3, 4, 4), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 2])
    both = r"batch\[1\].*or .*batch\[2\]"
    with pytest.raises(lt.TransferConfigError, match=r"Entries \[1, 2\].*Pass labels=lambda batch: " + both):
        find_labels((images, domain, label))
    with pytest.raises(lt.TransferConfigError, match=both):
        images_and_labels((images, domain, label), images.device)
    assert images_and_labels((images, ["a"] * 4, label), images.device)[1].tolist() == label.tolist()
    with pytest.raises(lt.TransferConfigError, match=r"SourceTask\(adapt.*" + both):
        task().unpack([images, domain, label])
    with pytest.raises(lt.TransferConfigError, match=r"adapt=lambda batch: \(batch\[0\], batch\[2\]\)\)"):
        task().unpack([images, ["a"] * 4, label])
    assert find_labels((images, label, ["a", "b", "c", "d"])).tolist() == label.tolist()
    assert find_labels((images, ["a", "b", "c", "d"], label)).tolist() == label.tolist()
