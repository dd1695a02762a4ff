"""How source images run: whose BatchNorm statistics move, and what reaches the user's own code."""

import pytest
import torch
from torch import nn

import lightning_transfer as lt
from lightning_transfer.roles import find_head
from lightning_transfer.source.batchnorm import protected_batchnorm
from lightning_transfer.source.passes import SourcePass
from tests import toys
from tests.toys import LitToy, fit

IMAGES = toys.source_data().tensors[0][:6]


def source_pass(module, **options):
    task = lt.SourceTask(toys.source_data(), num_classes=7, **options)
    return SourcePass(task, module, find_head(module))


def test_features_are_what_reaches_the_head():
    module = LitToy()
    assert (source_pass(module).separate(module, IMAGES) == LitToy().model.features(IMAGES)).all()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_protected_statistics_do_not_move_and_batches_normalise_themselves(layer):
    module = LitToy()
    module.model.bn = layer(toys.WIDTH)
    before = [buffer.clone() for buffer in module.buffers()]
    features = source_pass(module).separate(module, IMAGES)
    assert all((old == new).all() for old, new in zip(before, module.buffers(), strict=True))
    source_pass(module, batchnorm="update").separate(module, IMAGES)
    assert not any((old == new).all() for old, new in zip(before, module.buffers(), strict=True))
    assert (features == module.model.features(IMAGES)).all()


def test_frozen_and_untracked_batchnorm_stay_what_they_are():
    net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    with protected_batchnorm(net, on=True):
        assert [layer.track_running_stats for layer in net] == [True, False, False]
    assert [layer.track_running_stats for layer in net] == [True, False, True]


def test_a_function_may_give_the_features():
    module = LitToy()
    by_function = source_pass(module, forward=lambda module, images: module.model.features(images))
    assert (by_function.separate(module, IMAGES) == LitToy().model.features(IMAGES)).all()
    through_head = source_pass(module, forward=lambda module, images: module(2 * images))
    assert (through_head.separate(module, IMAGES) == LitToy().model.features(2 * IMAGES)).all()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.model.features(x), "neither reaches the head 'model.fc' nor returns"),
        (lambda self, x: self.model(x) + self.model(x), "head ran more than once"),
        (lambda self, x: self.model(x[:3]), r"6 images have become \(3, 8\)"),
    ],
)
def test_a_forward_that_does_not_end_in_the_head_is_refused(forward, message):
    module = type("Odd", (LitToy,), {"forward": forward})()
    with pytest.raises(lt.TransferConfigError, match=message):
        source_pass(module).separate(module, IMAGES)
    assert source_pass(LitToy()).state.features is None


def test_another_error_of_a_forward_gets_a_note_that_says_how_images_run():
    def forward(self, pixels):
        raise RuntimeError("the size of tensor a must match")

    module = type("Odd", (LitToy,), {"forward": forward})()
    with pytest.raises(RuntimeError) as caught:
        source_pass(module).separate(module, IMAGES)
    assert "SourceTask(forward=lambda module, images: module.model(images))" in "".join(caught.value.__notes__)


class Masked(toys.ToyNet):
    """Counts on a batch of four."""

    def forward(self, pixels):
        return super().forward(pixels * torch.ones(4, 1, 1, 1))


class StepFails(LitToy):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).sum() + torch.ones(3).sum(torch.ones(2))


@pytest.mark.parametrize("by_mixin", [False, True])
def test_an_error_of_the_network_in_a_joint_pass_gets_a_note_that_names_the_cure(by_mixin):
    def run(module_class, net):
        source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, forward="joint")
        bases = (lt.SourceTaskMixin, module_class) if by_mixin else (module_class,)
        module = type("Odd", bases, {})()
        module.model = net
        if by_mixin:
            module.add_source_task(source, weight=1.0)
        with pytest.raises((RuntimeError, TypeError)) as caught:
            toys.fit(module, [] if by_mixin else [lt.SoftFinetuning(source, weight=1.0)])
        return " ".join(getattr(caught.value, "__notes__", []))

    assert "Masked while it ran 4 target and 4 source images" in (note := run(LitToy, Masked()))
    assert "SourceTask(forward='separate')" in note
    assert "source images" not in run(StepFails, toys.toy_net())


