"""A weight that is measured: near the source it is kept, far from it the run is plain fine-tuning."""

import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, SubsetRandomSampler, TensorDataset

import lightning_transfer as lt
from lightning_transfer.functional import domain_gap
from lightning_transfer.glue.sides import Side
from lightning_transfer.source.gap import is_near
from tests import toys
from tests.methods import borrowed
from tests.toys import LitToy, Recorder, assert_same, fit, weights


def near_data():
    """A target drawn as the source is, with other labels."""
    images, labels = toys.images(60, toys.SOURCE_CLASSES, seed=7).tensors
    return TensorDataset(images, labels % toys.TARGET_CLASSES)


def far_data():
    images, labels = near_data().tensors
    return TensorDataset(images + 20, labels)


def source_data():
    return toys.images(80, toys.SOURCE_CLASSES, seed=2)


def source(data=None, **options):
    return lt.SourceTask(data or source_data(), head=toys.source_head(), batch_size=4, **options)


def soft(target=None, **options):
    return lt.SoftFinetuning(source(**options))


def selective(target=None, **options):
    return lt.SelectiveJointFinetuning(source(**options), neighbors=borrowed(every=1), target=target)


def leaving_out():
    return pytest.warns(lt.NoEffectWarning, match=r"left out.*plain fine-tuning")


each = pytest.mark.parametrize("make", [soft, selective])
each_forward = pytest.mark.parametrize("forward", ["separate", "joint"])


class Shuffled(LitToy):
    """Its loader's order is drawn from the program's random state."""


def shuffled(data):
    torch.manual_seed(5)
    return DataLoader(data, batch_size=4, shuffle=True)


@each
@each_forward
def test_far_from_the_source_it_is_plain_finetuning_to_the_bit(make, forward):
    plain, module = LitToy(), LitToy()
    fit(plain, loader=shuffled(far_data()))
    recorder = Recorder(source_data())
    callback = make(far_data(), forward=forward, data=recorder)
    with leaving_out():
        fit(module, [callback], loader=shuffled(far_data()))
    assert callback.part.gap > 0.95
    assert_same(weights(module), weights(plain))
    assert module.losses == plain.losses
    assert set(recorder.loaded[-80:]) == {*range(80)}  # looked at to measure
    assert len(recorder.loaded) <= 80 + 80 + 2  # and where labels are not listed, for those, and to find the head


@each
def test_the_warning_names_what_to_write(make):
    images, labels = near_data().tensors
    striped = TensorDataset(images + torch.linspace(-20, 20, 6), labels)  # both sides run to both sides of 0
    with pytest.warns(lt.NoEffectWarning, match=r"To keep it: weight=lt.Schedule\((end=1.0)?\)\.") as told:
        fit(LitToy(), [make(striped)], loader=shuffled(striped), max_steps=2)
    assert not any("scaling" in str(each.message) for each in told)
    with pytest.warns(lt.NoEffectWarning, match="the scaling: pixels run from .* give the source the target's") as told:
        fit(LitToy(), [make(far_data())], loader=shuffled(far_data()), max_steps=2)
    assert not any("To keep it" in str(each.message) for each in told)


@each
@each_forward
def test_near_the_source_it_is_the_schedule_to_the_bit(make, forward):
    measured, given = LitToy(), LitToy()
    callback = make(near_data(), forward=forward)
    fit(measured, [callback], loader=shuffled(near_data()))
    assert is_near(callback.part.gap)
    again = make(near_data(), forward=forward)
    again.weight = lt.Schedule() if make is soft else lt.Schedule(1.0, 1.0)
    fit(given, [again], loader=shuffled(near_data()))
    assert_same(weights(measured), weights(given))
    assert measured.losses == given.losses


@each
def test_the_gap_is_that_of_features_in_front_of_the_head(make):
    module, callback = LitToy(), make(near_data())
    net = toys.toy_net().eval()
    fit(module, [callback], loader=shuffled(near_data()), max_steps=2)
    with torch.no_grad():
        sides = [net.features(data.tensors[0]) for data in (near_data(), source_data())]
    assert callback.part.gap == pytest.approx(domain_gap(*sides), abs=0.06)  # the same images in another order


class Looked(LitToy):
    """Counts the images that are only looked at."""

    looked = 0

    def forward(self, pixels):
        self.looked += len(pixels) * (not torch.is_grad_enabled())
        return super().forward(pixels)


