"""Pictures are written and show what was counted; what they look like was looked at."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import lightning_transfer as lt
from lightning_transfer.datasets import known_names
from lightning_transfer.errors import TransferConfigError
from lightning_transfer.methods.collaborative.search.plan import Evaluation
from lightning_transfer.methods.selective.pictures import Pictures
from lightning_transfer.reports import borrowed
from lightning_transfer.reports import gates as gates_report
from tests.adafilter.nets import batch, chain, gated_chain


def test_learning_curves(tmp_path):
    curves = {"plain": [[0.2, 0.5, 0.6], [0.1, 0.4, 0.6]], "soft": [[0.3, 0.6, 0.7]]}
    lt.reports.learning_curves(curves, [10, 20, 30], tmp_path / "with.png", schedule=lt.Schedule(), title="Glyphs")
    lt.reports.learning_curves(curves, [10, 20, 30], tmp_path / "without.svg")
    assert (tmp_path / "with.png").read_bytes().startswith(b"\x89PNG")
    assert "plain" not in (tmp_path / "without.svg").read_text()[:100]


RNG = np.random.default_rng(0)
INDICES = np.stack([RNG.permutation(60)[:12] for _ in range(40)])
DISTANCES = np.sort(RNG.random((40, 12)), 1)
TARGET_LABELS, SOURCE_LABELS = np.repeat([0, 1, 2, -1], 10), np.arange(60) // 2


def image(index):
    return np.full((4 + index % 3, 5, 3), index / 60)


def draw(indices=INDICES, target=TARGET_LABELS, source=SOURCE_LABELS, marked=(), names=None):
    sides = borrowed._Side(image, target, None), borrowed._Side(image, source, names)
    figure = borrowed._page(indices, DISTANCES[: len(indices), : indices.shape[1]], *sides, set(marked))
    return figure, *figure.axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_are_the_counts_over_all_lists():
    _, _, _, classes = draw()
    expected = np.sort(np.bincount(SOURCE_LABELS[INDICES].ravel()))[::-1] / INDICES.size
    np.testing.assert_allclose([bar.get_width() for bar in classes.patches], 100 * expected[:20])
    assert classes.get_yticklabels()[0].get_text() == f"class {np.bincount(SOURCE_LABELS[INDICES].ravel()).argmax()}"
    assert classes.get_yticklabels()[-1].get_text() == "10 other"
    assert f" {100 * expected[20:].sum():.1f} % together" in texts(classes)


def test_single_class_and_partly_unknown_classes():
    _, _, _, classes = draw(source=np.zeros(60, int), names={0: "cat"})
    assert [label.get_text() for label in classes.get_yticklabels()] == ["cat"]
    _, _, _, classes = draw(source=np.where(np.arange(60) < 50, -1, 3), names=["a", "b"])
    assert [label.get_text() for label in classes.get_yticklabels()] == ["unknown", "class 3"]


@pytest.mark.parametrize("labels", [None, np.full(60, -1)])
def test_unknown_classes_are_said(labels):
    _, rows, _, classes = draw(source=labels)
    assert "unknown" in texts(classes)[0]
    assert not classes.patches
    row = int(texts(rows)[0].split()[-1])
    assert texts(rows)[1].endswith(f"image {INDICES[row, 0]}")


def test_rows_are_spread_over_classes_and_show_the_nearest():
    _, rows, _, _ = draw()
    assert len(rows.images) == 10 * (1 + 8)
    captions = texts(rows)[::9]
    named = [caption.split("\n")[0] for caption in captions if "class" in caption]
    assert [named.count(f"class {label}") for label in range(3)] == [2, 3, 2]  # and three unlabelled ones
    row = int(captions[4].split()[-1])
    expected = [
        f"{d:#.3g}\nclass {SOURCE_LABELS[i]}" for d, i in zip(DISTANCES[row, :8], INDICES[row, :8], strict=True)
    ]
    assert texts(rows)[4 * 9 + 1 : 5 * 9] == expected
    np.testing.assert_array_equal(rows.images[4 * 9 + 1].get_array(), image(INDICES[row, 0]))


def test_rows_with_duplicates_are_chosen_and_marked():
    plain = {caption.split()[-1] for caption in texts(draw()[1]) if "image" in caption}
    hidden = [row for row in range(30) if str(row) not in plain]
    marked = {(row, int(INDICES[row, 1])) for row in hidden} | {(0, int(INDICES[0, 11])), (1, 999)}
    figure, rows, most, _ = draw(marked=marked)
    assert texts(rows).count("duplicate") == len(rows.lines) - 1 == 3  # one line parts targets from the borrowed
    assert not most.lines
    title = figure.get_suptitle()
    assert title.endswith(f"and a source image: {len(marked)}, {len(marked) - 1} of them among the nearest")
    assert draw()[0].get_suptitle().endswith("and a source image: none")
    assert f"40 target images and the 12 nearest of each, {len(np.unique(INDICES))} distinct source images" in title


def test_most_borrowed_are_counted_over_all_lists():
    _, _, most, _ = draw(source=None)
    counts = np.bincount(INDICES.ravel(), minlength=60)
    best = sorted(range(60), key=lambda index: (-counts[index], index))[:12]
    assert texts(most) == [f"by {counts[index]} targets\nimage {index}" for index in best]


def test_little_data_and_long_names_do_not_overlap():
    names = [f"a very\nlong $name of number {label}" for label in range(30)]
    for indices in (INDICES[:2, :1], INDICES[:3, :9]):
        figure, rows, most, classes = draw(indices, target=None, names=names)
        assert len(rows.images) == len(indices) * (1 + min(8, indices.shape[1]))
        figure.draw_without_rendering()
        written = [child for axes in figure.axes for child in axes.get_children() if isinstance(child, Text)]
        boxes = [text.get_window_extent() for text in (*written, *classes.get_yticklabels()) if text.get_text()]
        assert len(boxes) > len(rows.images) + len(most.images)
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def save(path, **changes):
    options = {"indices": torch.tensor(INDICES), "distances": torch.tensor(DISTANCES), "target_image": image}
    lt.reports.borrowed_images(**(options | {"source_image": image} | changes), path=path)
    return path.read_bytes()


PLAN = lt.LayerPlan({"own": 1}, {"own": 4}, (Evaluation((1,), 0.5), Evaluation((2,), None, "no memory")))


@pytest.mark.parametrize(
    ("write", "shown"),
    [
        (lambda path: lt.reports.learning_curves({"plain": [[0.2, 0.5]]}, [10, 20], path, title="Glyphs"), "Glyphs"),
        (lambda path: lt.reports.layer_search(PLAN, path), "How many layers to freeze"),
        (
            lambda path: lt.reports.borrowed_images(
                torch.tensor([[1, 2]]), torch.tensor([[0.1, 0.2]]), path, target_image=image, source_image=image
            ),
            "Most borrowed source images",
        ),
    ],
    ids=["learning_curves", "layer_search", "borrowed_images"],
)
def test_the_figure_that_was_written_is_returned(tmp_path, write, shown):
    figure = write(tmp_path / "written.png")
    assert (tmp_path / "written.png").exists()
    assert shown in {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_the_same_page_twice(tmp_path, ending):
    options = {"indices": torch.tensor([[1, 2]]), "distances": torch.tensor([[0.1, 0.2]]), "duplicates": [(0, 1)]}
    page = save(tmp_path / f"a.{ending}", **options)
    assert page == save(tmp_path / f"b.{ending}", **options)
    assert b"CreationDate" not in page  # two pages within a second would be equal even so


def test_rounding_errors_of_undone_normalization_pass(tmp_path):
    assert save(tmp_path / "a.png", target_image=lambda index: np.full((2, 2, 3), 1 + 1e-6, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distances": torch.zeros(40, 3)}, "n_target, K"),
        ({"indices": torch.full((40, 12), -1)}, "from 0"),
        ({"indices": torch.zeros(40, 12)}, "whole numbers"),
        ({"target_labels": torch.zeros(41)}, "takes 40 labels"),
        ({"source_labels": torch.zeros(59)}, "at least 60 labels"),
        ({"duplicates": [(40, 0)]}, "below 40"),
        ({"duplicates": torch.tensor([1, 2])}, "pairs"),
        ({"target_image": lambda index: np.zeros((3, 4, 4))}, r"shape \(3, 4, 4\)"),
        ({"source_image": lambda index: np.full((4, 4, 3), 255)}, "to 255"),
        ({"source_image": lambda index: np.full((4, 4, 3), np.nan)}, "nan"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(TransferConfigError, match=message):
        save(tmp_path / "a.png", **changes)


def test_gate_map_counts_open_gates_by_layer_and_class(tmp_path):
    net = gated_chain().eval()
    loader = [batch(seed) for seed in (3, 4)]
    axes = lt.reports.gate_map(net, loader, tmp_path / "gates.png", class_names=["a", "b", "c"]).axes
    layers, means = [tick.get_text() for tick in axes[1].get_xticklabels()], axes[0].lines[0].get_ydata() / 100
    found = dict(zip(layers, means, strict=True))
    expected, by_class = dict.fromkeys(found, 0.0), {label: [] for label in range(3)}
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            net(image[None])
            for layer, gates in net.adafilter.last_gates().items():
                expected[layer] += gates.mean().item() / 12
            by_class[label].append(net.adafilter.last_gates()["c"].mean().item())
    assert found == pytest.approx(expected)
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    sums, counts = gates_report._count(net, net.adafilter, loader)
    for label, shares in by_class.items():
        assert sums["c"][label].mean() / counts[label] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("means", [[0.9, 0.5, 0.05], [1.0], [0.5, 0.4, 1.0], [0.0, 0.02]])
def test_a_more_tuned_layer_is_higher_and_the_labels_are_inside_of_the_panel(means):
    totals = {f"layer{number}": np.full(8, mean) for number, mean in enumerate(means)}
    figure = gates_report._draw(totals, np.array([means] * 3), list("abc"))
    figure.draw_without_rendering()
    panel = figure.axes[0]
    heights = [panel.transData.transform((0, height))[1] for height in panel.lines[0].get_ydata()]
    assert list(np.argsort(heights)) == list(np.argsort(means))
    boxes = [label.get_window_extent() for label in panel.texts]
    assert all(panel.bbox.y0 <= box.y0 and box.y1 <= panel.bbox.y1 for box in boxes)
    assert not boxes[0].overlaps(boxes[1])


def test_the_colours_of_a_search_have_a_bar_with_a_label(tmp_path):
    figure = lt.reports.layer_search(PLAN, tmp_path / "search.png")
    assert "accuracy of the candidate, %" in [axes.get_ylabel() for axes in figure.axes]
    failed = lt.LayerPlan({"own": 1}, {"own": 4}, (Evaluation((2,), None, "no memory"),))
    assert "accuracy of the candidate, %" not in [
        axes.get_ylabel() for axes in lt.reports.layer_search(failed, tmp_path / "failed.png").axes
    ]


def test_all_distances_have_three_digits(tmp_path):
    distances = torch.tensor([[0.0, 0.5, 2.8, 2.744, 12.5, 140.2]])
    kept = torch.arange(6)[None]
    path = tmp_path / "a.png"
    figure = lt.reports.borrowed_images(kept, distances, path, target_image=image, source_image=image)
    shown = [caption.split("\n")[0] for caption in texts(figure.axes[0])[1:]]
    assert shown == ["0.00", "0.500", "2.80", "2.74", "12.5", "140"]


class Named(torch.utils.data.TensorDataset):
    """Images and labels with names, as those of torchvision's `ImageFolder`."""

    classes = ("ant", "bee", "cat")


