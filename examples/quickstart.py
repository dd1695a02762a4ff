"""Quickstart: a network that knows printed characters learns handwritten digits, with every method.

About five minutes on a CPU, no download: the source images are drawn with the fonts that come with matplotlib, the
target images are the 8 x 8 scans of real handwriting in scikit-learn, ten of each digit to learn from.

    python examples/quickstart.py
"""

import argparse
import copy
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_transfer as lt

# ---- All that lightning_transfer asks of a project: a row here, and the line `source = ...` in main() ---------------
METHODS: dict[str, Callable[[lt.SourceTask, torch.nn.Module], list[L.Callback]]] = {
    "fine-tuning": lambda source, second: [],
    "soft fine-tuning": lambda source, second: [lt.SoftFinetuning(source, weight=lt.Schedule())],
    "selective joint": lambda source, second: [
        lt.SelectiveJointFinetuning(source, neighbors=100, weight=lt.Schedule(1.0, 1.0))
    ],
    "AdaFilter": lambda source, second: [lt.AdaFilter()],
    "gated transfer": lambda source, second: [lt.GatedTransfer(aux_weight=0.2)],
    "collaborative": lambda source, second: [lt.CollaborativeFinetuning([second])],
}
# ---------------------------------------------------------------------------------------------------------------------

SOURCE = "0123456789ABCDEFGHIJKLMNPQRSTUVWXYZ"  # no O, which looks like zero
SMALL = "cijklmpsuvwxyz"  # what a second network has learned to read, for the method that takes several
UNSEEN = "abdefghnqrt"  # small letters that do not look like their capital: neither task trains on them
FONTS = ("DejaVuSans[!D]*", "DejaVuSerif[!D]*", "STIXGeneral*", "cm[brt]*", "cmss*")  # no symbol fonts
CANVAS, SCAN, SIDE = 64, 8, 32  # pixels that a character is drawn on, of its scan, and that the network sees

SHOTS, BATCH = 10, 20  # labelled digits of each class, and of each step
PRETRAINING_LR = 0.1
# Chosen for plain fine-tuning, by its mean validation accuracy over three seeds that no run here uses, and then taken
# for every method: .003 94.5 %, .005 94.8, .01 95.0, .02 94.8, .03 94.6, .1 94.4.
LR = 0.01


class LitDigits(L.LightningModule):
    """An ordinary image classifier: nothing in it knows of lightning_transfer."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        """SGD whose learning rate falls to zero along a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Digits(L.LightningDataModule):
    """Handwritten digits: a few to train on, drawn by `seed`; half of all are for the test, the same for every seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        digits = load_digits()
        images = enlarge(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32))
        labels = torch.tensor(digits.target)
        test, rest = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(2)
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        few = torch.cat([rest[labels[rest] == digit][:SHOTS] for digit in range(10)])
        others = rest[~torch.isin(rest, few)]
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (few, others, test))

    def train_dataloader(self) -> DataLoader[Any]:
        """The few; a generator of its own gives every method the same batches."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=BATCH, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Any]:
        """For the curves."""
        return DataLoader(self.val, batch_size=500)

    def test_dataloader(self) -> DataLoader[Any]:
        """For the final number only."""
        return DataLoader(self.test, batch_size=500)


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
        self.test_accuracy = self.discrimination = self.seconds = np.nan

    def on_train_batch_end(self, *_: Any) -> None:
        """One step further."""
        self.advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One more point of the curve."""
        self.steps.append(trainer.global_step)
        self.curve.append(float(trainer.callback_metrics["accuracy"]))


def make_trainer(steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    """A Trainer that validates twenty times and leaves no files."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        val_check_interval=max(1, steps // 20),
        check_val_every_n_epoch=None,  # the interval counts steps: an epoch of the few digits is only five
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def pretrain(characters: TensorDataset, steps: int, advance: Callable[[], None]) -> torch.nn.Module:
    """A small timm network that reads print."""
    torch.manual_seed(0)
    num_classes = int(characters.tensors[1].max()) + 1
    network = timm.create_model(
        "resnet10t", in_chans=1, num_classes=num_classes, stem_width=8, channels=(16, 32, 64, 128)
    )
    train = DataLoader(characters, batch_size=64, shuffle=True, drop_last=True)
    make_trainer(steps, [Run(advance)]).fit(LitDigits(network, PRETRAINING_LR), train)
    return network