@each
def test_resumed_it_is_not_measured_again(make, tmp_path):
    data = near_data()
    whole, callback = Looked(), make(data)
    loader = DataLoader(data, batch_size=5)
    fit(whole, [callback, toys.SaveEveryStep(tmp_path)], loader=loader)
    module, again = Looked(), make(data)
    fit(module, [again], loader=loader, ckpt_path=tmp_path / "step=12.ckpt")
    assert module.looked < 60 < 60 + 80 <= whole.looked  # target and source images
    assert again.part.gap == callback.part.gap
    assert_same(weights(module), weights(whole))
    other = make(data)
    other.weight = lt.Schedule(0.5, 0.5)
    with pytest.raises(lt.TransferConfigError, match="weight: if near, "):
        fit(LitToy(), [other], loader=loader, ckpt_path=tmp_path / "step=12.ckpt")


def test_a_second_fit_with_other_data_measures_again_and_with_the_same_does_not():
    near, far = DataLoader(near_data(), batch_size=5), DataLoader(far_data(), batch_size=5)
    callback, module = lt.SoftFinetuning(new_head(), weight="auto"), LitToy()
    with leaving_out():
        runner = fit(module, [callback], loader=far, max_steps=2)
    first = callback.part.gap
    runner.fit_loop.epoch_loop.max_steps = 4
    runner.fit(module, DataLoader(far.dataset, batch_size=5))
    assert callback.part.gap == first
    assert callback.part.is_left_out
    runner.fit_loop.epoch_loop.max_steps, runner.fit_loop.max_epochs = 20, 5
    runner.fit(module, near)
    assert callback.part.gap != first
    assert not callback.part.is_left_out
    assert callback.part.drawing.position > 0


def new_head():
    return lt.SourceTask(source_data(), num_classes=toys.SOURCE_CLASSES, batch_size=4)


class ByHand(lt.SourceTaskMixin, LitToy):
    def __init__(self, weight="auto", **options):
        super().__init__()
        self.add_source_task(source(**options) if options else new_head(), weight=weight)

    def training_step(self, batch, batch_idx):
        return self.joint_loss(super().training_step(batch, batch_idx))


def test_a_mixins_second_fit_measures_other_data_again():
    module = ByHand()
    with leaving_out():
        runner = fit(module, loader=DataLoader(far_data(), batch_size=5), max_steps=2)
    runner.fit_loop.epoch_loop.max_steps, runner.fit_loop.max_epochs = 20, 5
    runner.fit(module, DataLoader(near_data(), batch_size=5))
    assert not module.source_task.is_left_out


def test_after_a_fit_that_left_the_source_out_the_length_of_the_next_is_checked():
    module, callback = LitToy(), lt.SoftFinetuning(new_head())
    with leaving_out():
        runner = fit(module, [callback], loader=DataLoader(far_data(), batch_size=5), max_steps=2)
    runner.fit_loop.epoch_loop.max_steps = runner.fit_loop.max_epochs = -1
    with pytest.raises(lt.TransferConfigError, match="The length of training is not known"):
        runner.fit(module, DataLoader(near_data(), batch_size=5))


def test_after_a_crash_a_mixin_no_longer_appends_source_images():
    class Crashing(ByHand):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    module = Crashing(weight=lt.Schedule(), forward="joint")
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, loader=shuffled(near_data()))
    position = module.source_task.drawing.position
    assert module.train()(torch.rand(2, 3, 6, 6)).shape == (2, toys.TARGET_CLASSES)
    assert module.source_task.drawing.position == position


def test_resumed_far_from_the_source_it_says_again_that_it_goes_on_without(tmp_path, caplog):
    loader = DataLoader(far_data(), batch_size=5)
    with leaving_out():
        fit(LitToy(), [soft(far_data()), toys.SaveEveryStep(tmp_path)], loader=loader)
    near = DataLoader(near_data(), batch_size=5)
    fit(LitToy(), [soft(), toys.SaveEveryStep(tmp_path / "near")], loader=near)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(LitToy(), [soft(far_data())], loader=loader, ckpt_path=tmp_path / "step=12.ckpt")
        fit(LitToy(), [soft()], loader=near, ckpt_path=tmp_path / "near/step=12.ckpt")
    far, near = [line for line in caplog.messages if "when this run began" in line]
    assert re.match(r"Domain gap \S+ when this run began: it continues without the source\.", far)
    assert "it continues with the source." in near


