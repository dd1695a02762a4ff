"""Who borrows more in a round, which neighbors are drawn, and that a resumed run is the run that was never stopped."""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.selective import borrowing
from lightning_transfer.methods.selective.borrowing import NeighborOrder
from lightning_transfer.methods.selective.selection import Selection
from tests import toys
from tests.methods import SelectiveByHand, borrowed, toy_bank
from tests.reference import rounds as by_hand
from tests.reference.twister import Twister
from tests.toys import LitToy, Recorder, SaveEveryStep, StatefulLoader, assert_same, fit, weights

ALWAYS = lt.Schedule(1.0, 1.0)
STEPS = 12


def selective(data=None, *, neighbors=None, weight=ALWAYS, target=None, num_workers=0, **options):
    data = toys.source_data() if data is None else data
    source = {
        "head": toys.source_head(),
        "batch_size": 4,
        "unaugmented": toys.source_data(),
        "num_workers": num_workers,
    }
    return lt.SelectiveJointFinetuning(
        lt.SourceTask(data, **source),
        neighbors=neighbors or borrowed(),
        target=target or toys.target_data(),
        weight=weight,
        **options,
    )


class Follow(L.Callback):
    """Budgets and weights after every step."""

    def __init__(self, callback):
        self.callback, self.budgets, self.weights = callback, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.budgets.append((self.callback.target_weights * self.callback.neighbors.k).round().long().tolist())
        self.weights.append(weights(module))


def followed(callback, module=None, **options):
    follow = Follow(callback)
    fit(module or LitToy(), [callback, follow], **options)
    return follow


def by_hand_answers(weights_then):
    pixels, labels = toys.target_data().tensors
    return by_hand.answers(weights_then, pixels.numpy(), labels.numpy())


@pytest.fixture
def selections(monkeypatch):
    """How often was selected."""
    made, run = [], borrowing.Job.run
    monkeypatch.setattr(borrowing.Job, "run", lambda job: made.append(run(job)) or made[-1])
    return made


@pytest.mark.parametrize("module", [LitToy, toys.PlToy])
def test_budgets_follow_wrong_unsure_and_sure(module):
    """The network as it is at the round's first step, in evaluation, by loops in numpy."""
    neighbors = borrowed(k=2, rounds=2, every=2, limit=14, hard_entropy=1.1)
    callback = selective(neighbors=neighbors)
    if module is toys.PlToy:
        budgets, then = [], []

        class Both(toys.PlToy):
            def on_train_batch_end(self, *args):
                budgets.append((callback.target_weights * 2).long().tolist())
                then.append(weights(self))

        import pytorch_lightning

        fit(Both(), [callback], namespace=pytorch_lightning)
    else:
        follow = followed(callback)
        budgets, then = follow.budgets, follow.weights
    assert budgets[:2] == [[2] * 24] * 2
    first = by_hand.budgets([2] * 24, *by_hand_answers(then[1]), k=2, limit=14, hard_entropy=1.1)
    assert {*first} == {2, 6, 10}
    assert budgets[2:4] == [first] * 2
    second = by_hand.budgets(first, *by_hand_answers(then[3]), k=2, limit=14, hard_entropy=1.1)
    assert budgets[4:] == [second] * 8
    assert max(second) == 14
    assert all(after >= before for before, after in zip(first, second, strict=True))


def test_a_quantile_is_that_of_the_right_answers():
    callback = selective(neighbors=borrowed(k=2, hard_entropy="75%"))
    follow = followed(callback)
    is_correct, entropy = by_hand_answers(follow.weights[1])
    hard = np.quantile(entropy[is_correct], 0.75)
    assert 4 < is_correct.sum() < 24
    assert not np.isclose(np.quantile(entropy, 0.75), hard)
    expected = by_hand.budgets([2] * 24, is_correct, entropy, k=2, limit=10, hard_entropy=hard - 1e-6)
    assert follow.budgets[-1] == expected
    assert expected.count(6) == int(np.ceil(is_correct.sum() / 4))


def test_a_users_dropout_is_off_when_the_network_is_asked():
    class Dropping(LitToy):
        def __init__(self):
            super().__init__()
            features = self.model.features
            self.drop = nn.Dropout(0.9)
            self.model.features = lambda pixels: nn.functional.dropout(self.drop(features(pixels)), 0.5, self.training)

    follow = followed(selective(neighbors=borrowed(k=2, hard_entropy=1.1)), Dropping())
    expected = by_hand.budgets([2] * 24, *by_hand_answers(follow.weights[1]), k=2, limit=10, hard_entropy=1.1)
    assert follow.budgets[2] == expected
    assert len({*expected}) > 1


