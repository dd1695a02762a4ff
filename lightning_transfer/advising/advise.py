"""Which method for my data: a look at it, and what is known of data like it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_transfer.advising.evidence import Expected, Verdict, expect, known_settings, weigh
from lightning_transfer.advising.measuring import Measured, measure
from lightning_transfer.errors import TransferConfigError, check_count
from lightning_transfer.glue import proxy
from lightning_transfer.progress import tqdm_progress
from lightning_transfer.source.task import AnyDataset, SourceTask

# method, as the matrix calls it: the line to write
ALONE = {
    "linear probe": "for param in backbone.parameters(): param.requires_grad = False",
    "gated transfer": "Trainer(callbacks=[lt.GatedTransfer()])",
    "AdaFilter": "Trainer(callbacks=[lt.AdaFilter()])",
    "collaborative": "Trainer(callbacks=[lt.CollaborativeFinetuning([another_pretrained_network])])",
}
WITH_SOURCE = {
    "soft": "Trainer(callbacks=[lt.SoftFinetuning(source)])",
    "soft, measured weight": 'Trainer(callbacks=[lt.SoftFinetuning(source, weight="auto")])',
    "selective": "Trainer(callbacks=[lt.SelectiveJointFinetuning(source)])",
    "selective, measured weight": 'Trainer(callbacks=[lt.SelectiveJointFinetuning(source, weight="auto")])',
    "selective and gated transfer": "Trainer(callbacks=[lt.SelectiveJointFinetuning(source), lt.GatedTransfer()])",
    "selective and AdaFilter": "Trainer(callbacks=[lt.SelectiveJointFinetuning(source), lt.AdaFilter()])",
}
LINES = {**ALONE, **WITH_SOURCE}
TITLES: dict[Verdict, str] = {
    "recommended": "Recommended",
    "no difference shown": "No difference shown to plain fine-tuning",
    "advised against": "Advised against",
}
NOTABLE = 0.1  # of all that is known, from which share on a setting is named
UNLIKE = 9.0  # three times what counts as one step, in squares, from which nothing is alike
LOST = 10.0  # points below a linear probe, from which fine-tuning itself looks wrong


@dataclass(frozen=True)
class Advice:
    """What is expected of each method; printed, a page that says why.

    Attributes:
        measured: what was seen of the target.
        place: "near", "middle" or "far", as the most similar setting of the benchmarks.
        alike: the most similar settings, and by what share of 1 each counts.
        is_known: whether any is similar at all.
        expected: of each method, the best first.
    """

    measured: Measured
    place: str
    alike: dict[str, float]
    is_known: bool
    expected: tuple[Expected, ...]

    def __str__(self) -> str:
        seen = self.measured
        gap = "not measured (pass source=)" if seen.gap is None else f"{seen.gap:.2f} (.5 near, 1 far)"
        lines = [
            f"{seen.images} labelled images, {seen.classes} classes, {seen.fewest} of the rarest.",
            f"Linear probe {seen.probe:.1%}, fine-tuning {seen.tuned:.1%}: {seen.distance:+.1f} +- "
            f"{196 * seen.error:.1f} points, on {seen.scored} images that were held out in turns.",
            f"Domain gap: {gap}.",
            f"Your target is {self.place}. Most like it in the benchmarks: "
            f"{'; '.join(f'{name} ({share:.0%})' for name, share in self.alike.items())}.",
        ]
        if not self.is_known:
            lines.append("Nothing in the benchmarks is much like it: take what follows for a guess.")
        if seen.distance + 196 * seen.error < -LOST:
            lines.append(
                "Fine-tuning loses what the network knows: its learning rate is too high, or it has too few steps."
            )
        for verdict, title in TITLES.items():
            some = [each for each in self.expected if each.verdict == verdict]
            if some:
                lines += ["", f"{title}:"]
            for each in some:
                change = f"{each.points:+5.1f} +- {each.interval:.1f} points"
                lines.append(f"  {change}, {each.cost:.1f} times the cost: {each.method}")
                if verdict == "recommended":
                    lines.append(f"      {LINES[each.method]}")
        lines += ["", "Expected is what was seen on small networks and images: a hint, not a promise."]
        return "\n".join(lines)


def advise(
    module: Any,
    data: Any,
    *,
    source: SourceTask | None = None,
    unaugmented: AnyDataset | None = None,
    steps: int = 300,
    trainer: Mapping[str, Any] | None = None,
) -> Advice:
    """Say which methods are likely to help on somebody's own data, and which to hurt.

    Copies of the module are fine-tuned, as it would be, on parts of its training images, and scored on the rest beside
    a linear probe; with a source, the domain gap is measured. What is expected of each method is what it gained in
    those settings of the benchmarks that are most like that. Neither the module nor the random state is changed, and
    validation and test data are not looked at.

    Args:
        module: the LightningModule that is to be trained, with its pretrained network.
        data: its DataModule, or its train loader.
        source: what the network was pretrained on, where it is at hand.
        unaugmented: the training images without augmentation; those of the loader where left out.
        steps: of each of at most four trainings.
        trainer: options of the Trainer, such as {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}.

    Raises:
        TransferConfigError: the images cannot be split, or the module has no head that takes one row an image.
    """
    if not isinstance(source, SourceTask | None):
        raise TransferConfigError(
            f"source is a {type(source).__name__}; write advise(module, datamodule, source=lt.SourceTask(dataset, "
            "num_classes=...))."
        )
    check_count("steps", steps, least=1)
    measured = measure(
        module,
        proxy.loader_of(data),
        source=source,
        unaugmented=unaugmented,
        steps=steps,
        options={"devices": 1, **(trainer or {})},
        progress=tqdm_progress,
    )
    settings = known_settings()
    shares = weigh(measured, settings)
    nearest = shares[0][1]
    return Advice(
        measured=measured,
        place=nearest.place,
        alike={f"{each.target} at {each.shots:.0f} a class": share for share, each in shares if share >= NOTABLE},
        is_known=nearest.unlike(measured) < UNLIKE,
        expected=tuple(expect(measured, settings, [*(LINES if source else ALONE)])),
    )
