"""The page about a run: what it says was logged, it stands alone, and what is wrong is said."""

import dataclasses
import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_transfer as lt
from lightning_transfer.reports import TransferReport
from lightning_transfer.reports.page import _curves, _panels
from tests import toys
from tests.toys import LitToy, fit

METRICS = (
    "epoch,step,train_loss,transfer/source_weight,<b>val_acc\n0,1,2.5,1.0,\n0,3,1.5,0.25,\n0,3,,,0.75\n1,5,{},0.0,0.5\n"
)


def page(folder, *, last="1.0", **options):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text(METRICS.format(last))
    TransferReport(folder, **options).save(folder / "run.html")
    return (folder / "run.html").read_text()


def cells(text, name):
    row = re.search(f"<td>{re.escape(name)}</td>(.*?)</tr>", text)[1]
    return re.findall(r">([^<]+)</td>", row)


def test_values_are_those_of_the_file_and_names_are_escaped(tmp_path):
    text = page(tmp_path / "<i>run")
    assert cells(text, "train_loss") == ["1", "1", "2.5"]
    assert cells(text, "&lt;b&gt;val_acc") == ["0.5", "0.5", "0.75"]
    assert "<b>" not in text
    assert "<i>" not in text
    assert not re.search(r"(src|href)=.(?!data:)", text)  # it needs no other file
    assert "is not finite" not in text


def test_what_is_not_finite_is_said(tmp_path):
    assert "train_loss is not finite at step 5 for the first time" in page(tmp_path, last="nan")


def test_the_options_of_a_real_run_stand_on_its_page(tmp_path):
    callbacks = [lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=0.5)]
    runner = fit(LitToy(), callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    text = "".join(TransferReport(runner.logger.log_dir)._content())
    for part in ("<h3>SoftFinetuning</h3>", "<th>weight.start</th><td>0.5</td>", "<td>transfer/source_loss</td>"):
        assert part in text
    assert "None" not in text


def test_a_real_run_whose_hyperparameters_are_python_objects_is_read(tmp_path):
    class Saving(LitToy):
        def __init__(self, folder, rate, kind, network):
            super().__init__()
            self.save_hyperparameters()

    with warnings.catch_warnings(action="ignore"):  # Lightning's, that a network is saved
        module = Saving(tmp_path, np.float64(0.5), torch.nn.ReLU, toys.toy_net())
        callback = lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7))
        runner = fit(module, [callback], logger=CSVLogger(tmp_path))
    assert "!!python/" in (tmp_path / runner.logger.log_dir / "hparams.yaml").read_text()
    assert "<h3>SoftFinetuning</h3>" in "".join(TransferReport(runner.logger.log_dir)._content())


def test_no_object_is_built_of_a_file(tmp_path):
    (tmp_path / "hparams.yaml").write_text(
        f"a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\ntransfer/B/c: 7\n"
    )
    assert "<th>c</th><td>7</td>" in page(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("step,loss\n0.0,1\n1.0,2\n", ([0, 1], [1, 2])),
        ("\ufeffstep,loss\n0,1\n", ([0], [1])),
        ("step,loss\n0,1\n,2\n", ([0, math.nan], [1, 2])),
        ("epoch,loss\n0,1\n0,2\n", ([math.nan, math.nan], [1, 2])),
        ("step,loss\n0,1\nstep,loss\n0,3\n", ([0, 0], [1, 3])),
        ("step,loss\n0,1\nloss,step\n2,5\n", ([0, 5], [1, 2])),
        ("loss\n1\nloss\n2\n", ([math.nan, math.nan], [1, 2])),
        ("loss,step,acc\n1,0,\n2,1", ([0, 1], [1, 2])),
    ],
)
def test_what_can_be_read_of_a_file_is_read(text, found, tmp_path):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    report = TransferReport(tmp_path)
    np.testing.assert_equal(report.series, {"loss": found})
    assert "<img" in "".join(report._content())


@pytest.mark.parametrize("name", ["loss_$x", "loss $\\frac$", "_loss"])
def test_a_name_stands_in_the_legend_as_it_is(name):
    figure = _curves({"loss": {name: ([0, 1], [1.0, 2.0]), "other": ([0], [1.0])}})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [name, "other"]
    figure.savefig(io.BytesIO())


def legends(series):
    figure = _curves(_panels(series))
    return figure, [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]


def test_of_many_layers_the_mean_the_least_and_the_most_tuned_are_drawn(tmp_path):
    steps, shares = [0, 1], {f"layer{number}.0.downsample.conv": number / 20 for number in range(11)}
    layers = {f"transfer/tuned/{layer}": (steps, [share, share]) for layer, share in shares.items()}
    figure, drawn = legends({"transfer/tuned": (steps, [0.25, 0.25]), **layers})
    ends = ["tuned/layer0.0.downsample.conv, least of 11", "tuned/layer10.0.downsample.conv, most of 11"]
    assert drawn == [["tuned, mean", *ends]]
    figure.draw_without_rendering()
    box = figure.axes[0].get_legend().get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().width > 0.8 * figure.bbox.width
    assert legends({name: layers[name] for name in list(layers)[:4]})[1][0] == [
        name.removeprefix("transfer/") for name in list(layers)[:4]
    ]