def test_an_eval_of_the_users_that_does_nothing_changes_nothing():
    class Stubborn(LitToy):
        def train(self, mode=True):
            super().train(True)
            return self

        def eval(self):
            return self

    follow = followed(selective(neighbors=borrowed(k=2, hard_entropy=1.1)), Stubborn())
    expected = by_hand.budgets([2] * 24, *by_hand_answers(follow.weights[1]), k=2, limit=10, hard_entropy=1.1)
    assert follow.budgets[2] == expected


def test_asking_changes_nothing_in_training():
    """Where a round can give nothing more, every loss, weight, statistic, flag and random number is as without it."""

    class Seen(LitToy):
        def __init__(self):
            super().__init__()
            self.model.drop = nn.Dropout(0.3)
            features = self.model.features
            self.model.features = lambda pixels: self.model.drop(features(pixels))
            self.frozen = nn.Sequential(nn.BatchNorm1d(2)).eval()
            self.seen = []

        def on_train_batch_end(self, *args):
            flags = [layer.training for layer in self.modules()]
            self.seen.append((flags, torch.rand(()).item(), np.random.rand(), random.random()))

    runs = []
    for num in (0, 3):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        module, data = Seen(), Recorder(toys.source_data())
        given = {"limit": 4, "every": 2} if num else {}
        fit(module, [selective(data, neighbors=borrowed(k=4, rounds=num, **given))])
        runs.append((module, data))
    (one, data), (other, same_data) = runs
    assert one.losses == other.losses
    assert one.seen == other.seen
    assert data.loaded == same_data.loaded
    assert_same(weights(one), weights(other))
    assert not other.frozen.training


def test_rounds_never_search_again(selections):
    follow = followed(selective(neighbors=borrowed(k=2, rounds=3)))
    assert len(selections) == 1
    assert len({*map(tuple, follow.budgets)}) > 2
    assert selections[0].indices.shape == (24, 10)


@pytest.mark.parametrize(
    ("neighbors", "options", "changes"),
    [
        ({"rounds": 2, "every": None}, {}, [4, 8]),
        ({"rounds": 1, "every": None}, {}, [6]),
        ({"rounds": 3, "every": None}, {"max_epochs": -1, "max_steps": 8}, [2, 4, 6]),
        ({"rounds": 2, "every": None}, {"accumulate_grad_batches": 2}, [4, 8]),  # batches: 6 steps
        ({"rounds": 2, "every": 5}, {}, [5, 10]),
        ({"rounds": 2, "every": 1}, {}, [1, 2]),
        ({"rounds": 0, "every": None, "limit": None}, {}, []),
    ],
)
def test_rounds_share_training_out_evenly_or_come_every_so_many_steps(neighbors, options, changes):
    """Most target images are wrong, so that every round is seen."""
    follow = followed(selective(neighbors=borrowed(**{"k": 1, "limit": 20, **neighbors})), **options)
    budgets = [[1] * 24, *follow.budgets]
    assert [step for step in range(len(follow.budgets)) if budgets[step + 1] != budgets[step]] == changes


def test_budgets_never_exceed_the_source():
    follow = followed(selective(neighbors=borrowed(k=6)))
    assert max(follow.budgets[-1]) == 20
    follow = followed(selective(neighbors=borrowed(k=6, limit=9)))
    assert {*follow.budgets[-1]} <= {6, 9}


def test_borrowing_nearly_all_of_the_source_is_said(caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        for k in (1, 19):
            fit(LitToy(), [selective(neighbors=borrowed(k=k, rounds=0))], max_steps=1)
    few, all_but_one = [line for line in caplog.messages if "together they borrow" in line]
    assert few.endswith("of 20.")
    assert "of 20, nearly all of it: pass fewer neighbors=" in all_but_one


def test_a_small_source_lends_what_is_left_of_it():
    """Of 20 images some are protected; six neighbors are asked for, and are there."""
    target = toys.target_data()
    source = TensorDataset(toys.source_data().tensors[0].clone(), toys.source_data().tensors[1])
    source.tensors[0][5] = toys.images(3, 5, seed=8).tensors[0][1]
    task = lt.SourceTask(source, head=toys.source_head(), batch_size=4)
    callback = lt.SelectiveJointFinetuning(
        task, neighbors=borrowed(k=6), target=target, protect=[toys.images(3, 5, seed=8)]
    )
    follow = followed(callback)
    assert callback.selection.dropped.tolist() == [[1, 5]]
    assert 6 < max(follow.budgets[-1]) <= 19


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": -1, "max_steps": -1}])
def test_training_without_an_end_asks_for_steps_between_rounds(options):
    class Stopping(LitToy):
        def on_train_batch_end(self, *args):
            raise AssertionError

    with pytest.raises(lt.TransferConfigError, match=r"Pass Neighbors\(every=<steps between rounds>\), or"):
        fit(Stopping(), [selective(neighbors=borrowed(every=None))], **options)


def test_a_train_loader_without_a_length_is_not_said_to_end_before_the_first_round():
    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(toys.target_data()))

    callback = selective(neighbors=borrowed(rounds=1, every=2))
    fit(LitToy(), [callback], loader=torch.utils.data.DataLoader(Streamed(), batch_size=4))
    assert callback.part.chooser.rounds_done == 1


