"""Describe the source task: images, the pretrained classifier, and how both are run."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Required, TypeAlias, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_transfer.batches import class_numbers, either, label_hint, label_places
from lightning_transfer.datasets import AnyDataset, check_random_access, known_labels, load
from lightning_transfer.errors import TransferConfigError, check_choice, check_count
from lightning_transfer.naming import a_class, name_of, nesting
from lightning_transfer.networks import loaded
from lightning_transfer.pending import PendingChecks
from lightning_transfer.reading import apart
from lightning_transfer.roles import has_linear, in_width, is_pooling, linear_layers, out_width
from lightning_transfer.stamps import digest
from lightning_transfer.surgery import own_randomness
from lightning_transfer.values import value_of

SourceForward: TypeAlias = Literal["separate", "joint"] | Callable[[nn.Module, Tensor], Tensor]


class SourceOptions(TypedDict, total=False):
    """Lists the options that `SourceTask.from_timm` passes on."""

    batch_size: int | None
    loss: Callable[[Tensor, Tensor], Tensor]
    forward: SourceForward
    batchnorm: Literal["protect", "update"]
    num_workers: int | None
    seed: int
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None
    batch_hooks: bool
    unaugmented: AnyDataset | None


class TimmSource(SourceOptions):
    """Describes `SourceTask.from_timm` as a mapping, which is how a configuration file writes it."""

    from_timm: Required[str | nn.Module]  # text first: a name such as "resnet50.a1_in1k" is not imported
    dataset: Required[AnyDataset]


@dataclass(frozen=True, eq=False, repr=False)
class SourceTask:
    """Keeps the task that a network was pretrained on beside the target task.

    It is only a description: each training run copies the head and opens its own stream, so many runs can share one
    `SourceTask`. To keep the source objective is the paper's idea (arXiv 1909.02236). How it is kept is ours: the
    pretrained classifier on the features before the target head, and one mean loss per domain.

    Args:
        dataset: source images with a length and random access, giving (image, label).
        head: the pretrained classifier; takes the features that the target head takes.
        num_classes: classes of a new source head, if there is no pretrained one.
        batch_size: source images a step; as many as target images by default.
        loss: mean loss of (logits, labels).
        forward: "separate" runs source images in a separate pass; "joint" appends them to the target's, so that
            one pass serves both; a function of (module, images) runs modules whose forward does not end in the head:
            it either reaches the head or returns the features. A measured weight, a selection and advice run target
            images in the same way.
        batchnorm: "protect" keeps BatchNorm's running statistics the target's; "update" lets separate source passes
            move them. A joint pass always sees both domains.
        num_workers: processes that read source images; by default as many as the train loader has.
        seed: of the order of source images, their augmentation and a new head.
        adapt: turns the dataset's collated samples into (images, labels); a measured weight or a selection also reads
            target batches with it.
        batch_hooks: whether source batches pass the user's batch-transfer hooks, as target batches do. Attributes that
            hooks set on the module or the DataModule are restored for the target's loss. Mixup in a hook, which keeps
            the partners there for its loss, raises an error.
        unaugmented: if the dataset augments at random, the same images in the same order without augmentation; a
            selection compares these.

    Raises:
        TransferConfigError: an option is out of range, the dataset is empty or has no random access, or a kept
            head and `num_classes` disagree.

    Example:
        >>> images, labels = torch.rand(8, 3, 4, 4), torch.arange(8)
        >>> SourceTask(torch.utils.data.TensorDataset(images, labels), num_classes=8)
        SourceTask(8 images of TensorDataset, new head of 8 classes, forward='separate')
    """

    dataset: AnyDataset
    _: KW_ONLY
    head: nn.Module | None = None
    num_classes: int | None = None
    batch_size: int | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    forward: SourceForward = "separate"
    batchnorm: Literal["protect", "update"] = "protect"
    num_workers: int | None = None
    seed: int = 0
    adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    batch_hooks: bool = True
    unaugmented: AnyDataset | None = None

    def __post_init__(self) -> None:
        self._check_dataset()
        check_count("seed", self.seed, least=0)
        for name, value, least in (("num_workers", self.num_workers, 0), ("batch_size", self.batch_size, 1)):
            if value is not None:
                check_count(name, value, least=least)
        check_choice("batchnorm", self.batchnorm, ("protect", "update"))
        if not callable(self.forward):
            check_choice("forward", self.forward, ("separate", "joint"))
        self._check_head()

    def _check_dataset(self) -> None:
        if isinstance(self.dataset, str | Path):
            raise TransferConfigError(
                f"dataset={str(self.dataset)!r} is a path; load it: SourceTask(ImageFolder(path, transform), ...)."
            )
        if isinstance(self.dataset, DataLoader):
            raise TransferConfigError("SourceTask takes a dataset, not a loader: SourceTask(loader.dataset, ...).")
        check_random_access(self.dataset, "source")

    def _check_head(self) -> None:
        if getattr(self.loss, "reduction", "mean") == "sum":
            raise TransferConfigError("The source loss is a sum over its images; expected the mean: reduction='mean'.")
        if not isinstance(self.head, nn.Module | None):
            raise TransferConfigError(
                f"head={self.head!r} is not a module; pass the pretrained classifier, SourceTask(head=model.fc). The "
                "path of the target's head goes to the callback."
            )
        if self.head is None and self.num_classes is None:
            raise TransferConfigError(
                "A source task needs head=pretrained_classifier, or num_classes= for a new head. For timm models: "
                "SourceTask.from_timm(model, dataset)."
            )
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes, least=2)
        if self.head is None:
            return
        if not any(linear_layers(self.head)):
            raise TransferConfigError(
                f"head={type(self.head).__name__} has no Linear layer. timm's reset_classifier() and "
                "num_classes=0 remove the classifier: call SourceTask.from_timm(model, dataset) before."
            )
        if self.num_classes not in (None, out_width(self.head)):
            raise TransferConfigError(
                f"num_classes={self.num_classes}, but head has {out_width(self.head)} classes. Leave num_classes out."
            )

    @classmethod
    def from_timm(cls, model: nn.Module | str, dataset: AnyDataset, **options: Unpack[SourceOptions]) -> "SourceTask":
        """Keep the classifier of a pretrained timm model as the source head.

        Call it before the user's `reset_classifier`, with the dataset's labels in the order of that classifier.

        Args:
            model: a timm model, or the name of one to load with its pretrained weights.
            dataset: source images, giving (image, label).
            options: the other options of `SourceTask`.

        Raises:
            TransferConfigError: timm has no such model, or the model has no classifier, or more than one.

        Example:
            >>> import timm
            >>> data = torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4))
            >>> SourceTask.from_timm(timm.create_model("resnet10t", num_classes=4), data).head.out_features
            4
        """
        if not isinstance(model, str | nn.Module):
            raise TransferConfigError(f"model is {a_class(model)}; write SourceTask.from_timm(network, dataset).")
        model = loaded(model)
        if not hasattr(model, "get_classifier"):
            raise TransferConfigError(
                f"{type(model).__name__} has no get_classifier(), so it is not a timm model. Take its classifier "
                "yourself, before you replace it: SourceTask(dataset, head=model.fc), or model.classifier, as it is "
                "called there."
            )
        classifier: Any = model.get_classifier()  # type: ignore[operator]
        if not isinstance(classifier, nn.Module):
            raise TransferConfigError(
                f"{type(model).__name__} has {len(classifier)} classifiers; pass one: SourceTask(dataset, head=...)."
            )
        return cls(dataset, head=copy.deepcopy(classifier), **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SourceTask":
        return self  # never changes, and a copy of the user's module must not copy the source images

    def __repr__(self) -> str:
        classes = self.num_classes if self.head is None else out_width(self.head)
        head = f"{'new' if self.head is None else 'kept'} head of {classes} classes"
        forward = self.forward if isinstance(self.forward, str) else name_of(self.forward)
        return f"SourceTask({self.num_images:,} images of {type(self.dataset).__name__}, {head}, forward={forward!r})"

    @property
    def num_images(self) -> int:
        """Return the number of source images."""
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def plain_dataset(self) -> Dataset[Any]:
        """Return the source images without augmentation."""
        return self.dataset if self.unaugmented is None else self.unaugmented

    def describe(self) -> dict[str, str]:
        """Return the options that decide what a run computes, as strings that a checkpoint can hold and compare."""
        return {
            "source images": str(self.num_images),
            "source head": "new" if self.head is None else "kept",
            "source batch_size": str(self.batch_size),
            "source labels": "unlisted" if (labels := known_labels(self.dataset)) is None else digest(labels),
            "source loss": value_of(self.loss),
            "source forward": self.forward if isinstance(self.forward, str) else value_of(self.forward),
            "source batchnorm": self.batchnorm,
            "source seed": str(self.seed),
            "source adapt": "None" if self.adapt is None else value_of(self.adapt),
            "source batch_hooks": str(self.batch_hooks),
        }

    @property
    def keeps_container(self) -> bool:
        """Return whether the kept head has more than its last layer, and so replaces more than that."""
        return self.head is not None and not isinstance(self.head, nn.Linear | nn.Conv2d)

    def make_head(self, target_head: nn.Module, target_path: str) -> nn.Module:
        """Return a head for one run: a copy of the pretrained one, or a new one drawn from `seed` alone.

        Raises:
            TransferConfigError: the kept head takes other features than the target head.
        """
        width = in_width(target_head)
        if self.head is None:
            with own_randomness(self.seed):
                new = nn.Linear(width, self.num_classes or 0)
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), new) if is_pooling(target_head) else new
        if in_width(self.head) != width:
            raise TransferConfigError(
                f"The source head takes {in_width(self.head)} features, the target head {target_path!r} takes {width}. "
                "Keep the classifier of the network that is being tuned, or name the module it replaces: head='...'."
            )
        kept = copy.deepcopy(self.head)
        return kept if has_linear(kept) else nn.Sequential(kept, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @property
    def has_class_labels(self) -> bool:
        """Return whether labels are class indices; another loss than cross-entropy may take other labels."""
        return self.loss is F.cross_entropy

    def check_labels(
        self, given: Tensor, num_classes: int, indices: Tensor, pending: PendingChecks | None = None
    ) -> Tensor:
        """Return labels (n,), below `num_classes`, of those given, or raise.

        Args:
            given: labels (n,) or (n, 1).
            num_classes: that the head has.
            indices: (n,), names of the samples.
            pending: takes the check, if its answer may be read later; until then a wrong label counts as a known one.
        """
        labels = class_numbers(given)
        if labels is None or (given.dtype == torch.bool and num_classes > 2):  # two classes are surely no and yes
            hint = label_hint(given, "adapt=lambda batch: (batch[0], {})")
            raise TransferConfigError(
                f"Source labels have shape {tuple(given.shape)} and type {given.dtype}; cross_entropy takes class "
                f"indices, (batch,) of integers. {hint} For another loss pass SourceTask(loss=)."
            )
        if pending is None and (not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
            return labels
        wrong = (labels < 0) | (labels >= num_classes)

        def error(labels: Tensor) -> TransferConfigError:
            where, largest = int(wrong.nonzero()[0]), int(labels.max())
            head, fix = "", ", and pass the labels in the head's order."
            if largest >= num_classes:
                fix += " If you called reset_classifier before from_timm, call it after."
            if self.head is None:
                more = f", or pass num_classes={largest + 1} if classes run to {largest}"
                head, fix = f" of num_classes={num_classes}", f"{more if largest >= num_classes else ''}."
            return TransferConfigError(
                f"Source sample {int(indices[where])} has label {int(labels[where])}; the source head{head} knows 0 to "
                f"{num_classes - 1}. Drop unlabelled samples{fix}"
            )

        if pending is None:
            raise error(labels)
        pending.refuse(wrong.any(), error, lambda: labels)
        return labels.clamp(0, num_classes - 1)  # on a GPU cross_entropy of an unknown label ends the process

    def check_all_labels(self, num_classes: int) -> None:
        """Check all labels at once if the dataset lists them; a listed label is checked as the dataset returns it."""
        labels = known_labels(self.dataset)
        are_read = self.has_class_labels and self.adapt is None
        if labels is None or not are_read or labels.ndim > 1 or labels.is_floating_point():
            return  # these labels are checked when their samples are drawn
        is_wrong, most = (labels < 0) | (labels >= num_classes), int(labels.max())
        if not is_wrong.any():
            found = f"num_classes={num_classes}, but source labels run to {most}. Pass num_classes={most + 1}."
            if self.head is None and 2 * (most + 1) < num_classes:  # by chance a subset may lack a few
                warnings.warn(found, stacklevel=2)
            return
        looked = torch.stack([is_wrong.nonzero()[0, 0], labels.argmax()]).unique()  # the first, and the largest label
        given = labels[looked].clone()  # the list may be the dataset's own memory
        for place, index in enumerate(looked.tolist()):
            with contextlib.suppress(Exception):  # a sample that cannot be read raises when it is drawn
                sample = apart(partial(load, self.dataset, index, of="source"), self.num_workers)
                given[place] = sample[1] if len(sample) == 2 else 0  # of three entries, `adapt` is asked for when drawn
        self.check_labels(given, num_classes, looked)

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels of a collated source batch.

        Raises:
            TransferConfigError: the batch has another nesting; the message shows it.
        """
        given = batch
        if self.adapt is not None:
            try:
                batch = self.adapt(given)
            except Exception as error:
                error.add_note(f"This happened in SourceTask(adapt=) with a source batch {nesting(given)}.")
                raise
        if (
            not isinstance(batch, tuple | list)
            or len(batch) != 2
            or not all(isinstance(part, Tensor) for part in batch)
        ):
            raise TransferConfigError(f"A source batch is {nesting(given)}; expected (images, labels). {_where(given)}")
        return batch[0], batch[1]


def _where(batch: Any) -> str:
    """Return the fix that extracts images and labels from a batch, as far as its nesting shows them."""
    made = "SourceTask(adapt=lambda batch: (batch[0], batch[{}]))"
    if len(places := label_places(batch)) > 1:
        return either(places, made)
    made = made.format(*places) if places else f"SourceTask(adapt=lambda batch: {_ends(batch)})"
    return f"Extract them: {made}."


def _ends(batch: Any) -> str:
    """Return the expression that extracts images and labels if a batch has at most one column of whole numbers."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
        is_pair = isinstance(batch[1], tuple | list) and all(isinstance(part, Tensor) for part in batch[1])
        labels = "batch[1][0]" if is_pair else "torch.tensor([NUMBERS[name] for name in batch[1]])"
        return f"(batch[0], {labels})"
    return "(batch[0], batch[1])" if isinstance(batch, tuple | list) else "(batch['image'], batch['label'])"
