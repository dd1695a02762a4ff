"""Fit the weight and bias with which a head's last Linear gives the scores of a linear probe."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.linear import fit_linear
from lightning_transfer.probing import choose_penalty


class Start(NamedTuple):
    """Holds rows of a Linear, and the values that they start with.

    Attributes:
        rows: of the classes that have images.
        weight: (rows, D).
        bias: (rows,).
        penalty: of the probe.
        accuracy: of probes with that penalty on images that were held out from them.
    """

    rows: list[int]
    weight: Tensor
    bias: Tensor
    penalty: float
    accuracy: float


def fit_start(
    features: Tensor,
    labels: Tensor,
    *,
    num_outputs: int,
    groups: Sequence[Any] | None = None,
    importance: Tensor | None = None,
) -> Start:
    """Fit a linear probe, by a penalty that is chosen by cross-validation.

    Args:
        features: (n, D) that the Linear takes.
        labels: (n,) class numbers.
        num_outputs: of the Linear; one output is the score of class 1 over class 0.
        groups: what each image belongs to; images of one group are held out together.
        importance: (n,) of each image's loss; 1 if left out.

    Raises:
        TransferConfigError: most outputs have no images, or all images are of one group.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.0], [10.0]])
        >>> start = fit_start(features, torch.tensor([0, 0, 0, 2, 2, 2]), num_outputs=3)
        >>> start.rows, start.weight.shape, start.accuracy
        ([0, 2], torch.Size([2, 1]), 1.0)
    """
    rows, numbers = labels.unique(return_inverse=True)
    num_classes = max(num_outputs, 2)
    if len(rows) < 2 or 2 * len(rows) < num_classes:
        raise TransferConfigError(
            f"The labels of {len(labels)} training images name {len(rows)} of the {num_classes} classes of the head; a "
            "probe needs at least two, and half of all. If the pretrained classifier was kept, replace it, in timm by "
            "network.reset_classifier(num_classes). Otherwise name the classifier, ProbeStart(head='...'), "
            "list the labels of a large dataset as dataset.targets, so that images of every class are drawn, or leave "
            "ProbeStart out."
        )
    shared: dict[str, Any] = {"num_classes": len(rows), "importance": importance}
    choice = choose_penalty(features, numbers, groups=groups, **shared)
    weight, bias = fit_linear(features, numbers, penalty=choice.penalty, by_feature=False, **shared)
    if num_outputs == 1:
        return Start([0], weight[1:] - weight[:1], bias[1:] - bias[:1], *choice)
    return Start(rows.tolist(), weight, bias, *choice)