def by_mixin(neighbors, module=SelectiveByHand, weight=ALWAYS, **options):
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    return module(source, weight=weight, borrow=lt.Borrowing(neighbors, target=toys.target_data()))


def test_manual_optimization_asks_for_steps_between_rounds():
    with pytest.raises(lt.TransferConfigError, match=r"Neighbors\(every="):
        fit(by_mixin(borrowed(every=None)))
    module = by_mixin(borrowed(k=2, every=3, hard_entropy=1.1))
    fit(module)
    assert {*module.source_task.chooser.budget.tolist()} <= {2, 6, 10}
    assert module.source_task.chooser.rounds_done == 1
    fit(by_mixin(borrowed(rounds=0)))


def test_the_mixin_is_the_callback():
    class ByHand(SelectiveByHand):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return self.joint_loss(nn.functional.cross_entropy(self(batch[0]), batch[1]))

    module, other = by_mixin(borrowed(), ByHand), LitToy()
    fit(module)
    fit(other, [selective()])
    assert_same(weights(module.model), weights(other.model), tolerance=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_rounds_in_other_precisions(precision):
    follow = followed(selective(neighbors=borrowed(k=2, hard_entropy=1.1)), precision=precision)
    then = {name: value.double().numpy() for name, value in follow.weights[1].items()}
    is_correct, entropy = by_hand_answers(then)
    expected = by_hand.budgets([2] * 24, is_correct, entropy, k=2, limit=10, hard_entropy=1.1)
    near = sum(one != other for one, other in zip(follow.budgets[2], expected, strict=True))
    assert near <= (0 if precision == "64-true" else 2)


def test_the_selection_is_the_same_in_every_precision(selections):
    for precision in ("32-true", "bf16-mixed", "64-true"):
        fit(LitToy(), [selective(neighbors=borrowed(rounds=0))], precision=precision, max_epochs=1)
    for made in selections[1:]:
        assert torch.equal(made.indices, selections[0].indices)
        assert torch.equal(made.distances, selections[0].distances)


def test_labels_that_rounds_cannot_use_are_refused():
    pixels, labels = toys.target_data().tensors
    one_hot = TensorDataset(pixels, nn.functional.one_hot(labels).float())
    with pytest.raises(lt.TransferConfigError, match=r"Pass target= with such labels, or Neighbors\(rounds=0\)"):
        fit(LitToy(), [selective(target=one_hot)])
    fit(LitToy(), [selective(target=one_hot, neighbors=borrowed(rounds=0))], max_epochs=1)


def test_target_images_that_do_not_fit_into_one_batch_are_named_before_anything_is_selected(selections):
    sizes = [(torch.rand(3, 16 + index % 2, 16), 0) for index in range(24)]
    with pytest.raises(lt.TransferConfigError, match=r"Target samples do not fit .* sample 1 is \(Tensor\(3, 17, 16\)"):
        fit(LitToy(), [selective(target=sizes)])
    assert selections == []


def test_answers_that_are_not_finite_stop_the_run():
    class Loud(LitToy):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 2:
                self.model.fc.bias.data[0] = torch.nan

    with pytest.raises(FloatingPointError, match="not finite; stopped in a round"):
        fit(Loud(), [selective()])


def test_target_images_with_answers_that_are_not_finite_are_named_by_their_index():
    class Exploding(LitToy):
        def forward(self, pixels):
            is_marked = pixels[:, :1, :1, :1] == 7.5
            return super().forward(pixels if torch.is_grad_enabled() else pixels.masked_fill(is_marked, torch.nan))

    pixels, labels = toys.target_data().tensors
    pixels[[3, 9], 0, 0, 0] = 7.5
    data = TensorDataset(pixels, labels)
    loader = DataLoader(data, batch_size=4, sampler=[*range(1, 24, 2)])  # in which they are the second and the fifth
    with pytest.raises(FloatingPointError, match=r"target samples \[3, 9\] are not finite; stopped in a round"):
        fit(Exploding(), [selective(target=data)])
    task = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)
    with pytest.raises(FloatingPointError, match=r"target samples \[3, 9\]"):
        fit(Exploding(), [lt.SelectiveJointFinetuning(task, neighbors=borrowed(), weight=1.0)], loader=loader)


