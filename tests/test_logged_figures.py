"""Pictures reach the loggers that take them, and only these."""

import io
import warnings
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_transfer as lt
from tests.toys import LitToy, fit


@pytest.fixture
def figure():
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2, 4])
    return figure


def pixels(figure):
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return np.asarray(Image.open(written).convert("RGB"))


def test_tensorboard_has_the_picture_at_the_last_step_and_csv_is_skipped(figure, tmp_path):
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    runner = fit(LitToy(), logger=[board, table], max_epochs=1)
    canvas = figure.canvas
    lt.reports.log_figure(runner, "transfer/borrowed", figure)
    figure.savefig(tmp_path / "written.png", dpi=110)
    lt.reports.log_figure(runner, "transfer/written", tmp_path / "written.png")
    events = EventAccumulator(board.log_dir)  # reads what is in the file now, with the logger still open
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["transfer/borrowed", "transfer/written"]
    for name in events.Tags()["images"]:
        (event,) = events.Images(name)
        assert event.step == runner.global_step > 0
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels(figure))
    assert figure.canvas is canvas


class MLflowClient:
    """The part of mlflow.MlflowClient 3.17 that takes pictures; MLFlowLogger's own needs mlflow."""

    def __init__(self):
        self.logged = []

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=None):
        self.logged.append((run_id, key, step, np.asarray(image)))


def test_every_logger_that_takes_pictures_has_it(figure):
    weights_and_biases = create_autospec(WandbLogger, instance=True)
    mlflow = create_autospec(MLFlowLogger, instance=True, run_id="run", experiment=MLflowClient())
    trainer = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[weights_and_biases, mlflow])
    lt.reports.log_figure(trainer, "borrowed", figure)
    ((name, (image,)), options), *others = weights_and_biases.log_image.call_args_list
    assert (name, options, others) == ("borrowed", {"step": 7}, [])
    np.testing.assert_array_equal(np.asarray(image), pixels(figure))
    ((run, key, step, shown),) = mlflow.experiment.logged
    assert (run, key, step) == ("run", "borrowed", 7)
    np.testing.assert_array_equal(shown, pixels(figure))


def test_what_no_logger_takes_is_said_and_not_drawn(tmp_path):
    for loggers, found in (([], "it has none"), ([CSVLogger(tmp_path)], "CSVLogger")):
        trainer = SimpleNamespace(is_global_zero=True, global_step=7, loggers=loggers)
        with pytest.warns(lt.NoEffectWarning, match=rf"takes pictures \({found}\): 'borrowed' is not logged"):
            lt.reports.log_figure(trainer, "borrowed", tmp_path / "not there.png")


def test_only_the_first_process_logs(tmp_path):
    trainer = SimpleNamespace(is_global_zero=False, global_step=7, loggers=[])
    with warnings.catch_warnings(action="error"):
        lt.reports.log_figure(trainer, "borrowed", tmp_path / "not there.png")


def test_a_file_that_is_not_a_picture_is_refused(tmp_path):
    mlflow = create_autospec(MLFlowLogger, instance=True, run_id="run", experiment=MLflowClient())
    trainer = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[mlflow])
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(lt.TransferConfigError, match=r"page\.png is not a PNG file"):
        lt.reports.log_figure(trainer, "borrowed", tmp_path / "page.png")
