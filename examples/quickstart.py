"""Quickstart: a network that reads printed characters learns a near and a far target from a few images.

Near: printed characters that it has never seen. Far: handwritten digits. Near, keeping the source images helps; far,
the callbacks leave them out, and the run is plain fine-tuning. A few minutes on a CPU, no download: the characters are
drawn with the fonts that come with matplotlib, the digits are the 8 x 8 scans of real handwriting in scikit-learn.

    python examples/quickstart.py
"""

import argparse
import copy
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt

# ---- All that lightning_transfer asks of a project: a row here, and the line `source = ...` in main() ---------------
PLAIN = "plain fine-tuning"
METHODS: dict[str, Callable[[lt.SourceTask], list[L.Callback]]] = {
    PLAIN: lambda source: [],
    "soft fine-tuning": lambda source: [lt.SoftFinetuning(source)],
    "selective joint": lambda source: [lt.SelectiveJointFinetuning(source, neighbors=100)],
}
# ---------------------------------------------------------------------------------------------------------------------

SOURCE = "0123456789ABCDEFGHIJKLMNPQRSTUVWXYZ"  # no O, which looks like zero
NEAR = "37BEGKMQRSW"  # the near target; here the source is the other 24
SMALL = "cijklmpsuvwxyz"  # what a second network learns to read in examples/collaborative.py
FONTS = ("DejaVuSans[!D]*", "DejaVuSerif[!D]*", "STIXGeneral*", "cm[brt]*", "cmss*")  # no symbol fonts
CANVAS, SCAN, SIDE = 64, 8, 32  # pixels that a character is drawn on, of its scan, and that the network sees

CHANNELS = (16, 32, 64, 128)  # of the network's stages
NEAR_SHOTS, SHOTS, BATCH = 3, 10, 20  # labelled images of each near and far class, and of each step
PRETRAINING_STEPS, PRETRAINING_LR = 200, 0.1
# Chosen for plain fine-tuning, by its mean validation accuracy over seeds that no run here uses, and then taken for
# every method. Near, four seeds: .003 78.86 %, .01 79.00, .02 78.95, .03 78.80. Far, three: .003 92.9, .01 94.0,
# .02 94.5, .03 94.7.
LR, FAR_LR = 0.01, 0.03


class LitDigits(L.LightningModule):
    """An ordinary image classifier: nothing in it knows of lightning_transfer."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        """SGD whose learning rate falls to zero along a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class FewImages(L.LightningDataModule):
    """A few images to train on, some for the curves, and some for the final number."""

    def __init__(self, seed: int, parts: Iterable[TensorDataset]) -> None:
        super().__init__()
        self.train, self.val, self.test = parts
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the few; a generator of its own gives every method the same batches."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=BATCH, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the images for the curves."""
        return DataLoader(self.val, batch_size=500)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the images for the final number only."""
        return DataLoader(self.test, batch_size=500)


class Characters(FewImages):
    """Printed characters that pretraining has not seen; `seed` decides only which few are trained on."""

    def __init__(self, seed: int) -> None:
        parts = (NEAR_SHOTS, 500 + seed), (60, 1001), (200, 1002)  # images of each, and what draws them
        super().__init__(seed, (printed(NEAR, num_each, drawn) for num_each, drawn in parts))


class Digits(FewImages):
    """Handwritten digits: a few to train on, drawn by `seed`; half of all are for the test, the same for every seed."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        images = enlarge(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32))
        labels = torch.tensor(digits.target)
        test, rest = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(2)
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        few = torch.cat([rest[labels[rest] == digit][:SHOTS] for digit in range(10)])
        others = rest[~torch.isin(rest, few)]
        super().__init__(seed, (TensorDataset(images[part], labels[part]) for part in (few, others, test)))


TARGETS: dict[str, tuple[Callable[[int], FewImages], float]] = {  # the data for a seed, and the learning rate
    f"near: unseen printed characters, {NEAR_SHOTS} of each": (Characters, LR),
    f"far: handwritten digits, {SHOTS} of each": (Digits, FAR_LR),
}
Rows = dict[str, dict[str, dict[str, float]]]  # of a target: of a method: what was measured


def enlarge(scans: Tensor) -> Tensor:
    """Scans (n, 1, 8, 8) at the size that the network sees."""
    return F.interpolate(scans, size=SIDE, mode="bilinear")


