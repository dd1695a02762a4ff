"""Functional, callback, mixin and a hand-written loop give the same numbers, in every way a step can run."""

import pytest
import torch
import torch.nn.functional as F

import lightning_transfer as lt
from tests import toys
from tests.methods import UNTIL, each, one
from tests.toys import LitToy, Recorder, assert_same, fit, weights

each_sourced = each(has_source=True)
each_layered = each(changes_layers=True)


def run(method, module=None, **options):
    data = Recorder(toys.source_data())
    module = module or LitToy()
    fit(module, [method.callback(data)], **options)
    return module, data.loaded


class DictStep(LitToy):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": torch.ones(2)}


class SkippingStep(LitToy):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@each_sourced
@pytest.mark.parametrize(
    ("module", "trainer", "loop"),
    [
        (LitToy, {}, {}),
        (LitToy, {"precision": "64-true"}, {"double": True}),
        (LitToy, {"precision": "bf16-mixed"}, {"bf16": True}),
        (LitToy, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
        (LitToy, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
        (DictStep, {}, {}),
        (SkippingStep, {}, {"skip": (1,)}),
    ],
    ids=["fp32", "64-true", "bf16-mixed", "accumulation", "clipping", "dict", "none"],
)
def test_callback_is_bit_equal_to_a_hand_written_loop(method, module, trainer, loop):
    module, source_indices = run(method, module(), **trainer)
    expected, _, losses = method.reference(source_indices=source_indices, **loop)
    assert_same(weights(module.model), weights(expected))
    assert module.losses == [loss for loss in losses if loss is not None]
    assert source_indices, "no source image was drawn: this would be plain fine-tuning against itself"


@each_sourced
def test_mixin_is_bit_equal_to_the_hand_written_loop_in_manual_optimization(method):
    data = Recorder(toys.source_data())
    module = method.mixin(data)
    fit(module)
    expected, head, _ = method.reference(source_indices=data.loaded)
    assert_same(weights(module.model), weights(expected))
    assert_same(weights(module.source_task.head), weights(head))


@each_sourced
def test_mixin_in_automatic_optimization_is_bit_equal_to_the_callback(method):
    class Automatic(type(method.mixin())):
        def training_step(self, batch, batch_idx):
            return self.joint_loss(F.cross_entropy(self(batch[0]), batch[1]))

    by_mixin = method.mixin()
    by_mixin.__class__ = Automatic
    by_mixin.automatic_optimization = True
    fit(by_mixin)
    by_callback, _ = run(method)
    assert_same(weights(by_mixin.model), weights(by_callback.model))


def test_functional_is_bit_equal_to_the_callback():
    method = one(has_source=True)
    module, source_indices = run(method)
    net, head = toys.toy_net(), toys.source_head()
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-3)
    queue, source = list(source_indices), toys.source_data()
    for step, (images, labels) in enumerate([batch for _ in range(2) for batch in toys.target_loader()]):
        weight = lt.functional.anneal(step / (2 * UNTIL))
        loss = F.cross_entropy(net(images), labels)
        if weight:
            source_images, source_labels = source[[queue.pop(0) for _ in range(4)]]
            net.bn.track_running_stats = False
            source_loss = F.cross_entropy(head(net.features(source_images)), source_labels)
            net.bn.track_running_stats = True
            loss = lt.functional.joint_loss(loss, source_loss, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(weights(module.model), weights(net))


@each(has_source=False)
@pytest.mark.parametrize(
    ("module", "trainer", "loop", "tolerance"),
    [
        (LitToy, {}, {}, 5e-5),
        (LitToy, {"precision": "64-true"}, {"dtype": torch.float64}, 1e-12),
        (LitToy, {"accumulate_grad_batches": 2}, {"accumulate": 2}, 5e-5),
        (LitToy, {"gradient_clip_val": 0.05}, {"clip": 0.05}, 5e-5),
        (DictStep, {}, {}, 5e-5),
        (SkippingStep, {}, {"skip": (1,)}, 5e-5),
    ],
    ids=["fp32", "64-true", "accumulation", "clipping", "dict", "none"],
)
def test_a_method_without_a_source_trains_as_by_hand(method, module, trainer, loop, tolerance):
    """Up to rounding: the hand-written formula folds nothing and keeps everything."""
    module = module()
    fit(module, [method.callback()], **trainer)
    network, losses = method.reference(**loop)
    found, expected = weights(module), {name: value.detach() for name, value in network.weights().items()}
    assert_same({name: found[name] for name in expected}, expected, tolerance)
    assert module.losses == pytest.approx([loss for loss in losses if loss is not None], abs=10 * tolerance)
    start = {**dict(toys.toy_net().named_parameters())}
    assert (found[method.head] != start["fc.weight"]).any()


@each_layered
def test_a_mixins_changed_layers_train_as_the_callbacks(method):
    by_mixin, by_callback = method.mixin(), LitToy()
    fit(by_mixin)
    fit(by_callback, [method.callback()])
    assert_same(weights(by_mixin), weights(by_callback))
    assert by_mixin.losses == by_callback.losses