def test_a_run_that_diverged_names_the_least_and_the_most_tuned_layers_of_before():
    layers = {f"transfer/tuned/{share}": ([0, 1], [share, math.nan]) for share in (0.3, 0.5, 0.1, 0.4, 0.2)}
    assert legends(layers)[1] == [["tuned/0.5, most of 5", "tuned/0.1, least of 5"]]


def test_numbers_above_one_have_an_axis_of_their_own_and_equal_lines_are_both_seen():
    loss, weight = ([0, 5], [1.5, 1.0]), ([0, 5], [1.0000001, 0.5])
    series = {"transfer/target_loss": loss, "train_loss": loss, "transfer/source_weight": weight}
    figure, drawn = legends(series | {"transfer/neighbors": ([0, 5], [20.0, 20.0])})
    assert drawn == [["target_loss", "train_loss"], ["source_weight"], ["neighbors"]]
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]
    assert figure.axes[1].get_ylim()[0] == 0 < figure.axes[2].get_ylim()[0]
    figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in figure.axes[-1].get_xticks())


@pytest.mark.parametrize(
    ("folder", "title"), [("birds/version_0", "birds/version_0"), ("birds/lightning_logs/version_3", "birds/version_3")]
)
def test_a_page_is_named_by_its_run(folder, title, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir(parents=True)
    text = page(tmp_path / folder)
    assert f"<title>{title}</title>" in text
    assert f"<h1>Transfer report: {title}</h1>" in text
    monkeypatch.chdir(tmp_path / folder)
    assert TransferReport(".").name == title


def test_values_that_no_axis_can_hold_are_in_the_table_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1e308\n1,-1e308\n2,inf\n3,1\n")
    text = "".join(TransferReport(tmp_path)._content())
    assert cells(text, "loss") == ["1", "-1e+308", "1e+308"]


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "list"), ("word\n", "str")])
def test_hyperparameters_without_names_are_refused(text, kind, tmp_path):
    (tmp_path / "hparams.yaml").write_text(text)
    with pytest.raises(lt.TransferConfigError, match=f"hparams.yaml holds a {kind}; expected hyperparameters by name"):
        page(tmp_path)


def test_a_selection_of_another_kind_is_refused(tmp_path):
    with pytest.raises(lt.TransferConfigError, match="selection= is 'x'; expected a Selection"):
        page(tmp_path, selection="x")


def selection(labels):
    none = torch.empty(0, 2, dtype=torch.int64)
    indices = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 4]])
    pairs = torch.tensor([[0, 1]])
    return lt.Selection(indices, torch.rand(2, 4), {}, torch.tensor([0, 1]), labels, pairs, none, torch.tensor([5]))


def test_a_class_that_gives_most_and_leaks_are_warned_of(tmp_path):
    text = page(tmp_path, selection=selection(torch.tensor([3, 3, 3, 1, 2, 0])))
    for part in ("the most, 62% of all entries, are of class 3", "One class, 3, gives most", "1 pairs of a target and"):
        assert part in text
    assert "1 source images could not be read" in text
    source = torch.utils.data.TensorDataset(torch.zeros(6))
    source.classes = ["ant", "bee", "cat", "<dog>"]
    chosen = dataclasses.replace(selection(torch.tensor([3, 3, 3, 1, 2, 0])), source=source)
    assert "are of class &lt;dog&gt;" in page(tmp_path, selection=chosen)
    assert "gives most" not in page(tmp_path, selection=selection(torch.tensor([3, 3, 2, 1, 2, 0])))
    chosen = dataclasses.replace(chosen, dropped=torch.tensor([[0, 9], [1, 9]]))
    assert "1 source images were left out" in page(tmp_path, selection=chosen)


def test_a_folder_of_runs_and_a_name_that_is_not_a_pages_are_refused(tmp_path):
    page(tmp_path / "version_0")
    with pytest.raises(lt.TransferConfigError, match="holds 1 runs. Name one, such as the last: .*version_0"):
        TransferReport(tmp_path)
    assert "train_loss" in page(tmp_path)  # a run whose folder has metrics of its own
    with pytest.raises(lt.TransferConfigError, match="run.pdf is not the name of a page"):
        TransferReport(tmp_path / "version_0").save(tmp_path / "run.pdf")


def test_pictures_are_inside(tmp_path):
    path = tmp_path / "curves.png"
    figure = lt.reports.learning_curves({"plain": [[0.2, 0.5]]}, [10, 20], path)
    text = page(tmp_path, pictures={"One": figure, "Two": path})
    assert text.count("data:image/png;base64,") == 3
    (tmp_path / "no.png").write_text("nothing")
    with pytest.raises(lt.TransferConfigError, match="no.png is not a PNG file"):
        page(tmp_path, pictures={"Three": tmp_path / "no.png"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no values"),
        ("step,loss\n1,x\n", "not a file of metrics.*CSVLogger"),
        ("step,loss\n1,2,3\n", "a row has 3 values"),
    ],
)
def test_a_folder_without_metrics_is_refused(text, message, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(lt.TransferConfigError, match=f"(?s){message}"):
        TransferReport(tmp_path)