def test_it_is_logged_and_the_mixins_too():
    callback = soft()
    runner = fit(LitToy(), [callback], loader=shuffled(near_data()))
    assert runner.callback_metrics["transfer/domain_gap"] == pytest.approx(callback.part.gap)

    by_mixin, by_callback = ByHand(), LitToy()
    fit(by_mixin, loader=shuffled(near_data()))
    fit(by_callback, [lt.SoftFinetuning(new_head())], loader=shuffled(near_data()))
    assert_same(weights(by_mixin.model), weights(by_callback.model))


@pytest.mark.parametrize("is_measured", [True, False])
def test_what_is_only_looked_at_is_not_augmented_as_what_is_trained_on(is_measured):
    class Augmenting(LitToy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            (trained if self.trainer.training else seen).append(len(batch[1]))
            return batch

    trained, seen = [], []
    callback = soft() if is_measured else selective(near_data())
    if not is_measured:
        callback.weight = lt.Schedule(1.0, 1.0)
    fit(Augmenting(), [callback], loader=shuffled(near_data()), max_epochs=1)
    assert set(trained) == {4}  # target and source batches
    assert sum(seen) >= 60 + 80 * is_measured  # the gap's images of both sides, or the target's in a round


def test_a_gap_is_told_from_as_many_images_however_many_there_are():
    class Counted(TensorDataset):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    loaded: list[int] = []
    many = Counted(*toys.images(500, toys.TARGET_CLASSES, seed=9).tensors)
    callback = soft()
    fit(LitToy(), [callback], loader=DataLoader(many, batch_size=4), max_steps=1)
    assert callback.part.gap is not None
    assert 200 <= len(loaded) < 230  # those that are looked at, and a few batches


def test_the_users_batch_hooks_run_on_the_target_and_on_a_source_that_takes_them():
    class Shifting(LitToy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 20, batch[1]

    gaps = {}
    for runs in (True, False):
        callback = soft(batch_hooks=runs)
        with leaving_out() if runs else nullcontext():
            fit(Shifting(), [callback], loader=shuffled(far_data()))
        gaps[runs] = callback.part.gap
    assert gaps[False] < 0.75 < 0.95 < gaps[True]


def test_the_rule():
    assert [is_near(gap) for gap in (0.0, 0.5, 0.799, 0.8, 1.0)] == [True, True, True, False, False]


def test_too_few_images_or_another_word_are_refused():
    line = r"(?s)3 target and 80 source images.*weight=lt.Schedule\(\)"
    with pytest.raises(lt.TransferConfigError, match=line):
        fit(LitToy(), [soft()], loader=DataLoader(TensorDataset(*near_data()[:3]), batch_size=3))
    with pytest.raises(lt.TransferConfigError, match="weight='automatic' is not a weight"):
        lt.SoftFinetuning(source(), weight="automatic")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 6)])
def test_sides_that_a_glance_tells_apart_are_refused(shape):
    other = TensorDataset(torch.rand(80, *shape), torch.arange(80) % toys.SOURCE_CLASSES)
    says = f"Target images are of shape (3, 6, 6), source images of {shape}"
    with pytest.raises(lt.TransferConfigError, match=re.escape(says)):
        fit(LitToy(), [soft(data=other)], loader=shuffled(near_data()))


def test_a_forward_that_brings_both_to_one_size_is_not_refused():
    def resized(module, images):
        return module.model.features(torch.nn.functional.interpolate(images, size=(6, 6)))

    larger = TensorDataset(torch.rand(80, 3, 8, 8), torch.arange(80) % toys.SOURCE_CLASSES)
    callback = lt.SoftFinetuning(source(larger, forward=resized))
    with leaving_out():
        fit(LitToy(), [callback], loader=shuffled(near_data()), max_steps=2)
    assert callback.part.gap is not None


