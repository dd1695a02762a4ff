"""Compute a hard choice that has a gradient, and the mix of two responses by it (AdaFilter, arXiv 1911.09659).

x_{i+1} = act(g * BN^F(F_i x) + (1 - g) * BN^S(S_i x)); the paper gives the idea, the estimators are ours.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_transfer.errors import TransferConfigError, check_choice

Estimator = Literal["straight_through", "semantic_hashing", "gumbel"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def straight_through_gate(
    logits: Tensor, *, estimator: Estimator = "straight_through", temperature: float = 1.0, training: bool = True
) -> Tensor:
    """Return 1 for each positive logit and 0 for the others, with the gradient of a soft gate.

    "straight_through" uses the gradient of sigmoid(logits). "semantic_hashing" adds Gaussian noise to the logits and
    uses the gradient of a stretched sigmoid, 1.2 sigmoid - 0.1 clipped to [0, 1] (Kaiser and Bengio, arXiv 1801.09797,
    who also mix in soft codes; this does not). "gumbel" adds logistic noise and uses the gradient of
    sigmoid((logits + noise) / temperature) (binary concrete, arXiv 1611.00712). No noise is added outside training.

    Args:
        logits: any shape.
        estimator: whose gradient is used.
        temperature: of "gumbel": the lower, the steeper the sigmoid.
        training: whether noise is added.

    Returns:
        Zeros and ones, of the logits' shape and dtype.

    Raises:
        TransferConfigError: the estimator is not known, or the temperature is not positive.

    Example:
        >>> logits = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> gates = straight_through_gate(logits)
        >>> gates.sum().backward()
        >>> gates.detach(), logits.grad
        (tensor([0., 0., 1.]), tensor([0.1966, 0.2500, 0.1050]))
    """
    check_choice("estimator", estimator, ESTIMATORS)
    if not temperature > 0:
        raise TransferConfigError(f"temperature={temperature!r}; it takes a positive number.")
    if training and estimator == "semantic_hashing":
        logits = logits + torch.randn_like(logits)
    elif training and estimator == "gumbel":
        uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)
        logits = logits + uniform.logit()
    soft = (logits / temperature if estimator == "gumbel" else logits).sigmoid()
    if estimator == "semantic_hashing":
        soft = (1.2 * soft - 0.1).clamp(0, 1)
    return (logits > 0).to(logits.dtype) + (soft - soft.detach())


def mix_filters(tuned: Tensor, frozen: Tensor, gates: Tensor, *, hard: bool = False) -> Tensor:
    """Return g * tuned + (1 - g) * frozen: for each filter the tuned response, the frozen one, or a mix.

    Args:
        tuned: (B, C, ...) responses.
        frozen: (B, C, ...) responses.
        gates: (B, C) in [0, 1], or (C,) for all images.
        hard: whether to round the gates to 0 or 1; only one byte of each is then saved for backward.

    Returns:
        (B, C, ...); exactly one of the two responses if a gate is 0 or 1.

    Example:
        >>> tuned, frozen = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
        >>> mix_filters(tuned, frozen, torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]))[:, :, 0, 0]
        tensor([[1.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """
    gates = gates.reshape(*(gates.shape if gates.ndim > 1 else (1, -1)), *[1] * (tuned.ndim - 2))
    mixed: Tensor = _Mix.apply(tuned, frozen, gates.to(tuned.dtype), hard)
    return mixed


class _Mix(torch.autograd.Function):
    """Mixes two responses; it saves one difference for backward, while torch.lerp saves both responses."""

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, frozen: Tensor, gates: Tensor, hard: bool) -> Tensor:
        difference = tuned - frozen if ctx.needs_input_grad[2] else None
        gates = gates.round() if hard else gates
        ctx.save_for_backward(difference, gates > 0 if hard else gates)
        # exact at both ends for finite responses; torch.where takes five times as long
        return torch.lerp(frozen, tuned, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        difference, gates = ctx.saved_tensors
        of_tuned = grad * gates.to(grad.dtype)
        of_gates = (grad * difference).sum_to_size(gates.shape) if ctx.needs_input_grad[2] else None
        return of_tuned, grad - of_tuned, of_gates, None