# which neighbors are drawn


def order_of(counts, *, seed=0, times=None):
    """Target image i has source images from 100 i on."""
    counts = torch.tensor(counts)
    pool = torch.cat([100 * image + torch.arange(int(count)) for image, count in enumerate(counts)])
    return NeighborOrder(pool, counts, torch.ones_like(counts) if times is None else torch.tensor(times), seed)


def test_one_neighbor_of_every_target_image_a_turn():
    order = order_of([3, 1, 5, 2, 4])
    turns = [[image // 100 for image in order(range(5 * turn, 5 * turn + 5))] for turn in range(40)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns)
    assert len({*map(tuple, turns)}) > 20  # in another order every time round


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_neighbors_are_drawn_uniformly_and_independently(seed):
    num_targets, count, num_turns = 20, 5, 400
    order = order_of([count] * num_targets, seed=seed)
    drawn = np.array(order(range(num_targets * num_turns)))
    target, place = drawn // 100, drawn % 100
    table = np.zeros((num_targets, count))
    np.add.at(table, (target, place), 1)
    expected = num_turns / count
    assert ((table - expected) ** 2 / expected).sum(1).max() < 25  # 4 degrees of freedom: one in 20,000
    assert ((table - expected) ** 2 / expected).sum() < 150  # 80 degrees of freedom
    by_offset = np.zeros((num_targets, count))  # nor does the place in the turn say which it is
    np.add.at(by_offset, (np.arange(len(drawn)) % num_targets, place), 1)
    assert ((by_offset - expected) ** 2 / expected).sum(1).max() < 25
    pairs = np.zeros((count, count))
    np.add.at(pairs, (place[:-1], place[1:]), 1)
    assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < 60  # 24 degrees of freedom


def test_an_order_is_a_function_of_seed_and_position():
    order, forwards = order_of([3, 1, 5]), order_of([3, 1, 5])(range(60))
    backwards = [order(range(position, position + 1)) for position in reversed(range(60))]
    assert [image for batch in reversed(backwards) for image in batch] == forwards
    torch.manual_seed(9)
    assert order(range(60)) == forwards
    assert order_of([3, 1, 5], seed=1)(range(60)) != forwards


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_an_order_is_that_of_an_independent_generator(size):
    counts, times, found, wanted = [3, 0, 5, 2], [1, 2, 3, 1], [], []
    images, order = [0, 2, 2, 2, 3], order_of(counts, seed=11, times=times)
    for start in range(0, 80, size):
        found += order(range(start, start + size))
    for turn in range(-(-len(found) // 5)):
        twister = Twister(11, turn)
        targets = [images[place] for place in twister.permutation(5)]
        draws = zip(targets, twister.doubles(5), strict=True)
        wanted += [100 * image + int(draw * counts[image]) for image, draw in draws]
    assert found == wanted[: len(found)]


def test_a_longer_list_moves_no_other_target_image():
    before, after = order_of([4, 4, 4, 4]), order_of([4, 20, 4, 12])
    for one, other in zip(before(range(80)), after(range(80)), strict=True):
        assert one // 100 == other // 100
        assert one == other or one // 100 in (1, 3)


def test_target_images_without_neighbors_are_passed_over_and_hard_ones_come_again():
    order = order_of([3, 0, 2, 5], times=[1, 4, 2, 5])
    for turn in range(10):
        drawn = [image // 100 for image in order(range(8 * turn, 8 * turn + 8))]
        assert sorted(drawn) == [0, 2, 2, 3, 3, 3, 3, 3]


@pytest.fixture
def lists(monkeypatch):
    """Lists by hand in place of a selection: target image i has source images in an order of its own."""
    generator = torch.Generator().manual_seed(4)
    indices = torch.stack([torch.randperm(20, generator=generator) for _ in range(24)])

    def select(job):
        k = job.longest
        none = torch.empty(0, 2, dtype=torch.int64)
        labels = toys.source_data().tensors[1]
        distances = torch.zeros(24, k, dtype=torch.float64)
        return Selection(indices[:, :k], distances, {}, torch.zeros(24), labels, none, none, none[:, 0])

    monkeypatch.setattr(borrowing.Job, "run", select)
    return indices


def drawn_in(callback_of, **options):
    data = Recorder(toys.source_data())
    callback = callback_of(data)
    follow = followed(callback, **options)
    return data.loaded, follow


def test_only_the_first_neighbors_are_drawn_and_more_of_them_after_a_round(lists):
    """Target images that the round gives nothing to keep to what they had."""
    loaded, follow = drawn_in(
        lambda data: selective(data, neighbors=borrowed(k=1, limit=20, rounds=1, every=6)), max_epochs=4
    )
    first, second = lists[:, 0].tolist(), follow.budgets[-1]
    assert sorted(loaded[:24]) == sorted(first)  # six steps of four: one turn
    allowed = {image for row, budget in zip(lists.tolist(), second, strict=True) for image in row[:budget]}
    assert {*loaded[24:]} <= allowed
    assert {*loaded[24:]} - {*first}


@pytest.mark.parametrize("least", [1, 9, 11])
def test_source_classes_with_few_borrowed_images_are_left_out(lists, least):
    labels = toys.source_data().tensors[1].tolist()
    near = lists[:, :2].tolist()
    kept = by_hand.borrowed_of_large_classes(near, [2] * 24, labels, min(least, 3))
    loaded, _ = drawn_in(
        lambda data: selective(data, neighbors=borrowed(k=2, rounds=0, min_per_class=min(least, 3))),
        max_epochs=9,
    )
    assert {*loaded} == {image for row in kept for image in row}


def test_classes_are_those_of_the_borrowed_images_not_of_the_source(lists):
    """Of 20 source images each target image borrows its first; some classes are left with one or two of them."""
    labels = toys.source_data().tensors[1].tolist()
    near = (lists[:, :1] % 9).tolist()  # few distinct ones
    lists[:, 0] %= 9
    kept = by_hand.borrowed_of_large_classes(near, [1] * 24, labels, 2)
    expected = {image for row in kept for image in row}
    assert 0 < len(expected) < len({image for row in near for image in row})
    loaded, _ = drawn_in(lambda data: selective(data, neighbors=borrowed(k=1, rounds=0, min_per_class=2)), max_epochs=9)
    assert {*loaded} == expected
    num_left = sum(1 for row in kept if row)
    assert sorted(loaded[:num_left]) == sorted(row[0] for row in kept if row)  # a turn passes over the others


def test_logged_is_the_number_of_neighbors_that_are_drawn_from(lists):
    labels = toys.source_data().tensors[1].tolist()
    kept = by_hand.borrowed_of_large_classes(lists[:, :2].tolist(), [2] * 24, labels, 3)
    callback = selective(neighbors=borrowed(k=2, rounds=0, min_per_class=3))
    fit(LitToy(), [callback], max_steps=1)
    found = float(callback._borrowed.values()["transfer/neighbors"])
    assert found == pytest.approx(np.mean([len(row) for row in kept]))
    assert found < 2


def test_before_a_fit_there_is_no_selection_even_if_the_cache_has_one(tmp_path):
    used = selective(neighbors=borrowed(rounds=0), cache=tmp_path / "chosen.safetensors")
    fit(LitToy(), [used], max_steps=1)
    assert used.selection is not None
    assert selective(neighbors=borrowed(rounds=0), cache=tmp_path / "chosen.safetensors").selection is None


def test_when_no_class_is_left_it_is_an_error(lists):
    with pytest.raises(
        lt.TransferConfigError, match="No source class has min_per_class=1000 .*the largest has .*smaller"
    ):
        fit(LitToy(), [selective(neighbors=borrowed(min_per_class=1000))])


def test_unknown_classes_are_kept_with_a_warning(lists, monkeypatch):
    select = borrowing.Job.run

    def without_labels(job):
        made = select(job)
        object.__setattr__(made, "source_labels", torch.full((20,), -1))
        return made

    monkeypatch.setattr(borrowing.Job, "run", without_labels)
    with pytest.warns(lt.NoEffectWarning, match="Source classes are not known"):
        loaded, _ = drawn_in(lambda data: selective(data, neighbors=borrowed(k=1, rounds=0, min_per_class=5)))
    assert sorted(loaded[:24]) == sorted(lists[:, 0].tolist())


def test_hard_target_images_are_drawn_for_as_often_as_they_borrow(lists):
    """In a turn after the round: m times as many neighbors, m times as many draws."""
    lists[:, :10] = torch.arange(24)[:, None] % 20  # all neighbors of a target image are one source image
    lists[20:, :10] = torch.tensor([0, 1, 2, 3])[:, None]
    loaded, follow = drawn_in(
        lambda data: selective(data, neighbors=borrowed(k=2, every=6, oversample_hard=True, hard_entropy=1.1)),
        max_epochs=20,
    )
    times = [budget // 2 for budget in follow.budgets[-1]]
    assert len({*times}) > 1
    turn = sum(times)
    expected = sorted(int(lists[image, 0]) for image, often in enumerate(times) for _ in range(often))
    start = next(  # the first whole turn behind the round
        position for position in range(24, len(loaded)) if position % turn == 0
    )
    assert sorted(loaded[start : start + turn]) == expected
    assert (torch.tensor(follow.budgets[-1]) / 2).tolist() == follow.callback.target_weights.tolist()


def test_augmented_images_are_drawn_and_unaugmented_ones_compared(selections):
    images = toys.Augmented(toys.source_data())
    given = {"num_classes": toys.SOURCE_CLASSES, "unaugmented": toys.source_data(), "batch_size": 4}
    for data in (images, toys.source_data()):
        callback = lt.SelectiveJointFinetuning(
            lt.SourceTask(data, **given), neighbors=borrowed(rounds=0), target=toys.target_data(), weight=ALWAYS
        )
        fit(LitToy(), [callback], max_epochs=1)
    assert torch.equal(selections[0].indices, selections[1].indices)
    task = lt.SourceTask(images, num_classes=toys.SOURCE_CLASSES, batch_size=4)
    callback = lt.SelectiveJointFinetuning(task, neighbors=borrowed(), target=toys.target_data(), weight=ALWAYS)
    with pytest.raises(lt.TransferConfigError, match=r"random.*SourceTask\(unaugmented=\)"):
        fit(LitToy(), [callback])


def test_unaugmented_images_of_another_number_are_refused():
    task = lt.SourceTask(toys.source_data(), head=toys.source_head(), unaugmented=toys.images(19, 7, seed=0))
    callback = lt.SelectiveJointFinetuning(task, neighbors=borrowed(), target=toys.target_data(), weight=ALWAYS)
    with pytest.raises(
        lt.TransferConfigError, match="unaugmented has 19 images, the source dataset 20; expected the same"
    ):
        fit(LitToy(), [callback])


def test_more_neighbors_than_source_images_are_refused_at_construction():
    with pytest.raises(lt.TransferConfigError, match="neighbors=21 exceeds the 20 source images; pass neighbors<=20"):
        selective(neighbors=21)
    with pytest.raises(lt.TransferConfigError, match="protect takes a list"):
        selective(protect=toys.target_data())
    with pytest.raises(lt.TransferConfigError, match=r"neighbors='many'; write a number, or Neighbors\(k=300\)"):
        selective(neighbors="many")


# resumed


def test_resume_in_any_round_is_exact(tmp_path, selections):
    """Before, between and behind the rounds at steps 3 and 6: nothing is selected anew, the same images are drawn."""
    options = {"k": 2, "rounds": 2, "every": 3, "limit": 14, "hard_entropy": 1.3, "min_per_class": 2}
    data = Recorder(toys.source_data())
    callback, whole = selective(data, neighbors=borrowed(**options)), LitToy()
    follow = Follow(callback)
    fit(whole, [callback, follow, SaveEveryStep(tmp_path)], loader=StatefulLoader())
    assert len({*map(tuple, follow.budgets)}) == 3
    for cut in range(1, STEPS):
        rest, module = Recorder(toys.source_data()), LitToy()
        resumed = selective(rest, neighbors=borrowed(**options))
        again = Follow(resumed)
        fit(module, [resumed, again], loader=StatefulLoader(), ckpt_path=tmp_path / f"step={cut}.ckpt")
        assert module.losses == whole.losses[cut:]
        assert rest.loaded == data.loaded[4 * cut :]
        assert again.budgets == follow.budgets[cut:]
        assert_same(weights(module), weights(whole))
    assert len(selections) == 1


def test_resume_twice_and_with_workers(tmp_path, selections):
    options = {"k": 2, "rounds": 2, "every": 3, "limit": 14, "oversample_hard": True}
    whole = LitToy()
    fit(whole, [selective(neighbors=borrowed(**options)), SaveEveryStep(tmp_path / "a")], loader=StatefulLoader())
    again = [selective(neighbors=borrowed(**options)), SaveEveryStep(tmp_path / "b")]
    fit(LitToy(), again, loader=StatefulLoader(), ckpt_path=tmp_path / "a/step=2.ckpt")
    module = LitToy()
    last = [selective(neighbors=borrowed(**options), num_workers=1)]
    fit(module, last, loader=StatefulLoader(), ckpt_path=tmp_path / "b/step=5.ckpt")
    assert_same(weights(module), weights(whole))
    assert len(selections) == 1


def test_resume_with_other_neighbors_is_refused_with_the_differences(tmp_path):
    fit(LitToy(), [selective(), SaveEveryStep(tmp_path)], max_epochs=1)
    other = {
        "k": 5,
        "bins": 3,
        "rounds": 2,
        "every": 4,
        "hard_entropy": "50%",
        "limit": 8,
        "min_per_class": 1,
        "oversample_hard": True,
        "search": "approximate",
        "bank": lt.FilterBank.from_model(toys.toy_net(), layers=["conv"], normalize=False),
    }
    with pytest.raises(lt.TransferConfigError) as caught:
        fit(LitToy(), [selective(neighbors=lt.Neighbors(**other))], ckpt_path=tmp_path / "step=6.ckpt")
    for name in other:
        assert f"neighbors {name}: " in str(caught.value)
    assert "neighbors k: 6 in the checkpoint, 5 now" in str(caught.value)


def test_resume_with_another_target_is_refused(tmp_path):
    fit(LitToy(), [selective(neighbors=borrowed(every=4)), SaveEveryStep(tmp_path)], max_epochs=1)
    fewer = Subset(toys.target_data(), range(20))
    with pytest.raises(lt.TransferConfigError, match="24.*20|20.*24"):
        fit(LitToy(), [selective(neighbors=borrowed(every=4), target=fewer)], ckpt_path=tmp_path / "step=2.ckpt")


def test_a_second_fit_begins_anew():
    neighbors = borrowed(k=2, hard_entropy=1.1)
    callback = selective(neighbors=neighbors)
    first = followed(callback)
    second = followed(callback)
    assert first.budgets == second.budgets


# when nothing is to be drawn


def test_once_the_weight_is_zero_nothing_is_drawn_and_nobody_asked(monkeypatch):
    asked, logits = [], borrowing.NetworkView.target_logits
    monkeypatch.setattr(
        borrowing.NetworkView, "target_logits", lambda *a: asked.append(a[0].trainer.global_step) or logits(*a)
    )
    data = Recorder(toys.source_data())
    weight = lt.Schedule(until_steps=5)
    fit(LitToy(), [selective(data, neighbors=borrowed(rounds=3, every=2), weight=weight)])
    assert len(data.loaded) == 5 * 4
    assert {*asked} == {2, 4}


def test_weight_zero_selects_nothing(selections):
    data, unaugmented = Recorder(toys.source_data()), Recorder(toys.source_data())
    task = lt.SourceTask(data, head=toys.source_head(), unaugmented=unaugmented)
    callback = lt.SelectiveJointFinetuning(task, neighbors=borrowed(), weight=lt.Schedule(0, 0))
    plain, off = LitToy(), LitToy()
    fit(plain)
    fit(off, [callback], loader=DataLoader(toys.target_data(), batch_size=4))
    assert plain.losses == off.losses
    assert (selections, data.loaded, unaugmented.loaded) == ([], [], [])


# where the target comes from


def source_task():
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)


def test_without_a_target_the_train_loaders_dataset_is_used(selections):
    callback = lt.SelectiveJointFinetuning(source_task(), neighbors=borrowed(), weight=ALWAYS)
    fit(LitToy(), [callback], loader=DataLoader(toys.target_data(), batch_size=4, shuffle=True))
    fit(LitToy(), [selective()])
    assert torch.equal(selections[0].indices, selections[1].indices)
    assert callback.selection.target_labels.tolist() == toys.target_data().tensors[1].tolist()


def test_a_random_transform_of_the_train_loader_asks_for_the_target():
    callback = lt.SelectiveJointFinetuning(source_task(), neighbors=borrowed(), weight=ALWAYS)
    with pytest.raises(lt.TransferConfigError, match="target's transform is random.*Pass target="):
        fit(LitToy(), [callback], loader=DataLoader(toys.Augmented(toys.target_data()), batch_size=4))


def test_another_train_loader_asks_for_the_target():
    callback = lt.SelectiveJointFinetuning(source_task(), neighbors=borrowed(), weight=ALWAYS)
    with pytest.raises(
        lt.TransferConfigError, match="a StatefulLoader, does not show its dataset.*has target=, pass it"
    ):
        fit(LitToy(), [callback], loader=StatefulLoader())

    class Both(LitToy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loader = CombinedLoader({"a": toys.target_loader(), "b": toys.target_loader()}, "min_size")
    with pytest.raises(
        lt.TransferConfigError, match=r"a (CombinedLoader|dict), does not show its dataset.*has target=, pass it"
    ):
        toys.trainer([callback]).fit(Both(), loader)
    toys.trainer([selective()], max_epochs=1).fit(Both(), loader)


# what is seen


@pytest.mark.parametrize("bar", ["none", "tqdm", "rich"])
def test_every_kind_of_progress_bar(capsys, bar):
    bars = {"none": [], "tqdm": [TQDMProgressBar()] if bar == "tqdm" else []}
    if bar == "rich":
        bars["rich"] = [RichProgressBar()]
    follow = followed_beside(bars[bar], enable_progress_bar=bar != "none")
    out, err = capsys.readouterr()
    for name in (
        "Filters over the target",
        "Filters over the source",
        "Near duplicates",
        "Which target images are hard",
    ):
        assert (name in out + err) == (bar == "tqdm")  # rich shows nothing where there is no terminal
    assert len(follow.budgets) == STEPS


def followed_beside(callbacks, **options):
    callback = selective(neighbors=borrowed(k=2))
    follow = Follow(callback)
    fit(LitToy(), [callback, follow, *callbacks], **options)
    return follow


def test_a_rich_that_shows_one_display_at_a_time(monkeypatch):
    """As it did before 14.1; the Trainer's is on while rounds ask and the source is described."""
    from rich.console import Console
    from rich.errors import LiveError

    set_live = Console.set_live

    def only_one(console, live):
        if console._live_stack:
            raise LiveError("Only one live display may be active at once")
        return set_live(console, live)

    monkeypatch.setattr(Console, "set_live", only_one)
    assert len(followed_beside([RichProgressBar()], enable_progress_bar=True).budgets) == STEPS


def test_how_much_is_borrowed_is_logged(tmp_path):
    class Logged(L.Callback):
        values = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, *args):
            self.values.append(trainer.callback_metrics["transfer/neighbors"].item())

    callback, logged = selective(neighbors=borrowed(k=2)), Logged()
    follow = Follow(callback)
    fit(LitToy(), [callback, follow, logged])
    assert logged.values == pytest.approx([np.mean(budgets) for budgets in follow.budgets])
    assert "neighbors=" in repr(callback)
    assert toy_bank().describe() in callback.part.describe()["neighbors bank"]


def test_a_target_on_another_scale_than_what_is_trained_on_is_refused():
    """Rounds would ask the network about pixels that it has never seen the like of."""
    pixels, labels = toys.target_data().tensors
    raw = torch.utils.data.TensorDataset((pixels - pixels.min()) / 99, labels)
    plain = torch.utils.data.TensorDataset(toys.source_data().tensors[0].abs() / 99, toys.source_data().tensors[1])
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, unaugmented=plain)
    callback = lt.SelectiveJointFinetuning(source, neighbors=borrowed(k=2), target=raw, weight=ALWAYS)
    with pytest.raises(
        lt.TransferConfigError, match="Target pixels run from 0.00 .*validation sees it, with the same normalisation"
    ):
        fit(LitToy(), [callback])


def test_unaugmented_images_in_another_order_are_refused_by_their_labels():
    pixels, labels = toys.source_data().tensors
    turned = torch.utils.data.TensorDataset(pixels.flip(0), labels.flip(0))
    source = lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, unaugmented=turned)
    with pytest.raises(lt.TransferConfigError, match="labels of unaugmented= are not those of the source dataset"):
        fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(k=2), target=toys.target_data())])


class Raw(Recorder):
    """Lists other numbers than its samples have."""

    @property
    def targets(self):
        return (self.dataset.tensors[1] + 100).tolist()


@pytest.mark.parametrize("raw", ["dataset", "unaugmented"])
def test_lists_of_other_labels_than_the_samples_have_are_not_compared(raw):
    plain = toys.source_data()
    data = {"dataset": plain, "unaugmented": plain, raw: Raw(plain)}
    source = lt.SourceTask(data["dataset"], head=toys.source_head(), batch_size=4, unaugmented=data["unaugmented"])
    fit(LitToy(), [lt.SelectiveJointFinetuning(source, neighbors=borrowed(), target=toys.target_data())], max_epochs=1)
