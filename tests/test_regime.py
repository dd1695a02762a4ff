"""The regime benchmark: what is learned from is never scored, rows begin alike, the queue resumes, rates are chosen."""

import copy
import dataclasses
import importlib
import io
import json
import pathlib
import statistics
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from lightning_transfer.tracing import evaluating

BENCHMARKS = pathlib.Path(__file__).parents[1] / "examples/benchmarks"
CLASSES = 5


@pytest.fixture
def regime(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for path in BENCHMARKS.glob("regime*.py"):  # before anything is replaced that one of them reads when imported
        importlib.import_module(path.stem)
    import regime
    import regime_data
    import regime_network
    import regime_results
    import regime_rows
    import regime_training

    caches = regime.committed, regime.of_timm, regime.read_cell, regime_data.load, regime_data.source
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(regime, "RESULTS", tmp_path / "results")
    regime.RESULTS.mkdir()
    monkeypatch.setattr(regime_data, "SIDE", 32)
    monkeypatch.setattr(regime_data, "WHOLE", 36)
    monkeypatch.setattr(regime_rows, "FIRST_LAYERS", ["conv_stem"])
    yield types.SimpleNamespace(
        main=regime,
        data=regime_data,
        network=regime_network,
        results=regime_results,
        rows=regime_rows,
        training=regime_training,
    )
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """Made photographs: a target of five classes with 16 images each, every image another one, and a source."""
    _save(tmp_path / "tgt_trashnet.npz", CLASSES)
    for file in ("src_in1k", "src_in37"):
        _save(tmp_path / f"{file}.npz", 4, imagenet_index=np.arange(4) * 3)
    return tmp_path


def _save(path, num_classes, **more):
    random, parts = np.random.default_rng(0), {}
    for split, number in (("train", 16 * num_classes), ("test", 4 * num_classes)):
        files = []
        for image in random.integers(0, 256, (number, 5, 5, 3), np.uint8):
            file = io.BytesIO()
            Image.fromarray(image).resize((40, 40)).save(file, "JPEG")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        parts |= {f"{split}_bytes": np.concatenate(files), f"y_{split}": np.arange(number) % num_classes}
        parts[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
    np.savez(path, **parts, **more)


def _network():
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=12)
    network(torch.rand(8, 3, 32, 32))  # BatchNorm has seen images, as in pretraining
    return network


def _setting(regime, folder, steps=3):
    draw = regime.data.target("trashnet", folder, shots=10, seed=1)
    return regime.rows.Setting(draw, regime.data.source(folder), _network(), _network, folder, steps)


def _plan(regime, folder, **options):
    plan = regime.main.Plan(
        folder, (("test_efficientnet", None),) * 2, folder / "out", targets=("trashnet",), **options
    )
    for name in ("cells", "claims", "made"):
        (plan.out / name).mkdir(parents=True)
    return plan


def _each(photos):
    return {image.numpy().tobytes() for image in photos.pixels}


@pytest.mark.parametrize("shots", [5, 0])
def test_what_is_learned_from_is_never_scored(regime, folder, shots):
    drawn = [regime.data.target("trashnet", folder, shots=shots, seed=seed) for seed in (1, 2)]
    for each in drawn:
        assert _each(each.train).isdisjoint(_each(each.validation))
        assert _each(each.train).isdisjoint(_each(each.test))
        assert each.train.targets.bincount().tolist() == [shots or 12] * CLASSES
    assert _each(drawn[0].validation) == _each(drawn[1].validation)
    assert (_each(drawn[0].train) == _each(drawn[1].train)) == (not shots)


def test_source_labels_are_places_in_the_pretrained_classifier(regime, folder):
    assert regime.data.source(folder).targets.unique().tolist() == [0, 3, 6, 9]


@pytest.fixture
def plain(regime, folder, monkeypatch):
    return _seen(regime, folder, monkeypatch, "fine-tuning")


def _seen(regime, folder, monkeypatch, row):
    """The head and the batches that a row has had, at a rate of 0."""
    batches = []
    record = lambda self, trainer, module, outputs, batch, index: batches.append(batch)  # noqa: E731
    monkeypatch.setattr(regime.training.Looking, "on_train_batch_end", record)
    rates = regime.network.Rates(0.0, 10.0)
    row = regime.rows.ROWS[row]
    module, _ = regime.training.fit(row, _setting(regime, folder), seed=3, rates=rates, device="cpu", stop=None)
    heads = [param.detach() for param in module.parameters() if param.shape[:1] == (CLASSES,) and param.ndim == 2]
    return heads, torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_begin_with_the_same_head_and_see_the_same_batches(regime, folder, plain, monkeypatch):
    trained = [name for name, row in regime.rows.ROWS.items() if row.is_trained]
    assert len(trained) >= 24
    (head,), images, labels = plain
    for row in trained:
        heads, mine, classes = _seen(regime, folder, monkeypatch, row)
        assert any(each.equal(head) for each in heads) != regime.rows.ROWS[row].from_probe, row
        assert mine[: len(images)].equal(images), row
        assert classes[: len(labels)].equal(labels), row


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_new_head_begins_as_the_probe_where_a_row_says_so(regime, folder):
    setting = _setting(regime, folder)
    network = regime.training.with_new_head(setting, seed=1, from_probe=True)
    inputs = regime.network.features(network, setting.draw.test)
    weight, bias = _by_hand(
        regime, regime.network.features(setting.network, setting.draw.train), setting.draw.train.targets
    )
    expected = (inputs @ weight.T + bias).softmax(1)
    assert torch.allclose(regime.network.answers(network, setting.draw.test).softmax(1), expected, atol=2e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "number"), [("LP-FT, two networks", 2), ("LP-FT, frozen statistics, clipped, gated transfer", 1)]
)
def test_every_head_begins_as_the_probe_of_what_it_takes(regime, folder, monkeypatch, name, number):
    setting, found = _setting(regime, folder), []
    images = torch.stack([image for image, _ in setting.draw.train])

    def look(self, trainer, module):
        linear = [each for each in module.modules() if isinstance(each, torch.nn.Linear)]
        heads = [each for each in linear if each.out_features == CLASSES]
        hooks = [each.register_forward_hook(lambda head, args, _: found.append((head, args[0]))) for each in heads]
        with evaluating(module):
            module.model(images)
        for hook in hooks:
            hook.remove()

    monkeypatch.setattr(regime.training.Looking, "on_train_start", look)
    rates = regime.network.Rates(0.0, 10.0)
    regime.training.fit(regime.rows.ROWS[name], setting, seed=3, rates=rates, device="cpu", stop=None)
    assert len(found) == number
    wanted = torch.eye(CLASSES)[setting.draw.train.targets]
    for head, taken in found:  # at its optimum, the loss's slope is opposite to the penalty's
        slope = (head(taken).softmax(1) - wanted).T @ (taken - taken.mean(0))
        assert torch.cosine_similarity(slope.flatten(), head.weight.flatten(), dim=0) < -0.99


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_source_images_are_as_many_as_are_selected(regime, folder, monkeypatch):
    monkeypatch.setattr(regime.rows, "NEIGHBORS", 2)
    setting = _setting(regime, folder)
    (callback,) = regime.rows.ROWS["selective"].callbacks(setting)
    rates = regime.network.Rates(0.0, 10.0)
    row = dataclasses.replace(regime.rows.ROWS["selective"], callbacks=lambda setting: [callback])
    regime.training.fit(row, setting, seed=3, rates=rates, device="cpu", stop=None)
    selected = {*callback.selection.indices[:, :2].flatten().tolist()}
    task = setting.random_source()
    assert len(task.plain_dataset) == len(selected) < len(setting.source)
    assert _each(task.plain_dataset) <= _each(setting.source)
    assert not task.plain_dataset.augmented
    assert task.dataset.augmented