def test_classes_have_their_datasets_names(tmp_path):
    module, data = gated_chain(), Named(*batch())
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(6)), batch_size=3)

    def named(**options):
        axes = lt.reports.gate_map(module, options.pop("loader", loader), tmp_path / "gates.png", **options).axes[1]
        return [label.get_text() for label in axes.get_yticklabels()]

    assert named() == list(Named.classes)
    assert named(class_names=["x", "y", "z"]) == ["x", "y", "z"]
    assert named(loader=[batch()]) == ["0", "1", "2"]
    data.classes = ["ant"]  # too few
    assert named() == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["ant", "bee"], ["ant", "bee"]),
        ([("tench", "Tinca tinca"), ("crane",)], ["tench", "crane"]),
        (7, None),
        ([1, 2], None),
    ],
)
def test_names_are_known_if_they_are_texts(classes, names):
    data = torch.utils.data.TensorDataset(torch.zeros(2))
    assert known_names(data) is None
    data.classes = classes
    assert known_names(torch.utils.data.Subset(data, [0])) == names
    assert known_names(Pictures(data, "source")) == names
    assert known_names(Pictures(data, "source", adapt=lambda batch: batch)) is None
    part = torch.utils.data.Subset(data, [0])
    part.classes = ["own"]
    assert known_names(part) == ["own"]
    data.target_transform = abs
    assert known_names(data) is None


def test_gate_map_refuses_a_datamodule_by_name(tmp_path):
    with pytest.raises(TransferConfigError, match=r"loader is a Linear; .* such as datamodule.val_dataloader"):
        lt.reports.gate_map(gated_chain(), torch.nn.Linear(2, 2), tmp_path / "gates.png")


def test_gate_map_refuses_what_has_no_gates(tmp_path):
    with pytest.raises(TransferConfigError, match="not gated"):
        lt.reports.gate_map(torch.nn.Linear(2, 2), [], tmp_path / "gates.png")
    with pytest.raises(TransferConfigError, match="gave no images"):
        lt.reports.gate_map(gated_chain(), [], tmp_path / "gates.png")
    fixed = chain()
    lt.functional.apply_adafilter(fixed, estimator="random")
    with pytest.raises(TransferConfigError, match="The gates are 'random'"):
        lt.reports.gate_map(fixed, [batch()], tmp_path / "gates.png")
