"""Log a picture to the loggers of a Trainer."""

import io
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_transfer.errors import NoEffectWarning
from lightning_transfer.reports.curves import png_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(trainer: Any, name: str, figure: "Figure | str | os.PathLike[str]") -> None:
    """Log a picture to each logger of a Trainer that takes pictures: TensorBoard, Weights & Biases, MLflow.

    The picture is logged at the Trainer's step, after `fit` or in a hook, by the first process only. Other loggers are
    skipped. If no logger takes pictures, a warning says so.

    Args:
        trainer: the Trainer of the run.
        name: of the picture; loggers group by what is before a slash.
        figure: such as `selection.report`, `reports.gate_map` and `reports.layer_search` return, or a PNG file.

    Raises:
        TransferConfigError: the file is not a PNG, or cannot be read.

    Example:
        >>> import lightning as L
        >>> from lightning_transfer.reports import learning_curves
        >>> trainer = L.Trainer(accelerator="cpu", logger=False)  # yours: logger=TensorBoardLogger(".")
        >>> with warnings.catch_warnings(record=True, action="always") as said:
        ...     log_figure(trainer, "transfer/borrowed", "borrowed.png")
        >>> print(str(said[0].message)[:75])
        No logger of this Trainer takes pictures (it has none): 'transfer/borrowed'
    """
    if not trainer.is_global_zero:
        return
    takers = [take for logger in trainer.loggers if (take := _taker(logger)) is not None]
    if not takers:
        found = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "it has none"
        warnings.warn(
            f"No logger of this Trainer takes pictures ({found}): {name!r} is not logged. Pass "
            "logger=TensorBoardLogger('.'), WandbLogger() or MLFlowLogger().",
            NoEffectWarning,
            stacklevel=2,
        )
        return
    from PIL import Image

    image = Image.open(io.BytesIO(png_of(figure))).convert("RGB")
    for take in takers:
        take(name, image, trainer.global_step)


def _taker(logger: Any) -> Any:
    """Return what takes a name, an image and a step; None if the logger takes no pictures."""
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda name, image, step: logger.log_image(name, [image], step=step)
    experiment = logger.experiment
    if hasattr(experiment, "add_image"):  # TensorBoard

        def add(name: str, image: Any, step: int) -> None:
            experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
            experiment.flush()  # after fit nothing else does

        return add
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        return lambda name, image, step: experiment.log_image(logger.run_id, image, key=name, step=step)
    return None