def _by_hand(regime, inputs, labels):
    """Logistic regression with the penalty of the least log loss over five folds."""
    folds = [*StratifiedKFold(5).split(inputs, labels)]

    def loss(penalty):
        losses = []
        for learned, held in folds:
            model = LogisticRegression(C=penalty, max_iter=1000).fit(inputs[learned], labels[learned])
            losses.append(-np.log(model.predict_proba(inputs[held])[range(len(held)), labels[held]]).mean())
        return np.mean(losses)

    model = LogisticRegression(C=min(regime.rows.PENALTIES, key=loss), max_iter=1000).fit(inputs, labels)
    return torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()


def test_the_penalty_is_the_one_of_least_log_loss(regime):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    inputs = np.float32(random.normal(size=(60, 20)) + 0.8 * np.eye(3, 20)[labels])
    for mine, expected in zip(
        regime.rows.fitted(torch.from_numpy(inputs), torch.from_numpy(labels)),
        _by_hand(regime, inputs, labels),
        strict=True,
    ):
        assert torch.allclose(mine, expected, atol=1e-3)


def test_rates_fall_with_depth(regime):
    rates = regime.network.Rates(0.01, 10.0)
    module = regime.network.Tuning(_network(), rates, depth_decay=0.5)
    stages = len(module.model.blocks)
    found = {name: module.rate_of(name.split(".")) for name, _ in module.named_parameters()}
    assert found["model.classifier.weight"] == 0.1
    assert found["model.conv_head.weight"] == found["model.bn2.weight"] == 0.01
    assert found["model.blocks.0.0.bn1.weight"] == 0.01 * 0.5**stages
    assert found["model.conv_stem.weight"] == found["model.bn1.weight"] == 0.01 * 0.5 ** (stages + 1)