@pytest.mark.parametrize("features", [lambda module, x: [x], lambda module, x: module.model.features(x)[:, :5]])
def test_a_function_that_gives_no_features_is_refused(features):
    module = LitToy()
    with pytest.raises(lt.TransferConfigError, match=r"6 images have become|takes 8 features"):
        source_pass(module, forward=features).separate(module, IMAGES)


class Leaking(toys.ToyNet):
    def forward(self, pixels):
        features = self.features(pixels)
        return self.fc(features), features


class Pair(nn.Module):
    def forward(self, pixels):
        return pixels, pixels


def with_model(model):
    class Made(LitToy):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            output = self.model(batch[0])
            return (output[0] if isinstance(output, tuple) else output).square().mean()

    return Made()


class Apart(LitToy):
    """Backbone and head apart, and a step that sees what is between them."""

    def __init__(self, between=nn.Identity, backbone=None):
        super().__init__()
        self.model = None
        self.encoder = backbone or nn.Sequential(nn.Conv2d(3, 8, 6), nn.Flatten())
        self.head = nn.Linear(8, 5)
        self.between = between()
        self.seen = set()

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch[0])
        self.seen.add(len(features))
        return self.head(self.between(features)).square().mean()


class OnlyHead(Apart):
    def training_step(self, batch, batch_idx):
        return self.head(self.encoder[0](batch[0]).flatten(1)).square().mean()


class NotImages(LitToy):
    def training_step(self, batch, batch_idx):
        return self.model({"pixels": batch[0]})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (with_model(Leaking()), "seems to still hold source images"),
        (Apart(backbone=nn.Sequential(nn.Conv2d(3, 8, 6), Pair())), "cannot split a tuple"),
        (Apart(nn.Flatten, nn.Conv2d(3, 2, 5)), "takes 8 features"),
        (OnlyHead(), "never ran the network"),
        (NotImages(), "found dict as the first input"),
    ],
    ids=["leak", "pair", "not-features", "backbone-not-called", "not-images"],
)
def test_joint_refuses_what_it_cannot_keep_apart(module, message):
    task = lt.SourceTask(toys.source_data(), num_classes=7, batch_size=4, forward="joint")
    with pytest.raises(Exception, match=message):
        fit(module, [lt.SoftFinetuning(task, weight=lt.Schedule())])


def test_joint_refuses_images_of_another_size():
    small = torch.utils.data.TensorDataset(torch.rand(9, 3, 4, 4), torch.arange(9) % 7)
    task = lt.SourceTask(small, num_classes=7, batch_size=4, forward="joint")
    with pytest.raises(lt.TransferConfigError, match=r"one shape; found \(3, 4, 4\) and \(3, 6, 6\)"):
        fit(LitToy(), [lt.SoftFinetuning(task, weight=lt.Schedule())])


def test_joint_shows_no_source_row_to_a_step_between_backbone_and_head():
    module = Apart()
    task = lt.SourceTask(toys.source_data(), num_classes=7, batch_size=4, forward="joint")
    callback = lt.SoftFinetuning(task, weight=lt.Schedule())  # which needs no forward to measure by
    fit(module, [callback])
    assert module.seen == {4}
    assert callback.part.get_extra_state()["position"] == 24


def test_joint_with_two_candidates_for_the_backbone_is_refused():
    module = Apart()  # its step runs the parts, so images enter no forward that is known
    module.second = nn.Linear(2, 2)
    task = lt.SourceTask(toys.source_data(), num_classes=7, batch_size=4, forward="joint")
    with pytest.raises(lt.TransferConfigError, match=r"never ran.*the head 'head'.*forward='separate'"):
        fit(module, [lt.SoftFinetuning(task, weight=lt.Schedule())])
    without = type("Without", (Apart,), {"forward": nn.Module.forward})()
    without.second = nn.Linear(2, 2)
    with pytest.raises(lt.TransferConfigError, match="found: encoder, second"):
        source_pass(without, forward="joint")


def test_joint_passes_keywords_and_further_arguments():
    class Keywords(LitToy):
        def training_step(self, batch, batch_idx):
            return self.model(pixels=batch[0]).square().mean()

    task = lt.SourceTask(toys.source_data(), num_classes=7, batch_size=4, forward="joint")
    callback = lt.SoftFinetuning(task)
    fit(Keywords(), [callback])
    assert callback.part.get_extra_state()["position"] == 24