def printed(characters: str, num_each: int, seed: int) -> TensorDataset:
    """Characters of all fonts, bent, blurred and scanned at 8 x 8 as the handwriting was; labels in their order."""
    random = torch.Generator().manual_seed(seed)
    images = torch.cat([scan(draw(character), num_each, random) for character in characters])
    return TensorDataset(enlarge(images), torch.arange(len(characters)).repeat_interleave(num_each))


def draw(character: str) -> Tensor:
    """One character in every font: (fonts, 1, 64, 64)."""
    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    glyphs = []
    for path in sorted({path for pattern in FONTS for path in folder.glob(pattern)}):
        image = Image.new("L", (CANVAS, CANVAS))
        font = ImageFont.truetype(str(path), 64)
        ImageDraw.Draw(image).text((CANVAS / 2, CANVAS / 2), character, font=font, fill=255, anchor="mm")
        glyphs.append(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(glyphs))[:, None]


def scan(glyphs: Tensor, num: int, random: torch.Generator) -> Tensor:
    """Random scans (num, 1, 8, 8) of glyphs (fonts, 1, 64, 64)."""
    glyphs = glyphs[torch.randint(len(glyphs), (num,), generator=random)]
    fill_height = torch.tensor([[0.95, 0.0, 0.0], [0.0, 0.8, 0.0]])  # the handwriting fills its scans so
    bend = fill_height + 0.12 * torch.randn(num, 2, 3, generator=random)
    bent = F.grid_sample(glyphs, F.affine_grid(bend, list(glyphs.shape), align_corners=False), align_corners=False)
    blur, contrast = torch.rand(2, num, 1, 1, 1, generator=random)
    blurred = torch.lerp(bent, F.avg_pool2d(bent, 9, stride=1, padding=4), blur)
    return F.adaptive_avg_pool2d(blurred, SCAN).mul(1 + contrast).clamp(max=1)


class Run(L.Callback):
    """What is measured of one training, which also moves the progress bar."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self.steps: list[int] = []  # at which the curve was measured
        self.curve: list[float] = []
        self.test_accuracy = self.gap = self.seconds = np.nan

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count the step, and keep the domain gap if a method has logged it."""
        self.advance()
        self.gap = float(trainer.callback_metrics.get("transfer/domain_gap", self.gap))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a point to the curve."""
        self.steps.append(trainer.global_step)
        self.curve.append(float(trainer.callback_metrics["accuracy"]))


def make_trainer(steps: int, callbacks: list[L.Callback], *, logger: Any = False) -> L.Trainer:
    """Return a Trainer that validates ten times and, without a logger, leaves no files."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,  # the interval counts steps: an epoch of the few images is only a few
        num_sanity_val_steps=0,
        logger=logger,
        log_every_n_steps=5,  # no more than the batches of an epoch
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def pretrain(characters: TensorDataset, steps: int, advance: Callable[[], None]) -> torch.nn.Module:
    """A small timm network that reads print."""
    torch.manual_seed(0)
    num_classes = int(characters.tensors[1].max()) + 1
    network = timm.create_model("resnet10t", in_chans=1, num_classes=num_classes, stem_width=8, channels=CHANNELS)
    train = DataLoader(characters, batch_size=64, shuffle=True, drop_last=True)
    make_trainer(steps, [Run(advance)]).fit(LitDigits(network, PRETRAINING_LR), train)
    return network


def tune(pretrained: Any, data: FewImages, lr: float, callbacks: list[L.Callback], steps: int, run: Run) -> Run:
    """Fine-tune a copy of the network; the seed decides the images, their order and the new head, for every method."""
    network = copy.deepcopy(pretrained)
    torch.manual_seed(data.seed)
    network.reset_classifier(int(data.train.tensors[1].max()) + 1)
    module, trainer = LitDigits(network, lr), make_trainer(steps, [*callbacks, run])
    start = time.perf_counter()
    trainer.fit(module, data)
    run.seconds = time.perf_counter() - start
    run.test_accuracy = trainer.test(module, data, verbose=False)[0]["accuracy"]
    return run


def summary(runs: list[Run], plain: list[Run]) -> dict[str, float]:
    """Return a row of the table; `plain` are the runs of plain fine-tuning, seed by seed."""
    tests = np.array([run.test_accuracy for run in runs])
    gains = tests - [run.test_accuracy for run in plain]
    return {
        "test accuracy": float(tests.mean()),
        "gain": float(gains.mean()),
        "standard error": float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else np.nan,
        "domain gap": float(np.mean([run.gap for run in runs])),
        "seconds": float(np.mean([run.seconds for run in runs])),
    }


