"""Join the losses of two tasks, as soft fine-tuning does (arXiv 1909.02236).

That the source loss is kept and removed softly is the paper's; the formula is ours:
L = CE(h_t(f(x_t)), y_t) + w * CE(h_s(f(x_s)), y_s).
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_transfer.errors import check_choice, check_number

Mix: TypeAlias = Literal["add", "convex"]


def joint_loss(target_loss: Tensor, source_loss: Tensor, *, weight: float, mix: Mix = "add") -> Tensor:
    """Join the losses of two tasks, each a mean over its own images.

    Args:
        target_loss: scalar.
        source_loss: scalar.
        weight: of the source loss, as `anneal` gives it.
        mix: "add" gives target + weight * source, "convex" gives (1 - weight) * target + weight * source.

    Raises:
        TransferConfigError: `mix` is not known, or a convex mix has a weight above 1.

    Example:
        >>> import torch
        >>> joint_loss(torch.tensor(2.0), torch.tensor(4.0), weight=0.25).item()
        3.0
        >>> joint_loss(torch.tensor(2.0), torch.tensor(4.0), weight=0.25, mix="convex").item()
        2.5
    """
    check_choice("mix", mix, get_args(Mix))
    if mix == "convex":
        check_number("weight", weight, most=1)
        target_loss = (1.0 - weight) * target_loss
    return target_loss + weight * source_loss


def fix_for_a_sum(mix: Mix) -> str:
    """Return what to do if the step's own loss has to stay a sum over its images."""
    return "pass weight= times the batch size" if mix == "add" else "use mix='add' with a larger weight="


def sum_of_zeros(part: nn.Module) -> Tensor:
    """Return zero with every parameter of a part in its graph: in every step DDP waits for the gradient of each."""
    return sum((0.0 * param.sum() for param in part.parameters() if param.requires_grad), torch.zeros(()))
