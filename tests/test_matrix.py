"""The transfer matrix of the benchmarks: what is learned from is never scored, and rows differ in nothing else."""

import pathlib
import types

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = pathlib.Path(__file__).parents[1] / "examples/benchmarks"


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import transfer
    import transfer_data
    import transfer_networks
    import transfer_results
    import transfer_rows
    import transfer_training

    transfer_data.load.cache_clear()
    return types.SimpleNamespace(
        main=transfer,
        data=transfer_data,
        networks=transfer_networks,
        results=transfer_results,
        rows=transfer_rows,
        training=transfer_training,
    )


def _saved(folder, **more):
    """A made target of six classes, every image another one."""
    random = np.random.default_rng(0)
    parts = {f"x_{part}": random.integers(0, 256, (60, 32, 32, 3), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(60) % 6 for part in ("train", "test")}
    np.savez(folder / "trashnet_32.npz", **parts, **labels, **more)


def _each(pictures):
    return {image.numpy().tobytes() for image in pictures.pixels}


@pytest.mark.parametrize("shots", [2, None])
def test_what_is_learned_from_is_never_scored(matrix, tmp_path, shots):
    groups = np.arange(60) // 6
    _saved(tmp_path, group_train=groups)
    drawn = [matrix.data.target("trashnet", tmp_path, shots=shots, seed=seed) for seed in (1, 2)]
    for each in drawn:
        assert _each(each.train).isdisjoint(_each(each.validation))
        assert _each(each.train).isdisjoint(_each(each.test))
        assert set(each.train.groups).isdisjoint(each.validation.groups)
    assert _each(drawn[0].validation) == _each(drawn[1].validation)
    if shots:
        assert drawn[0].train.targets.bincount().tolist() == [shots] * 6
        assert _each(drawn[0].train) != _each(drawn[1].train)


def test_the_grid_goes_on_by_one_where_its_end_is_the_best(matrix):
    for best, tried in ((0.01, 4), (0.1, 5), (0.003, 5)):
        asked = []
        chosen = matrix.main.chosen_rate(lambda lr, best=best, asked=asked: asked.append(lr) or -abs(lr - best))
        assert chosen == best
        assert len(asked) == tried
    assert matrix.main.chosen_rate(lambda lr: lr) == 0.3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_begin_with_the_same_head_and_see_the_same_images(matrix, tmp_path):
    _saved(tmp_path)
    seen = []
    for row in ("fine-tuning", "AdaFilter", "linear probe"):
        network = matrix.networks.small_resnet(4)
        draw = matrix.data.target("trashnet", tmp_path, shots=2, seed=1)
        setting = matrix.rows.Setting(draw, draw.train, network, network, tmp_path, "made", 6)
        inputs = []
        network.conv1.register_forward_pre_hook(lambda layer, args, inputs=inputs: inputs.append(args[0]))
        module, *_ = matrix.training._fit(matrix.rows.EVERY[row], setting, seed=3, lr=0.0)
        batches = [images for images in inputs if len(images) == len(draw.train)]  # not those that are looked at
        seen.append((module.model.fc.weight.detach(), torch.stack(batches)))
    for head, images in seen[1:]:
        assert head.equal(seen[0][0])
        assert images.equal(seen[0][1])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", ["AdaFilter", "AdaFilter, statistics kept"])
def test_statistics_move_unless_they_are_kept(matrix, tmp_path, row):
    _saved(tmp_path)
    network = matrix.networks.small_resnet(4)
    draw = matrix.data.target("trashnet", tmp_path, shots=2, seed=1)
    setting = matrix.rows.Setting(draw, draw.train, network, network, tmp_path, "made", 6)
    module, *_ = matrix.training._fit(matrix.rows.EVERY[row], setting, seed=3, lr=0.01)
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(norms) >= 12
    assert all(bool((norm.running_mean == 0).all()) == (row != "AdaFilter") for norm in norms)


def test_an_interval_is_students(matrix):
    from scipy import stats

    apart = np.array([1.0, 2.5, -0.5, 3.0, 0.25])
    low, high = stats.t.interval(0.95, 4, apart.mean(), stats.sem(apart))
    assert matrix.results.interval(apart) == pytest.approx((apart.mean(), (high - low) / 2))


def test_signs_of_one_track_stay_together(matrix, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    class Signs:
        def __init__(self, root, split, download):
            self._samples = [
                (f"{root}/{label:05}/{track:05}_{frame:05}.ppm", label)
                for label in (0, 1)
                for track in range(4)
                for frame in range(3)
            ]

        def __iter__(self):
            random = np.random.default_rng(0)
            for _, label in self._samples:
                yield Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)), label

    monkeypatch.setattr(torchvision.datasets, "GTSRB", Signs)
    found = matrix.data.target("gtsrb", None, shots=None, seed=1)
    assert len(found.train) + len(found.validation) == 24
    assert set(found.train.groups).isdisjoint(found.validation.groups)
    assert len({*found.train.groups, *found.validation.groups}) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--targets", "nera"], "There is no target 'nera'; known: near"),
        (["--targets", "near"], "There is no cifar100_32.npz in"),
        (["--steps", "5"], "--steps 5; expected 6 at least"),
        (["--seeds", "0"], "--seeds and --workers take 1 or more"),
        (["--workers", "0"], "--seeds and --workers take 1 or more"),
        (["--shots", "-1"], "--shots 0 or more"),
        (["--rates", "missing.json"], "--rates missing.json: there is no such report"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(matrix, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as found:
        matrix.main.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), *options])
    assert says in f"{found.value} {capsys.readouterr().err}"
    assert not [*tmp_path.rglob("*.pt")]
