"""The page about a run: what it says was logged, it stands alone, and what is wrong is said."""

import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_transfer as lt
from lightning_transfer.reports import TransferReport
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
    assert "gives most" not in page(tmp_path, selection=selection(torch.tensor([3, 3, 2, 1, 2, 0])))


def test_pictures_are_inside(tmp_path):
    path = tmp_path / "curves.png"
    figure = lt.reports.learning_curves({"plain": [[0.2, 0.5]]}, [10, 20], path)
    text = page(tmp_path, pictures={"One": figure, "Two": path})
    assert text.count("data:image/png;base64,") == 3
    (tmp_path / "no.png").write_text("nothing")
    with pytest.raises(lt.TransferConfigError, match="no.png is not a PNG file"):
        page(tmp_path, pictures={"Three": tmp_path / "no.png"})


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no values"), ("step,loss\n1,x\n", "not a file of metrics.*CSVLogger")]
)
def test_a_folder_without_metrics_is_refused(text, message, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(lt.TransferConfigError, match=f"(?s){message}"):
        TransferReport(tmp_path)