def points(row: dict[str, float]) -> str:
    """Write a row's gain in points, with its standard error if there is one."""
    error = "" if np.isnan(row["standard error"]) else f" ± {100 * row['standard error']:.1f}"
    return f"{100 * row['gain']:+.1f}{error}"


def show(rows: Rows, num_seeds: int) -> None:
    """Print the table."""
    runs = f"mean of {num_seeds} seeds; ± is the standard error of the gain" if num_seeds > 1 else "one seed"
    table = Table(title=f"Test accuracy, {runs}")
    for heading in ("", "accuracy", "gain, points", "domain gap", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for target, methods in rows.items():
        table.add_section()
        table.add_row(target.replace(", ", ",\n"), style="bold")
        for name, row in methods.items():
            gap = "" if np.isnan(row["domain gap"]) else f"{row['domain gap']:.2f}"
            table.add_row(f"  {name}", f"{row['test accuracy']:.1%}", gap and points(row), gap, f"{row['seconds']:.1f}")
    Console().print(table)


def draw_curves(runs: dict[str, dict[str, list[Run]]], rows: Rows, path: Path) -> None:
    """Draw validation accuracy over training, a panel for each target; thinner lines keep equal curves visible."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, (target, methods) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        lines = ("#aab2c0", 7.0), ("#d08770", 4.0), ("#5e81ac", 1.6)
        for (name, several), (color, width) in zip(methods.items(), lines, strict=True):
            label = name if name == PLAIN else f"{name}: {points(rows[target][name])}"
            curve = 100 * np.mean([run.curve for run in several], axis=0)
            axes.plot(several[0].steps, curve, color=color, linewidth=width, label=label, solid_capstyle="round")
        axes.set_title(target, loc="left", fontweight="bold", fontsize="medium")
        axes.set(xlabel="optimizer steps", ylim=(100 * rows[target][PLAIN]["test accuracy"] - 7, None))
        axes.legend(title="gain on test images, points", loc="lower right", frameon=False, alignment="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("validation accuracy, %")
    figure.savefig(path, dpi=200)


@contextmanager
def calm() -> Iterator[None]:
    """Lightning's information lines, which come under either of its two names, stay out of the progress bar."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():  # loader workers would cost more than these small images, which lie in memory
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*have no `val_dataloader`")  # pretraining is not validated
        warnings.filterwarnings("ignore", ".*LeafSpec")  # some versions of Lightning against a newer torch
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main(argv: Sequence[str] | None = None) -> Rows:
    """Pretrain once, fine-tune with every target, seed and method, then print and draw; returns the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # layers this small gain little from a second thread, and lose much on a busy machine
    columns = TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    runs: dict[str, dict[str, list[Run]]] = {target: {name: [] for name in METHODS} for target in TARGETS}
    rows: Rows = {}
    with calm(), Progress(*columns, "left") as bars:
        warnings.filterwarnings("ignore", category=lt.NoEffectWarning)  # the table shows where the source is left out
        num_runs = len(TARGETS) * len(METHODS) * options.seeds
        bar = bars.add_task("pretraining", total=PRETRAINING_STEPS + num_runs * options.steps)
        characters = printed("".join(character for character in SOURCE if character not in NEAR), 150, seed=0)
        pretrained = pretrain(characters, PRETRAINING_STEPS, lambda: bars.advance(bar))
        source = lt.SourceTask.from_timm(pretrained, characters)  # while the network still has its classifier
        for target, (data, lr) in TARGETS.items():
            for seed, (name, callbacks) in itertools.product(range(options.seeds), METHODS.items()):
                bars.update(bar, description=f"{target[:4].rstrip(':')}, {name}, seed {seed}")
                run = Run(lambda: bars.advance(bar))
                runs[target][name].append(tune(pretrained, data(seed), lr, callbacks(source), options.steps, run))
            rows[target] = {name: summary(several, runs[target][PLAIN]) for name, several in runs[target].items()}
    show(rows, num_seeds=options.seeds)
    draw_curves(runs, rows, options.out)
    print(f"Learning curves: {options.out}")
    return rows


if __name__ == "__main__":
    main()