@pytest.mark.parametrize("row", ["fine-tuning, AdamW", "frozen statistics, clipped, AdamW"])
def test_adamw_has_a_tenth_of_the_rates(regime, folder, row):
    module = regime.rows.ROWS[row].module(_setting(regime, folder), _network(), regime.network.Rates(0.01, 10.0))
    module.trainer = types.SimpleNamespace(max_steps=10)
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    rates = {id(param): group["initial_lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates.keys() == {*map(id, module.parameters())}
    assert rates[id(module.model.classifier.weight)] == pytest.approx(0.01)
    assert rates[id(module.model.conv_stem.weight)] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "step", "weight"),
    [("LWF", 4, 1.0), ("LWF, annealed", 0, 1.0), ("LWF, annealed", 3, 0.25), ("Co-Tuning", 4, 1.0)],
)
def test_the_kept_head_learns_what_was_said_before(regime, folder, name, step, weight):
    setting = _setting(regime, folder)
    images, labels = next(iter(torch.utils.data.DataLoader(setting.draw.train, 6)))
    network = regime.training.with_new_head(setting, seed=1, from_probe=False)
    module = regime.rows.ROWS[name].module(setting, network, regime.network.Rates(0.01, 10.0)).eval()
    module.trainer = types.SimpleNamespace(global_step=step, max_steps=8)
    teacher = setting.network.eval()
    with torch.no_grad():
        said, mine = teacher(images).double(), network(images).double()
        answers = teacher(torch.stack([setting.draw.train[index][0] for index in range(len(setting.draw.train))]))
    loss = -mine.log_softmax(1)[range(6), labels].mean()
    if "LWF" in name:
        soft = (said / 2).softmax(1)  # the student still says what its teacher says
        second = 4 * -(soft * soft.log()).sum(1).mean()
    else:
        by_class = [answers.double().softmax(1)[setting.draw.train.targets == label].mean(0) for label in labels]
        second = -(torch.stack(by_class) * said.log_softmax(1)).sum(1).mean()
    assert module.training_step((images, labels), 0).item() == pytest.approx(float(loss + weight * second), rel=1e-4)
    assert sum(param.numel() for param in module.parameters()) == sum(
        param.numel() for part in (network, setting.network.classifier) for param in part.parameters()
    )


