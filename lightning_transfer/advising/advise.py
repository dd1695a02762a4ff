"""Which method for my data: a look at it, and what is known of data like it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_transfer.advising.evidence import (
    NOTICED,
    UNLIKE,
    Expected,
    Verdict,
    expect,
    known_settings,
    place,
    weigh,
)
from lightning_transfer.advising.measuring import ADAPT, FORWARD, STEPS, Measured, Question, measure
from lightning_transfer.errors import TransferConfigError, check_count
from lightning_transfer.progress import no_progress, tqdm_progress
from lightning_transfer.source.datasets import AnyDataset
from lightning_transfer.source.gap import NEAR, SCALE, is_near
from lightning_transfer.source.task import SourceTask

# method, as the matrix calls it: the line to write, with the options that it was run with
ALONE = {
    "gated transfer": "callbacks=[lt.GatedTransfer(aux_weight=0.2)]",
    "transfer module alone": "callbacks=[lt.GatedTransfer()]",
    "AdaFilter": "callbacks=[lt.AdaFilter()]",
    "collaborative": "callbacks=[lt.CollaborativeFinetuning([another_pretrained_network])]",
    "ensemble of two": "callbacks=[lt.CollaborativeFinetuning([another_pretrained_network], weight=0.0)]",
}
SELECTIVE = "lt.SelectiveJointFinetuning(source, neighbors=100, target=images_without_augmentation"
ALWAYS = "weight=lt.Schedule(1.0, 1.0)"
JOINT = '  # source: lt.SourceTask(..., forward="joint")'
WITH_SOURCE = {
    "soft": f"callbacks=[lt.SoftFinetuning(source, weight=lt.Schedule())]{JOINT}",
    "soft, measured weight": f"callbacks=[lt.SoftFinetuning(source)]{JOINT}",
    "selective": f"callbacks=[{SELECTIVE}, {ALWAYS})]{JOINT}",
    "selective, measured weight": f"callbacks=[{SELECTIVE})]{JOINT}",
    "selective and gated transfer": f"callbacks=[{SELECTIVE}, {ALWAYS}), lt.GatedTransfer(aux_weight=0.2)]{JOINT}",
}
LINES = {**ALONE, **WITH_SOURCE}
TITLES: dict[Verdict, str] = {
    "recommended": "Recommended",
    "may help": f"May help, which is not shown: {NOTICED:.0f} point or more is expected, and the interval holds 0",
    "no difference shown": "No difference shown to plain fine-tuning",
    "advised against": f"Advised against: a loss is shown, or one of {NOTICED:.0f} point or more expected",
    "not known": "Not known well enough",
}
NOTABLE = 0.1  # of all that is known, from which share on a setting is named
CLOSE = 0.05  # to the threshold of the gap: other images may fall on its other side


@dataclass(frozen=True)
class Advice:
    """What is expected of each method; printed, a page that says why.

    Attributes:
        measured: what was seen of the target.
        place: "near", "middle" or "far", or between which two its distance may lie.
        alike: the most similar settings, and by what share of 1 each counts.
        is_known: whether any is similar at all.
        expected: of each method, the best first; of none where nothing is learned, or fine-tuning itself falls far
            short of the probe.
    """

    measured: Measured
    place: str
    alike: dict[str, float]
    is_known: bool
    expected: tuple[Expected, ...]

    def __str__(self) -> str:
        lines = self._seen()
        for verdict, title in TITLES.items():
            some = [each for each in self.expected if each.verdict == verdict]
            if some:
                lines += ["", f"{title}:"]
            for each in some:
                change = f"{each.points:+5.1f} +- {each.interval:.1f} points, {each.cost:.1f} times the cost: "
                lines.append("  " + ("" if verdict == "not known" else change) + each.method)
                if verdict in ("recommended", "may help"):
                    lines.append(f"      {LINES[each.method]}")
        if not self.expected:
            return "\n".join(lines)
        verdicts = {each.verdict for each in self.expected}
        if "recommended" not in verdicts:
            stay = "Nothing is shown to help: stay with plain fine-tuning, or with the probe where that is as good"
            lines += ["", f"{stay}, or try what may." if "may help" in verdicts else f"{stay}."]
        where = "examples/benchmarks/README.md says on which"
        lines += ["", f"This was seen on small networks and images ({where}): a hint, not a promise."]
        return "\n".join(lines)

    def _seen(self) -> list[str]:
        """What was measured, and what it is held against."""
        seen = self.measured
        of = "" if seen.groups is None else f" of {seen.groups} groups"
        of_none = f"not measured ({seen.remark or 'pass source='})"
        lines = [
            f"{seen.images} labelled images{of}, {seen.classes} classes, {seen.fewest} of the rarest.",
            f"Linear probe {seen.probe:.1%}, fine-tuning {seen.tuned:.1%}: {seen.distance:+.1f} +- "
            f"{196 * seen.error:.1f} points, on {seen.scored} images that were held out in turns.",
            f"Domain gap: {of_none if seen.gap is None else _of_gap(seen.gap)}.",
        ]
        if seen.guess:
            lines.append(
                f"Without a forward of the module's, images were run {seen.guess}: write one if your step does more."
            )
        if seen.steps < STEPS:
            lines.append(
                f"Fine-tuning had {seen.steps} steps, the benchmarks that it is held against had {STEPS}: with few a "
                f"target looks near. Ask with steps={STEPS}."
            )
        return lines + self._compared()

    def _compared(self) -> list[str]:
        if self.measured.is_guessing:
            return [
                "Neither is shown to be better than to say the most common class each time "
                f"({self.measured.commonest:.1%}): images and labels may not belong together, or images are too few or "
                "classes too uneven to tell. Nothing is said of any method."
            ]
        if self.measured.falls_short:
            return [
                "Fine-tuning falls far short of the probe: its learning rate is too high, or it has too few steps or "
                "images. Until it does better take the probe; nothing is said of methods that build on it."
            ]
        by_gap = "" if self.measured.gap is None else " Whether to keep the source goes by the gap."
        shares = "; ".join(f"{name} ({share:.0%})" for name, share in self.alike.items())
        return [
            f"By what fine-tuning adds, your target is {self.place}.{by_gap}",
            f"Of what the benchmarks have seen it is most like {shares}; not every method was run there."
            if self.is_known
            else "Nothing in the benchmarks is much like it, so nothing is expected of any method.",
        ]


def _of_gap(gap: float) -> str:
    then = "keep" if is_near(gap) else "leave out"
    says = f'{gap:.2f} ({SCALE}); weight="auto" would, by this, {then} the source'
    is_close = abs(gap - NEAR) < CLOSE
    return f"{says}, but a run draws other images, by which it may come out on the other side" if is_close else says


def advise(
    module: Any,
    data: Any,
    *,
    source: SourceTask | None = None,
    unaugmented: AnyDataset | None = None,
    steps: int = STEPS,
    head: str = "auto",
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Advice:
    """Say which methods are likely to help on somebody's own data, and which to hurt.

    Copies of the module are fine-tuned, as it would be, on parts of its training images, and scored on the rest beside
    a linear probe; with a source, the domain gap is measured. What is expected of each method is what it gained in
    those settings of the benchmarks that are most like that. Neither the module nor the random state is changed, and
    validation and test data are not looked at.

    Args:
        module: the LightningModule that is to be trained, with its pretrained network.
        data: its DataModule, or its train loader. Images of one group, where the dataset has a list `groups`, stay
            together.
        source: what the network was pretrained on, where it is at hand.
        unaugmented: the training images without augmentation; those of the loader where left out.
        steps: of each of at most four trainings; a schedule that is laid out over epochs is over when they are.
        head: dotted path of the classifier, or "auto".
        adapt: turns a batch into (images, labels), where it is a dictionary, say.
        forward: runs images through the module, if its own forward takes more than images; by default the source's.
        trainer: options of the Trainer, such as {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}.

    Raises:
        TransferConfigError: the images cannot be split, or the module has no head that takes one row an image.

    Returns:
        What was measured and what is expected of each method; `print` shows it with the lines to write.
    """
    if not isinstance(source, SourceTask | None):
        raise TransferConfigError(
            f"source is a {type(source).__name__}; wrap the dataset: source=lt.SourceTask.from_timm(network, dataset), "
            "before the network's classifier is replaced, or lt.SourceTask(dataset, head=pretrained_classifier)."
        )
    check_count("steps", steps, least=1)
    if adapt is not None and not callable(adapt):
        raise TransferConfigError(f"adapt={adapt!r} is no function. {ADAPT}")
    if forward is not None and not callable(forward):
        raise TransferConfigError(f"forward={forward!r} is not a function. {FORWARD.format('module.model(images)')}")
    if forward is None and source is not None and callable(source.forward):
        forward = source.forward
    question = Question(source, unaugmented, head, adapt, steps, trainer or {}, forward)
    is_seen = not isinstance(trainer, Mapping) or trainer.get("enable_progress_bar", True)
    measured = measure(module, data, question, progress=tqdm_progress if is_seen else no_progress)
    settings, methods = known_settings(), [*(LINES if source else ALONE)]
    shares = weigh(measured, settings)
    low, high = (place(measured.distance + side * 196 * measured.error) for side in (-1, 1))
    return Advice(
        measured=measured,
        place=low if low == high else f"between {low} and {high}",
        alike={f"{each.target} at {each.shots:.0f} a class": share for share, each in shares if share >= NOTABLE},
        is_known=shares[0][1].unlike(measured) < UNLIKE,
        expected=() if measured.is_guessing or measured.falls_short else tuple(expect(measured, settings, methods)),
    )