def test_a_target_batch_that_is_not_read_as_the_sources_is_named():
    class ByName(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    class Unreached(LitToy):
        def forward(self, pixels):
            return pixels

    line = r"(?s)neither reaches the head.*weight=lt.Schedule\("
    with pytest.raises(lt.TransferConfigError, match=line):
        fit(Unreached(), [soft(forward="joint")], loader=shuffled(near_data()))
    images, labels = near_data().tensors
    named = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    with pytest.raises(lt.TransferConfigError, match=r"A target batch is {'image': Tensor\(4, .*of both"):
        fit(ByName(), [soft()], loader=DataLoader(named, batch_size=4))


def test_a_target_that_cannot_be_looked_at_is_named_with_the_line_to_write():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from near_data()

    class Broken(TensorDataset):
        def __getitem__(self, index):
            raise OSError("cannot identify image file")

    line = r"weight=lt.Schedule\("
    with pytest.raises(lt.TransferConfigError, match=f"(?s)The target, a Endless, has no length.*{line}"):
        fit(LitToy(), [soft()], loader=DataLoader(Endless(), batch_size=4), max_steps=2)
    with pytest.raises(lt.TransferConfigError, match=f"(?s)a StatefulLoader, does not show its dataset.*{line}"):
        fit(LitToy(), [soft()], loader=toys.StatefulLoader())
    with pytest.raises(OSError, match="(?s)cannot identify.*while loading target sample"):
        fit(LitToy(), [selective(Broken(*near_data().tensors))], loader=shuffled(near_data()))
    odd = [*near_data(), (torch.rand(3, 6, 7), 0)]
    with pytest.raises(lt.TransferConfigError, match=r"Target samples do not fit into one batch.*\(3, 6, 7\)"):
        fit(LitToy(), [selective(odd)], loader=shuffled(near_data()))


@pytest.mark.parametrize("broken", [range(3), range(80)], ids=["some", "all"])
def test_source_images_that_cannot_be_read_are_passed_over_where_a_selection_leaves_them_out(broken):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            if index in broken:
                raise OSError("cannot identify image file")
            return super().__getitem__(index)

    data = Broken(*source_data().tensors)
    with pytest.raises(OSError, match="(?s)cannot identify.*while loading source sample"):
        fit(LitToy(), [soft(data=data)], loader=shuffled(far_data()))
    callback = selective(far_data(), data=data)
    if len(broken) < 80:
        with leaving_out():
            fit(LitToy(), [callback], loader=shuffled(far_data()))
        assert callback.part.gap > 0.95
    else:
        with pytest.raises(lt.TransferConfigError, match="No source image can be read: OSError: cannot identify"):
            fit(LitToy(), [callback], loader=shuffled(far_data()))


def test_images_are_read_and_batched_as_training_does():
    """In the loader's own workers, by its own collate_fn."""
    images, labels = near_data().tensors

    class ReadByWorkers(TensorDataset):
        def __getitem__(self, index):
            assert torch.utils.data.get_worker_info() is not None, "read in the main process"
            return super().__getitem__(index)

    def normalising(samples):
        pixels, labels = torch.utils.data.default_collate(samples)
        return pixels - 20, labels

    raw = ReadByWorkers(images + 20, labels)
    loader = DataLoader(raw, batch_size=4, num_workers=1, collate_fn=normalising)
    callback, module = soft(), LitToy()
    fit(module, [callback], loader=loader, max_steps=2)
    assert is_near(callback.part.gap)


def test_a_target_that_is_given_meets_the_hooks_that_rounds_show_it_to():
    class Normalising(LitToy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 20, batch[1]

    callback = selective(near_data(), batch_hooks=False)  # both as they reach the network
    fit(Normalising(), [callback], loader=shuffled(far_data()))
    assert is_near(callback.part.gap)


def test_nothing_is_selected_where_the_source_is_left_out(tmp_path):
    def borrowing(data):
        task, given = source(), {"neighbors": borrowed(every=1), "cache": tmp_path / "chosen"}
        return lt.SelectiveJointFinetuning(task, target=data, **given)

    near = borrowing(near_data())
    fit(LitToy(), [near], loader=shuffled(near_data()))
    assert near.selection is not None
    far = borrowing(far_data())
    with leaving_out():
        fit(LitToy(), [far], loader=shuffled(far_data()))
    assert far.selection is None  # and not the other run's
    with pytest.raises(lt.TransferConfigError, match=r"left out, at a domain gap of 1\.00.*weight=lt.Schedule"):
        _ = far.target_weights


def test_a_step_that_asks_for_no_joint_loss_is_said_to_have_no_effect():
    class Forgetful(lt.SourceTaskMixin, LitToy):
        def __init__(self):
            super().__init__()
            self.add_source_task(source(), weight=lt.Schedule())

    module = Forgetful()
    for _ in range(2):  # once in each fit
        with pytest.warns(lt.NoEffectWarning, match=r"Forgetful.training_step did not call self.joint_loss") as said:
            fit(module, loader=shuffled(near_data()), max_steps=3)
        assert len([each for each in said if each.category is lt.NoEffectWarning]) == 1


class Grouped(TensorDataset):
    """Ten patients, say, each of whose images are alike."""

    groups = torch.arange(10).repeat_interleave(12)


def test_a_copy_is_not_another_image_of_a_side():
    """A classifier would recognise the copies of a source image that it was trained on."""
    data = toys.images(10, 2, seed=0)
    for more in (Subset(data, [*range(10)] * 3), ConcatDataset([data, data, Subset(data, [1])])):
        torch.manual_seed(0)
        drawn = Side("source", more, 30, hooks=False, workers={}).draw()
        assert len(drawn) == 10
        assert len({float(more[place][0].sum()) for place in drawn}) == 10
    torch.manual_seed(0)
    alone = Side("source", data, 4, hooks=False, workers={}).draw()
    torch.manual_seed(0)
    assert alone == torch.randperm(10)[:4].tolist()


def test_groups_of_the_target_stay_together_where_the_gap_is_measured():
    places = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(4)).repeat_interleave(12, 0)
    given = places, torch.arange(120) % toys.TARGET_CLASSES
    callbacks = [lt.SoftFinetuning(source()) for _ in range(2)]
    for callback, kind in zip(callbacks, (TensorDataset, Grouped), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lt.NoEffectWarning)
            fit(LitToy(), [callback], loader=DataLoader(kind(*given), batch_size=4))
    plain, grouped = (callback.part.gap for callback in callbacks)
    assert grouped < plain - 0.03


@pytest.mark.parametrize("wrap", [list, torch.tensor])
@pytest.mark.filterwarnings("ignore::lightning_transfer.errors.NoEffectWarning")
def test_only_images_that_the_loader_serves_are_looked_at(wrap):
    recorder = Recorder(near_data())
    loader = DataLoader(recorder, batch_size=4, sampler=SubsetRandomSampler(wrap(list(range(0, 60, 3)))))
    fit(LitToy(), [lt.SoftFinetuning(source())], loader=loader)
    assert {*map(int, recorder.loaded)} == {*range(0, 60, 3)}
    recorder.loaded.clear()
    fit(LitToy(), [lt.SelectiveJointFinetuning(source(), neighbors=borrowed(every=1))], loader=loader)
    assert {*map(int, recorder.loaded)} == {*range(0, 60, 3)}


class Unread(Recorder):
    """Some of its images cannot be read."""

    def __getitem__(self, index):
        if index in (0, 2, 4):
            raise OSError("truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("side", ["target", "source"])
def test_images_that_are_not_finite_are_named_by_their_side_and_index(side):
    data = {"target": near_data(), "source": source_data()}
    data[side].tensors[0][[5, 17], 0, 0, 0] = torch.nan
    loader = DataLoader(data["target"], batch_size=4, sampler=SubsetRandomSampler(range(1, 60, 2)))
    bank = lt.FilterBank.from_model(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)), layers=["0"], normalize=False)
    callback = lt.SelectiveJointFinetuning(source(Unread(data["source"])), neighbors=lt.Neighbors(k=2, bank=bank))
    with pytest.raises(lt.TransferConfigError, match=rf"of 2 of \d+ {side} images .*{side} samples \[(5, 17|17, 5)\]"):
        fit(LitToy(), [callback], loader=loader)


@each_forward
@pytest.mark.parametrize("callback", [lt.SoftFinetuning, lt.SelectiveJointFinetuning])
def test_images_of_float64_are_those_of_float32(callback, forward):
    """As numpy makes them: in the measured gap, the first look, each pass and the rounds."""
    found = []
    for dtype in (torch.float32, torch.float64):
        images, labels = source_data().tensors
        task = source(TensorDataset(images.to(dtype), labels), forward=forward)
        images, labels = near_data().tensors
        options = {"neighbors": borrowed(every=1), "target": TensorDataset(images.to(dtype), labels)}
        fit(module := LitToy(), [callback(task, **(options if "Sel" in callback.__name__ else {}))], max_epochs=1)
        found.append(weights(module))
    assert_same(found[1], found[0])