def tune(pretrained: Any, seed: int, callbacks: list[L.Callback], steps: int, advance: Callable[[], None]) -> Run:
    """Fine-tune a copy of the network; the seed decides the digits, their order and the new head, for every method."""
    network = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    network.reset_classifier(10)
    module, data, run = LitDigits(network, LR), Digits(seed), Run(advance)
    trainer = make_trainer(steps, [*callbacks, run])
    start = time.perf_counter()
    trainer.fit(module, data)
    run.seconds = time.perf_counter() - start
    run.test_accuracy = trainer.test(module, data, verbose=False)[0]["accuracy"]
    run.discrimination = discrimination(network)
    return run


@torch.no_grad()
def discrimination(network: Any) -> float:
    """How well the features tell apart letters that no training has shown."""
    images, labels = printed(UNSEEN, 40, seed=2).tensors
    network = copy.deepcopy(network).eval()
    metric = lt.metrics.GeneralDiscrimination()
    metric.update(network.forward_head(network.forward_features(images), pre_logits=True), labels)
    return float(metric.compute())


def summary(runs: list[Run], plain: list[Run]) -> dict[str, float]:
    """A method's row of the table; `plain` are the runs of plain fine-tuning, seed by seed."""
    tests = np.array([run.test_accuracy for run in runs])
    goals = [run.curve[-1] for run in plain]  # paired by seed; not a number where a run never gets there
    reached = [
        next((step for step, accuracy in zip(run.steps, run.curve, strict=True) if accuracy >= goal), np.nan)
        for run, goal in zip(runs, goals, strict=True)
    ]
    return {
        "test accuracy": float(tests.mean()),
        "standard error": float(tests.std(ddof=1) / len(tests) ** 0.5) if len(tests) > 1 else np.nan,
        "steps to plain": float(np.mean(reached)),
        "general discrimination": float(np.mean([run.discrimination for run in runs])),
        "seconds": float(np.mean([run.seconds for run in runs])),
    }


def show(rows: dict[str, dict[str, float]], num_seeds: int, before: float) -> None:
    """Print the table; `before` is the pretrained network's general discrimination."""
    table = Table(
        title=f"Handwritten digits, {SHOTS} of each class to train on, mean of {num_seeds} seeds",
        caption=f"-: not with every seed. General discrimination before fine-tuning: {before:.1%}",
    )
    table.add_column("")
    for heading in ("test\naccuracy", "steps to where\nplain ends", "general\ndiscrimination", "seconds\na run"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        error = "" if np.isnan(row["standard error"]) else f" ± {row['standard error']:.1%}"
        steps = "-" if np.isnan(row["steps to plain"]) else f"{row['steps to plain']:.0f}"
        accuracy, unseen = f"{row['test accuracy']:.1%}{error}", f"{row['general discrimination']:.1%}"
        table.add_row(name, accuracy, steps, unseen, f"{row['seconds']:.1f}")
    Console().print(table)


@contextmanager
def calm() -> Iterator[None]:
    """Lightning's information lines, which come under either of its two names, stay out of the progress bar."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():  # loader workers would cost more than these small images, which lie in memory
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec")  # some versions of Lightning against a newer torch
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Pretrain once, fine-tune with every method and seed, then print and draw; returns the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, default=400, help="of each run; pretraining takes twice as many")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # layers this small gain little from a second thread, and lose much on a busy machine
    pretraining = max(100, 2 * options.steps)  # fewer would leave nothing to transfer
    columns = TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    with calm(), Progress(*columns) as bars:
        bar = bars.add_task("pretraining on printed characters", total=2 * pretraining)
        characters = printed(SOURCE, 300, seed=0)
        pretrained = pretrain(characters, pretraining, lambda: bars.advance(bar))
        source = lt.SourceTask.from_timm(pretrained, characters)  # while the network still has its classifier
        second = pretrain(printed(SMALL, 300, seed=3), pretraining, lambda: bars.advance(bar))

        bar = bars.add_task("", total=len(METHODS) * options.seeds * options.steps)
        for seed, (name, callbacks) in itertools.product(range(options.seeds), METHODS.items()):
            bars.update(bar, description=f"{name}, seed {seed}")
            chosen = callbacks(source, second)
            runs[name].append(tune(pretrained, seed, chosen, options.steps, lambda: bars.advance(bar)))
        bars.update(bar, description="fine-tuning on handwritten digits")

    rows = {name: summary(several, plain=runs["fine-tuning"]) for name, several in runs.items()}
    show(rows, num_seeds=options.seeds, before=discrimination(pretrained))
    curves = {name: [run.curve for run in several] for name, several in runs.items()}
    steps = runs["fine-tuning"][0].steps
    title = "From printed characters to handwritten digits"
    lt.reports.learning_curves(curves, steps, options.out, schedule=lt.Schedule(), num_steps=options.steps, title=title)
    print(f"Learning curves: {options.out}")
    return rows


if __name__ == "__main__":
    main()
