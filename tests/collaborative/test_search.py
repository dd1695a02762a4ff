"""The search for layers, in fit and ahead of it."""

import copy
import os
import signal

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt
from lightning_transfer.methods.collaborative.search import candidates
from lightning_transfer.methods.collaborative.search.plan import Evaluation
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights

pytestmark = pytest.mark.filterwarnings("ignore:All .* candidates have the same accuracy")  # five images tell little
SMALL = {"particles": 2, "iterations": 1, "proxy_epochs": 1}


@pytest.fixture(autouse=True)
def ctrl_c():
    """Restore the handler: Lightning ignores further signals after the first."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Deep(LitToy):
    """Four convolutions, so that there is something to search."""

    def __init__(self):
        super().__init__()
        self.model = deep()


def deep(classes=toys.TARGET_CLASSES):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        convs = [torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU()]
        for _ in range(3):
            convs += [torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU()]
        pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, classes)]
        return torch.nn.Sequential(*convs, *pool)


class Counting:
    """In place of the training of candidates: how each one does, and how often one was trained."""

    def __init__(self, monkeypatch, score=lambda layers: 1 / (1 + abs(layers[0] - 2))):
        self.trained = []
        self.score = score
        monkeypatch.setattr(candidates.Candidates, "evaluate", lambda _, layers: self.evaluate(layers))

    def evaluate(self, layers):
        self.trained.append(layers)
        return Evaluation(layers, self.score(layers))


def searching(**options):
    return lt.CollaborativeFinetuning([deep(7)], search=lt.LayerSearch(**{**SMALL, **options}))


def loader():
    return toys.target_loader()


def test_fit_with_a_search_is_fit_with_its_plan():
    searched, given = Deep(), Deep()
    callback = searching(particles=3)
    fit(searched, [callback])
    assert callback.plan is not None
    fit(given, [lt.CollaborativeFinetuning([deep(7)], frozen_layers=callback.plan)])
    assert_same(weights(searched), weights(given))
    assert searched.losses == given.losses


def test_ahead_of_fit_it_finds_the_same():
    callback = searching(particles=3)
    fit(Deep(), [callback])
    ahead = lt.LayerSearch(**{**SMALL, "particles": 3}).run(
        Deep(), loader(), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"}
    )
    assert ahead == callback.plan


def test_a_candidate_is_scored_as_a_plain_fit_of_it_would_be():
    """By hand: the split, a fit with these layers frozen, and accuracies of the mean of logits after every epoch."""
    search = lt.LayerSearch(particles=1, iterations=0, proxy_epochs=3, validation=0.4)
    plan = search.run(Deep(), loader(), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"})
    (found,) = plan.evaluations
    images, labels = toys.target_data().tensors
    out = lt.splitting.held_out(labels.tolist(), 0.4)
    kept = [index for index in range(24) if index not in out]
    accuracies = []

    class Watching(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            twin = copy.deepcopy(module).eval()
            with torch.no_grad():
                logits = sum(member(images[out]) for member in twin.model.members.values())
            accuracies.append((logits.argmax(1) == labels[out]).double().mean().item())

    frozen = dict(zip(("own", "source1"), found.layers, strict=True))
    callbacks = [lt.CollaborativeFinetuning([deep(7)], frozen_layers=frozen), Watching()]
    data = DataLoader(TensorDataset(images[kept], labels[kept]), batch_size=4)
    fit(Deep(), callbacks, loader=data, max_epochs=3)
    assert found.accuracy == pytest.approx(max(accuracies))


def test_neither_validation_nor_test_data_is_touched():
    class Untouchable(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            raise AssertionError("validation data was asked for")

        test_dataloader = predict_dataloader = val_dataloader

    class Unvalidated(Deep):
        def validation_step(self, batch, batch_idx):
            raise AssertionError("a validation step was run")

        def val_dataloader(self):
            raise AssertionError("the module's validation data was asked for")

    plan = lt.LayerSearch(**SMALL).run(
        Unvalidated(), Untouchable(), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"}
    )
    assert [evaluation.failure for evaluation in plan.evaluations] == [""] * 4
    callback = searching()
    toys.trainer([callback], limit_val_batches=0).fit(Unvalidated(), datamodule=Untouchable())
    assert [evaluation.failure for evaluation in callback.plan.evaluations] == [""] * 4


def test_images_that_are_held_out_are_not_trained_on():
    data = toys.Recorder(toys.target_data())
    trained = []

    class Noting(Deep):
        def training_step(self, batch, batch_idx):
            trained.extend(batch[0].flatten(1).sum(1).tolist())
            return super().training_step(batch, batch_idx)

    search = lt.LayerSearch(particles=1, iterations=0, proxy_epochs=1, validation=0.4)
    search.run(
        Noting(), DataLoader(data, batch_size=4), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"}
    )
    images, labels = toys.target_data().tensors
    out = lt.splitting.held_out(labels.tolist(), 0.4)
    sums = images.flatten(1).sum(1)
    assert sorted(trained) == sorted(sums[[index for index in range(24) if index not in out]].tolist())


def test_equal_candidates_are_trained_once(monkeypatch):
    counting, callback = Counting(monkeypatch), searching(particles=8, iterations=4)
    fit(Deep(), [callback], max_steps=1)
    assert len(callback.plan.evaluations) == 40
    assert len(counting.trained) == len(set(counting.trained)) < 40
    assert {evaluation.layers for evaluation in callback.plan.evaluations} == set(counting.trained)
    best = max(evaluation.accuracy for evaluation in callback.plan.evaluations)
    assert counting.score(tuple(callback.plan.frozen.values())) == best


@pytest.mark.parametrize("strategy", ["swarm", "tpe"])
@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("kept_in", ["memory", "file"])
def test_interrupted_and_resumed_it_ends_with_the_same_plan(monkeypatch, tmp_path, strategy, cut, kept_in):
    options = {"particles": 4, "iterations": 2, "strategy": strategy}
    counting, whole = Counting(monkeypatch), searching(**options)
    fit(Deep(), [whole], max_steps=1)
    num_trained = len(counting.trained)
    cache = str(tmp_path / "search.json") if kept_in == "file" else None
    counting, module = Counting(monkeypatch), Deep()
    again = callback = searching(**options, cache=cache)

    def stop(layers):
        if len(counting.trained) > cut:
            raise KeyboardInterrupt
        return 1 / (1 + abs(layers[0] - 2))

    counting.score = stop
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, [callback], max_steps=1)
    assert type(module.model) is torch.nn.Sequential
    assert callback.plan is None
    if kept_in == "file":
        again = searching(**options, cache=cache)
    counting = Counting(monkeypatch)
    fit(module, [again], max_steps=1)
    assert len(counting.trained) == num_trained - cut
    assert again.plan == whole.plan


def test_ctrl_c_in_mid_candidate_keeps_what_is_finished(tmp_path):
    """With the real training: a signal in the second candidate, then the rest of it."""
    steps = []

    class Interrupted(Deep):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            steps.append(batch_idx)
            if len(steps) == 8:
                os.kill(os.getpid(), signal.SIGINT)

    module, cache = Interrupted(), str(tmp_path / "search.json")
    options = {"particles": 3, "iterations": 0, "cache": cache}
    before = [type(child) for child in module.modules()]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, [searching(**options)])
    assert [type(child) for child in module.modules()] == before
    assert len(lt.LayerPlan.load(cache).evaluations) == 1
    callback, whole = searching(**options), searching(**{**options, "cache": None})
    fit(Deep(), [callback])
    fit(Deep(), [whole])
    assert callback.plan == whole.plan


def test_a_candidate_that_fails_costs_only_itself(monkeypatch):
    callback = searching(particles=8, iterations=0)
    real = candidates.Trials.train

    def train(self, module, indices, callbacks, **options):
        class BreakLast(L.Callback):
            def on_train_batch_end(_, trainer, twin, outputs, batch, batch_idx):  # noqa: N805
                if batch_idx == -(-len(indices) // self.loader.batch_size) - 1:
                    twin.model.members.own.network[14].bias.data.fill_(float("nan"))

        frozen = callbacks[0].frozen_layers
        if frozen["own"] == 2:
            raise torch.OutOfMemoryError("no memory for this one")
        if frozen["own"] == 0:
            callbacks = [*callbacks[:1], BreakLast(), *callbacks[1:]]
        real(self, module, indices, callbacks, **options)

    monkeypatch.setattr(candidates.Trials, "train", train)
    with pytest.warns(UserWarning, match="candidates failed") as said:
        fit(Deep(), [callback], max_steps=1)
    failures = {evaluation.layers[0]: evaluation.failure for evaluation in callback.plan.evaluations}
    assert "OutOfMemoryError: no memory" in failures[2]
    assert failures[1] == ""
    assert "not finite" in failures[0]
    assert callback.plan.frozen["own"] == 1
    failed = {each.layers: each.failure for each in callback.plan.evaluations if each.accuracy is None}
    tried, (layers, failure) = {each.layers for each in callback.plan.evaluations}, next(iter(failed.items()))
    first = f"The first, {dict(zip(('own', 'source1'), layers, strict=True))}: {failure}"
    message = str(next(each.message for each in said if "failed" in str(each.message)))
    assert message.startswith(f"{len(failed)} of {len(tried)} candidates failed")
    assert message.endswith(first)


def test_where_all_fail_nothing_is_frozen_and_that_is_said(monkeypatch):
    def train(*args, **options):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(candidates.Trials, "train", train)
    module, callback = Deep(), searching()
    with pytest.warns(lt.NoEffectWarning, match="not on this machine"):
        fit(module, [callback], max_steps=1)
    assert callback.plan.frozen == {"own": 0, "source1": 0}
    assert all(param.requires_grad for param in module.parameters())


class Doubling(L.LightningDataModule):
    """Doubles what it moves, and knows whether it is trained on."""

    def __init__(self):
        super().__init__()
        self.moved = {True: 0, False: 0}

    def train_dataloader(self):
        assert self.trainer.world_size == 1
        return toys.target_loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved[self.trainer.training] += 1
        return [2 * batch[0], batch[1]]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_candidates_are_moved_by_the_datamodules_hooks(is_ahead):
    pixels, labels = toys.target_data().tensors
    doubled = DataLoader(TensorDataset(2 * pixels, labels), batch_size=4)
    data, expected, found = Doubling(), searching(), searching()
    if is_ahead:
        plans = [
            searching().search.run(Deep(), each, searching(), trainer={"accelerator": "cpu"})
            for each in (data, doubled)
        ]
    else:
        toys.trainer([found], max_steps=1).fit(Deep(), datamodule=data)
        fit(Deep(), [expected], loader=doubled, max_steps=1)
        plans = [found.plan, expected.plan]
    assert [each.accuracy for each in plans[0].evaluations] == [each.accuracy for each in plans[1].evaluations]
    assert data.moved[False] > 0


def test_budgets(monkeypatch):
    counting, callback = Counting(monkeypatch), searching(particles=8, iterations=4, max_evaluations=5)
    fit(Deep(), [callback], max_steps=1)
    assert len(counting.trained) == 5
    counting, callback = Counting(monkeypatch), searching(particles=8, iterations=4, max_seconds=0)
    with pytest.warns(lt.NoEffectWarning, match="No candidate"):
        fit(Deep(), [callback], max_steps=1)
    assert counting.trained == []
    assert callback.plan.frozen == {"own": 0, "source1": 0}


class Resumable(DataLoader):
    """A DataLoader that tells a checkpoint where it is."""

    start = next = 0

    def __init__(self):
        super().__init__(toys.target_data(), batch_size=4)

    def __iter__(self):
        self.next, self.start = self.start, 0
        for batch in list(super().__iter__())[self.next :]:
            self.next += 1
            yield batch

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"] % len(self)


def test_resumed_it_is_not_searched_again_and_equal_to_the_bit(monkeypatch, tmp_path):
    counting = Counting(monkeypatch)
    whole = Deep()
    callback = searching(particles=4)
    fit(whole, [callback, toys.SaveEveryStep(tmp_path)], loader=Resumable())
    assert any(callback.plan.frozen.values())
    counting.trained.clear()
    for cut in (1, 6, 11):
        module, again = Deep(), searching(particles=4)
        fit(module, [again], loader=Resumable(), ckpt_path=tmp_path / f"step={cut}.ckpt")
        assert_same(weights(module), weights(whole))
        assert again.plan == callback.plan
    assert counting.trained == []


def test_a_second_fit_goes_on_with_the_plan(monkeypatch):
    counting, callback, module = Counting(monkeypatch), searching(particles=4), Deep()
    runner = toys.trainer([callback])
    runner.fit(module, loader())
    trained, plan = len(counting.trained), callback.plan
    runner.fit_loop.max_epochs += 2
    runner.fit(module, loader())
    assert len(counting.trained) == trained
    assert callback.plan is plan
    assert module.model.frozen == {name: number for name, number in plan.frozen.items() if number}


def test_a_cache_of_another_search_is_refused_with_the_differences(monkeypatch, tmp_path):
    Counting(monkeypatch)
    cache = str(tmp_path / "search.json")
    fit(Deep(), [searching(cache=cache)], max_steps=1)
    with pytest.raises(lt.TransferConfigError, match=r"seed: 0 there, 1 now.*Name another file"):
        fit(Deep(), [searching(cache=cache, seed=1)], max_steps=1)
    other = Deep()
    with torch.no_grad():
        other.model[0].weight += 1
    with pytest.raises(lt.TransferConfigError, match="weights: "):
        fit(other, [searching(cache=cache)], max_steps=1)
    for content in ("{", "[]", '{"format": 1, "version": "0"}'):
        (tmp_path / "search.json").write_text(content)
        with pytest.raises(lt.TransferConfigError, match="not a LayerPlan|is damaged|format 1"):
            fit(Deep(), [searching(cache=cache)], max_steps=1)
    with pytest.raises(lt.TransferConfigError, match="Cannot write the search"):
        fit(Deep(), [searching(cache=str(tmp_path / "search.json/below"))], max_steps=1)


def test_a_plan_is_saved_and_given():
    plan = lt.LayerPlan({"own": 2, "source1": 1}, {"own": 4, "source1": 4})
    plan.save("plan.json")
    module = Deep()
    fit(module, [lt.CollaborativeFinetuning([deep(7)], frozen_layers="plan.json")], max_steps=1)
    assert module.model.frozen == {"own": 2, "source1": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(2, 3, 6, 6), torch.tensor([0, 1]))], "a list, cannot be split"),
        (DataLoader(toys.target_data(), batch_sampler=[[0, 1], [2, 3]]), "batch_size="),
    ],
)
def test_a_loader_that_cannot_be_split_is_refused(data, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        fit(Deep(), [searching()], loader=data)


def test_an_uneven_sampler_is_said(monkeypatch):
    Counting(monkeypatch)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 24, 24)
    with pytest.warns(UserWarning, match="equally often and do not use the loader's WeightedRandomSampler"):
        fit(Deep(), [searching()], loader=DataLoader(toys.target_data(), batch_size=4, sampler=sampler), max_steps=1)


def test_validation_sees_images_without_augmentation():
    clean = toys.Recorder(toys.target_data())
    search = lt.LayerSearch(particles=1, iterations=0, proxy_epochs=2, validation=0.4, unaugmented=clean)
    search.run(Deep(), loader(), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"})
    out = lt.splitting.held_out(toys.target_data().tensors[1].tolist(), 0.4)
    assert clean.loaded[-2 * len(out) :] == out * 2
    with pytest.raises(lt.TransferConfigError, match="unaugmented has 20 images, the train loader's dataset 24"):
        fit(Deep(), [searching(unaugmented=toys.source_data())])


def test_random_state_and_the_users_callbacks_are_left_alone():
    class Own(Deep):
        def configure_callbacks(self):
            return [L.callbacks.EarlyStopping("val_loss")]

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    before = torch.get_rng_state()
    plan = lt.LayerSearch(**SMALL).run(
        Own(), loader(), lt.CollaborativeFinetuning([deep(7)]), trainer={"accelerator": "cpu"}
    )
    assert [evaluation.failure for evaluation in plan.evaluations] == [""] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_candidates_that_cannot_be_told_apart_are_said_and_the_least_is_frozen(monkeypatch):
    counting, callback = Counting(monkeypatch, lambda layers: 0.75), searching(particles=8)
    with pytest.warns(lt.NoEffectWarning, match=r"All \d+ candidates have the same accuracy on \d+ held-out .*75\.0%"):
        fit(Deep(), [callback], max_steps=1)
    assert sum(callback.plan.frozen.values()) == min(map(sum, counting.trained))


def test_a_search_is_not_skipped_without_a_word(tmp_path):
    module = Deep()
    fit(module, [lt.CollaborativeFinetuning([deep(7)]), toys.SaveEveryStep(tmp_path)], max_steps=1)
    with pytest.raises(lt.TransferConfigError, match="this callback has not searched which of their layers to freeze"):
        fit(module, [searching()], max_steps=1)
    with pytest.raises(lt.TransferConfigError, match="run has not searched"):
        fit(Deep(), [searching()], ckpt_path=tmp_path / "step=1.ckpt")


def test_what_failed_is_tried_again_and_what_is_another_problem_is_not_taken(monkeypatch, tmp_path):
    cache = str(tmp_path / "search.json")
    real = candidates.Trials.train
    monkeypatch.setattr(candidates.Trials, "train", lambda *_, **options: 1 / 0)
    with pytest.warns(lt.NoEffectWarning, match="ZeroDivisionError"):
        fit(Deep(), [searching(cache=cache)], max_steps=1)
    monkeypatch.setattr(candidates.Trials, "train", real)
    callback = searching(cache=cache)
    fit(Deep(), [callback], max_steps=1)
    assert [evaluation.failure for evaluation in callback.plan.evaluations] == [""] * 4
    images, labels = toys.target_data().tensors

    class Grouped(TensorDataset):
        groups = tuple(index // 2 for index in range(24))

    others = {
        "training images": TensorDataset(images + 1, labels),
        "held out": Grouped(images, labels),
        "batch size": DataLoader(toys.target_data(), batch_size=5),
    }
    for name, data in others.items():
        data = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=4)
        with pytest.raises(lt.TransferConfigError, match=f"{name}: "):
            fit(Deep(), [searching(cache=cache)], loader=data)
    with pytest.raises(lt.TransferConfigError, match="trainer: "):
        fit(Deep(), [searching(cache=cache)], gradient_clip_val=1.0)


def test_candidates_are_scored_by_the_labels_that_training_has():
    images, labels = toys.target_data().tensors

    class Numbered(TensorDataset):
        targets = labels

    data = DataLoader(Numbered(images, torch.arange(24), labels), batch_size=4)

    class Third(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[2]), batch_idx)

    using = lt.CollaborativeFinetuning([deep(7)], labels=lambda batch: batch[-1])
    found = lt.LayerSearch(**SMALL).run(Third(), data, using, trainer={"accelerator": "cpu"})
    expected = lt.LayerSearch(**SMALL).run(Deep(), loader(), using, trainer={"accelerator": "cpu"})
    assert found.evaluations == expected.evaluations
    batches = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    with pytest.raises(lt.TransferConfigError, match="loader gives a dict"):
        fit(Deep(), [searching()], loader=DataLoader(Listed(batches, labels), batch_size=4))


class Listed(list):
    """A list of samples that names their classes."""

    def __init__(self, samples, targets):
        super().__init__(samples)
        self.targets = targets


def test_a_dry_run_tries_one_candidate_and_keeps_nothing(tmp_path):
    callback = searching(particles=5, iterations=3, proxy_epochs=4, cache=str(tmp_path / "search.json"))
    fit(Deep(), [callback], fast_dev_run=True)
    assert len(callback.plan.evaluations) == 1
    assert not (tmp_path / "search.json").exists()


@pytest.mark.parametrize(("using", "trainer"), [(None, None), (lt.CollaborativeFinetuning([]), L.Callback())])
def test_ahead_of_fit_what_is_no_callback_or_options_is_refused(using, trainer):
    with pytest.raises(lt.TransferConfigError, match=r"write LayerSearch\(\)\.run\("):
        lt.LayerSearch().run(Deep(), loader(), using, trainer=trainer)


def test_pictures_of_nothing_are_refused():
    for nothing in (None, "plan.json", lt.LayerPlan({"own": 1}, {"own": 4})):
        with pytest.raises(lt.TransferConfigError, match="holds no search to draw"):
            lt.reports.layer_search(nothing, "out.png")