def test_the_grid_is_walked_to_a_cell_whose_neighbors_are_all_worse(regime):
    for best_body in regime.main.BODY:
        for best_times in regime.main.TIMES:
            known = {}
            while rates := regime.main.next_rates(known):
                assert rates not in known
                known[rates] = -abs(np.log(rates.body / best_body)) - abs(np.log(rates.times / best_times))
            assert regime.main.chosen(known) == (best_body, best_times)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_finished_is_not_measured_again(regime, folder, monkeypatch):
    made = _network()
    monkeypatch.setattr(regime.main, "of_timm", lambda name, weights: made)
    monkeypatch.setitem(regime.main.STEPS["trashnet"], 10, 5)
    options = {"rows": ("fine-tuning", "linear probe"), "seeds": 1}
    measured, plan = [], _plan(regime, folder, **options)

    def interrupted(plan, job, measure=regime.main.measure):
        measured.append(job.name)
        if len(measured) == 4:
            (plan.out / "cells" / "trashnet.1").write_text("{")  # what is being written when a process is killed
            raise KeyboardInterrupt
        return measure(plan, job)

    monkeypatch.setattr(regime.main, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regime.main.work(plan)
    regime.main.gather(plan)  # and a part of it is among the committed results by then
    for path in [*plan.out.glob("cells/*.json")][:2]:
        path.unlink()
    regime.main.committed.cache_clear()
    regime.main.work(plan)
    assert measured[3] == measured[4]
    assert len(measured) == len({*measured}) + 1
    assert not [*regime.main.missing(plan, regime.main.finished(plan))]
    whole = regime.main.finished(plan)
    whole_plan = dataclasses.replace(plan, out=folder / "other")
    for name in ("cells", "claims", "made"):
        (whole_plan.out / name).mkdir(parents=True)
    regime.main.RESULTS = folder
    regime.main.committed.cache_clear()
    regime.main.work(whole_plan)
    again = regime.main.finished(whole_plan)
    assert again.keys() == whole.keys()
    for name, cell in whole.items():
        assert {**cell, "seconds": 0} == {**again[name], "seconds": 0}
    assert sum("test" in cell for cell in whole.values()) == 2


def test_results_hold_no_paths(regime, folder):
    plan = _plan(regime, folder)
    cell = {**regime.main.Job("soft", "trashnet", 10, 300, None, 1).described(), "validation": 0.5}
    (plan.out / "cells" / "one.json").write_text(json.dumps(cell))
    regime.main.gather(plan)
    text = (regime.main.RESULTS / "regime-trashnet.json").read_text()
    assert str(folder) not in text
    assert json.loads(text)["cells"] == [cell]


def test_cells_of_another_protocol_are_not_read(regime, folder):
    plan = _plan(regime, folder)
    cell = {**regime.main.Job("soft", "trashnet", 10, 300, None, 1).described(), "protocol": 0}
    (plan.out / "cells" / "one.json").write_text(json.dumps(cell))
    assert not regime.main.finished(plan)


def test_a_cell_is_claimed_once(regime, folder):
    plan, job = _plan(regime, folder), regime.main.Job("soft", "trashnet", 10, 300, None, 1)
    with regime.main.claimed(plan, job) as first, regime.main.claimed(plan, job) as second:
        assert (first, second) == (True, False)
    with regime.main.claimed(plan, job) as third:
        assert third


def test_measuring_waits_for_as_long_as_a_file_is_there(regime, tmp_path, monkeypatch):
    stop, slept = tmp_path / "STOP", []
    stop.touch()
    monkeypatch.setattr(regime.training.time, "sleep", lambda seconds: slept.append(len(slept) < 2 or stop.unlink()))
    regime.training.wait(stop)
    regime.training.wait(None)
    assert len(slept) == 3


def _finished(regime, good, steps=300):
    """All cells of fine-tuning and soft, which is better by `good`, at the chosen rates, .01 x 10."""
    job, cells = regime.main.Job, []
    for row, more in (("fine-tuning", 0.0), ("soft", good)):
        for body, times in ((0.003, 10.0), (0.01, 10.0), (0.03, 10.0), (0.01, 1.0)):
            rates = regime.network.Rates(body, times)
            found = {"validation": float(rates == (0.01, 10.0)), "seconds": 1.0}
            cells.append({**job(row, "trashnet", 10, 300, rates, 0).described(), **found})
            for seed in (1, 2, 3)[: 3 if row == "soft" else 2]:
                test = 0.5 + (more + seed / 100) * (rates == (0.01, 10.0)) * (1 + (row == "soft"))
                cells.append({**job(row, "trashnet", 10, steps, rates, seed).described(), **found, "test": test})
    return json.loads(json.dumps(cells))


def test_differences_are_of_shared_seeds_at_the_chosen_rates(regime, monkeypatch):
    cells = _finished(regime, 0.1)
    monkeypatch.setattr(regime.results, "committed", lambda: cells)
    apart, half, seeds = regime.results.difference("soft", "trashnet", 10)
    assert (apart, seeds) == (pytest.approx(21.5), 2)  # 21 and 22
    assert half == pytest.approx(12.706 * 0.5, abs=1e-3)
    assert "| soft | +21.5 ± 6.4 (2) |" in regime.results.table(10)
    cells = cells[1:]  # a neighbor that fine-tuning has not looked at
    assert regime.results.difference("soft", "trashnet", 10) is None


def test_the_mean_over_targets_is_given_once_all_are_measured(regime, monkeypatch):
    by_target = {"flowers": (1.0, 2.0, 3), "dtd10": (2.0, 2.0, 3), "scenes15": (6.0, np.nan, 1)}
    monkeypatch.setattr(regime.results, "difference", lambda row, target, shots, to: by_target[target])
    shown = regime.results.differences("soft", [*by_target], 10)
    half = 4.3027 * statistics.stdev([1.0, 2.0, 6.0]) / 3**0.5  # Student's t with two degrees of freedom
    assert shown == ["+1.0 ± 2.0", "+2.0 ± 2.0", "+6.0 (1)", f"+3.0 ± {half:.1f}"]
    by_target["flowers"] = None
    assert regime.results.differences("soft", [*by_target], 10) == ["", *shown[1:3], ""]


def test_the_caption_of_the_gains_has_means_seeds_and_how_many_intervals_lie_above_0(regime, monkeypatch, tmp_path):
    gains = importlib.import_module("regime_gains")
    alone, best = gains.SHOWN.values()
    found = {target: {alone: (1.0 + place, 3.5, 3), best: (8.0, 2.0, 5)} for place, target in enumerate(gains.TARGETS)}
    found["flowers"][best] = (-3.0, 1.0, 5)  # below 0, and its interval excludes 0 too
    monkeypatch.setattr(gains, "difference", lambda row, target, shots: found[target][row])
    said = " ".join(gains.caption().split())
    half = 2.5706 * statistics.stdev(range(6)) / 6**0.5  # Student's t with five degrees of freedom
    assert f"three to five seeds. Mean: 3.5 ({3.5 - half:.1f} to {3.5 + half:.1f}) with `FrozenStatistics`" in said
    assert "Intervals above 0: three and five of six targets." in said
    found["flowers"][best] = None
    with pytest.raises(AssertionError, match="not measured on all targets"):
        gains.caption()
    found["flowers"][best] = (-3.0, 1.0, 5)
    gains.picture(tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_other_trainings_are_compared_with_fine_tuning_of_their_own_at_the_usual_rates(regime, monkeypatch):
    usual, short = _finished(regime, 0.1), _finished(regime, 0.0, steps=100)
    all_images = [{**cell, "shots": 0} for cell in _finished(regime, 0.2, steps=450) if cell["seed"]]
    short = [cell for cell in short if cell["seed"]]
    monkeypatch.setattr(regime.results, "committed", lambda: usual)
    assert regime.results.other_trainings() == "No other training has finished yet."
    monkeypatch.setattr(regime.results, "committed", lambda: usual + short + all_images)
    assert regime.results.other_trainings().splitlines()[2:] == [
        "| trashnet | 10 | 100 | 51.5 % (2) | +1.5 ± 6.4 (2) |",
        "| trashnet | 10 | 300 | 51.5 % (2) | +21.5 ± 6.4 (2) |",
        "| trashnet | all | 450 | 51.5 % (2) | +41.5 ± 6.4 (2) |",
    ]
    assert "| soft | +21.5 ± 6.4 (2) |" in regime.results.table(10)


def test_other_trainings_have_the_rates_of_the_usual_one(regime, folder):
    cells = {regime.main.name_of(cell): cell for cell in _finished(regime, 0.1)}
    usual = _plan(regime, folder, rows=("soft",), seeds=1)
    for options, size in (({"steps": 7}, (10, 7)), ({"shots": (5,)}, (5, 300))):
        plan = dataclasses.replace(usual, **options)
        (job,) = regime.main.missing(plan, cells)
        assert (job.shots, job.steps, job.rates, job.seed) == (*size, (0.01, 10.0), 1)
    wanted = next(regime.main.missing(plan, {}))
    assert (wanted.shots, wanted.steps, wanted.seed) == (10, 300, 0)


def test_what_is_known_before_the_test_is_correlated_with_what_is_gained(regime, monkeypatch):
    """Validation and test accuracies of fine-tuning, the probe and soft in percent: two seeds, four targets."""
    numbers = np.random.default_rng(0).integers(40, 60, (4, 2, 3, 2))
    places = {"fine-tuning": 0, "linear probe": 1, "soft": 2}
    targets = dict(zip(("flowers", "dtd10", "scenes15", "trashnet"), numbers, strict=True))

    def runs(row, target, *_):
        if row not in places or target not in targets:
            return {}
        each = targets[target][:, places[row]] / 100
        return {seed: {"validation": one[0], "test": one[1]} for seed, one in enumerate(each)}

    monkeypatch.setattr(regime.results, "runs", runs)
    plain, probe, soft = (numbers[:, :, place].reshape(8, 2) for place in range(3))
    gains = (soft - plain)[:, 1].tolist()
    gaps = [statistics.mean(regime.results.GAPS["gaps"][target]) for target in targets for _ in range(2)]
    known = gaps, (probe - plain)[:, 0].tolist(), (soft - plain)[:, 0].tolist()
    shown = " | ".join(f"{statistics.correlation(one, gains):+.2f}" for one in known)
    agree = sum((one > 0) == (gain > 0) and (one < 0) == (gain < 0) for one, gain in zip(known[2], gains, strict=True))
    assert f"| soft | {shown} | {100 * agree / 8:.0f} % | 8 |" in regime.results.foretelling(10)
    targets.pop("trashnet")
    assert "soft" not in regime.results.foretelling(10)


def test_the_slope_of_a_loss_is_the_product_of_two_gradients(regime, folder):
    import regime_agreement

    given = _setting(regime, folder)
    network, target, source = given.network, given.draw.validation, given.source.only(range(5))
    torch.manual_seed(1)
    probe = torch.nn.Linear(network.num_features, CLASSES)
    found = regime_agreement.slopes(network, source, regime_agreement.gradient(network, probe, target))
    network = network.double().eval()
    params = [param for name, param in network.named_parameters() if not name.startswith("classifier.")]

    def gradient(head, pixels, labels):
        rows = network.forward_head(network.forward_features(regime.data.centre(pixels).double()), pre_logits=True)
        parts = torch.autograd.grad(torch.nn.functional.cross_entropy(head(rows), labels), params)
        return torch.cat([part.flatten() for part in parts])

    along = gradient(probe.double(), target.pixels, target.targets)
    each = zip(source.pixels.split(1), source.targets.split(1), strict=True)
    expected = torch.stack([gradient(network.classifier, *one) @ along / along.norm() for one in each])
    torch.testing.assert_close(found, expected, rtol=0.01, atol=2e-4)


def test_features_by_the_batch_are_those_of_training(regime, folder, monkeypatch):
    import regime_statistics

    monkeypatch.setattr(regime_statistics, "BATCH", 16)
    given = _setting(regime, folder)
    kept, by_batch = given.network.eval(), regime_statistics.normalizing_by_batch(given.network.eval())
    images = regime_statistics.mixed(given.draw.train)
    assert len(images) == 48  # of 50, whole batches
    assert _each(images) < _each(given.draw.train)
    inputs = [regime.data.centre(pixels) for pixels in images.pixels.split(16)]
    with torch.no_grad():
        expected = torch.cat([copy.deepcopy(kept).train()(each) for each in inputs])
    before = copy.deepcopy(by_batch.state_dict())
    assert torch.equal(regime_statistics.run(by_batch, images), expected)
    assert all(torch.equal(before[name], value) for name, value in by_batch.state_dict().items())
    adapted = regime_statistics.with_statistics_of(images, kept)
    with torch.no_grad():
        first = [kept.conv_stem(each) for each in inputs]
    assert torch.allclose(adapted.bn1.running_mean, torch.stack([each.mean((0, 2, 3)) for each in first]).mean(0))
    assert not any(layer.training for layer in adapted.modules())
    found = regime_statistics.measured(given)
    said, other = (each.double().div(2).softmax(1) for each in (regime_statistics.run(kept, images), expected))
    assert found[regime_statistics.LOSS] == pytest.approx(
        4 * float((said * (said / other).log()).sum(1).mean()), rel=1e-4
    )
    assert all(0 <= found[row] <= 100 for row in regime_statistics.ROWS)


@pytest.mark.parametrize(
    "row", ["frozen statistics, clipped", "LP-FT, frozen statistics", "frozen statistics, clipped, AdamW"]
)
def test_frozen_statistics_stay_those_of_the_pretrained_network(regime, folder, row):
    setting = _setting(regime, folder)
    how = {"seed": 1, "rates": regime.network.Rates(0.01, 10.0), "device": "cpu", "stop": None}
    module, _ = regime.training.fit(regime.rows.ROWS[row], setting, **how)
    buffers = dict(setting.network.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in module.model.named_buffers())
    assert not torch.equal(module.model.bn1.weight, setting.network.bn1.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gaps_of_pictures_made_alike_and_unlike(regime, folder, monkeypatch):
    import regime_gaps

    dark = np.load(folder / "tgt_trashnet.npz")
    black = io.BytesIO()
    Image.new("RGB", (40, 40)).save(black, "JPEG")
    file = np.frombuffer(black.getvalue(), np.uint8)
    number = len(dark["y_train"])
    ends = {"train_bytes": np.tile(file, number), "train_offsets": np.arange(number + 1) * len(file)}
    np.savez(folder / "tgt_rsscn7.npz", **{**dark, **ends})
    monkeypatch.setattr(regime.main, "of_timm", lambda name, weights: _network())
    monkeypatch.setattr(regime_gaps, "TARGETS", ("trashnet", "rsscn7"))
    monkeypatch.setattr(regime_gaps, "SEEDS", (1, 2))
    monkeypatch.setattr(regime_gaps, "PATH", folder / "gaps.json")
    regime_gaps.main(["--data", str(folder), "--out", str(folder / "out")])
    gaps = json.loads((folder / "gaps.json").read_text())["gaps"]
    assert gaps["rsscn7"] == [1.0, 1.0]  # black pictures are told from any other by everything
    assert all(gap < 0.8 for gap in gaps["trashnet"])


def test_a_step_costs_what_a_longer_training_takes_more(regime, folder, monkeypatch):
    import regime_costs

    clock, costs = [0.0], {"soft": 3.0, regime.rows.PLAIN: 2.0}

    def take(row, given, **how):
        name = next(name for name in costs if regime.rows.ROWS[name] is row)
        clock[0] += 100 * len(name) + given.steps * costs[name]  # what there is once is another time for each row

    monkeypatch.setattr(regime_costs, "fit", take)
    monkeypatch.setattr(regime_costs.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(regime_costs, "written_rows", lambda shots: [regime.rows.PROBE, "soft", "LWF"])
    monkeypatch.setattr(regime_costs, "COSTS", {"LWF": [1.1]})
    monkeypatch.setattr(regime_costs, "PATH", folder / "costs.json")
    monkeypatch.setattr(regime.main, "of_timm", lambda name, weights: _network())
    regime_costs.main(["--data", str(folder), "--out", str(folder / "out"), "--rows", regime.rows.PROBE, "soft"])
    assert json.loads((folder / "costs.json").read_text()) == {"LWF": [1.1], "soft": [1.5] * regime_costs.ROUNDS}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_draw_is_asked_about_once_and_stands_beside_what_was_measured(regime, folder, monkeypatch):
    import regime_advice

    rates = regime.network.Rates(0.01, 10.0)
    for name, value in (("PATH", folder / "advice.json"), ("PART", 1), ("rates_of", lambda *_: rates)):
        monkeypatch.setattr(regime_advice, name, value)
    monkeypatch.setattr(regime_advice, "difference", lambda row, *_: (3.0, 2.0, 3) if row == "gated transfer" else None)
    monkeypatch.setattr(regime.main, "of_timm", lambda name, weights: _network())
    asked = ["--data", str(folder), "--out", str(folder / "out"), "--targets", "trashnet", "--steps", "2", "--seeds"]
    regime_advice.main([*asked, "1"])
    (first,) = json.loads((folder / "advice.json").read_text())["draws"]
    names = {"linear probe", "frozen statistics, clipped", "gated transfer"}
    assert {each["name"] for each in first["candidates"]} == names
    assert (first["steps"], first["parts"], first["scored"]) == (2, 5, 50)
    regime_advice.main([*asked, "2"])
    draws = json.loads((folder / "advice.json").read_text())["draws"]
    assert draws[0] == first
    assert [each["seed"] for each in draws] == [1, 2]
    shown = [line for line in _lines(regime_advice) if line.startswith("| gated transfer | 5 |")]
    assert sum("| +3.0 ± 2.0 |" in line for line in shown) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_ranking_stands_beside_test_images_and_a_probe_beside_one_with_a_scale_for_each(regime, folder, monkeypatch):
    import regime_probes
    import regime_ranking

    weights = folder / "weights.pt"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    for script in (regime_probes, regime_ranking):
        monkeypatch.setattr(script, "PATH", folder / f"{script.__name__}.json")
        monkeypatch.setattr(script, "TARGETS", ("trashnet",))
    given = ["--data", str(folder), "--weights", f"test_efficientnet={weights}"]
    regime_ranking.main([*given, "--targets", "trashnet", "--random", "test_efficientnet"])
    found = json.loads(regime_ranking.PATH.read_text())["targets"]["trashnet"]
    assert {row["name"] for row in found["rows"]} == {"test_efficientnet", "test_efficientnet, random"}
    assert len(_lines(regime_ranking)) == 5
    regime_probes.main(given)
    cells = json.loads(regime_probes.PATH.read_text())["cells"]
    assert [cell["seed"] for cell in cells] == [1, 2, 3]
    mean = 100 * np.mean([cell["one"] - cell["each"] for cell in cells])
    assert _lines(regime_probes)[-1].startswith(f"| test_efficientnet | {mean:+.1f} |")
    losses = [np.mean([cell["losses"][name] for cell in cells]) for name in regime_probes.SHOWN]
    assert losses[0] < losses[2]
    lines = regime_probes.sureness().splitlines()[2:]
    assert [line.split(" | ")[1].strip("| ") for line in lines] == [f"{loss:.2f}" for loss in losses]


def _lines(script):
    return script.table().splitlines()
