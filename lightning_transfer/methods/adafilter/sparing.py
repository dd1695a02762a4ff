"""A convolution that spends no backward on filters that no image took (ours): their gradients are zero.

Gates of images of one batch are much alike, so about a third of the filters are taken by all of them or by none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WORTH = 0.9  # of the filters: if more of them are taken, choosing costs more than it saves


def respond(conv: nn.Conv2d, features: Tensor, taken: Tensor | None) -> Tensor:
    """What a convolution gives, all of it; a backward that leaves out what it can, to the same gradients.

    Args:
        conv: any.
        features: (B, C, H, W) that it takes.
        taken: (B, filters), not zero where the gradient of a response may be other than zero; None for everywhere.
    """
    if taken is None or not _is_sparable(conv, features):
        return conv(features)  # type: ignore[no-any-return]
    response: Tensor = _Sparing.apply(features, conv.weight, conv.bias, taken.any(0), conv)
    return response


def _is_sparable(conv: nn.Conv2d, features: Tensor) -> bool:
    """Whether nothing but a plain convolution runs, on a CPU: a GPU would have to wait to know what is left."""
    is_plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros"
    is_dear = conv.kernel_size != (1, 1)  # of one pixel, choosing filters costs what leaving some out saves
    hooks = conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks
    is_itself = is_plain and not isinstance(conv.padding, str) and not any(hooks) and "forward" not in vars(conv)
    is_eager = features.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_dear and is_itself and is_eager and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class _Sparing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, taken: Tensor, conv: Any) -> Tensor:
        ctx.save_for_backward(features, weight, taken)
        ctx.how = conv.stride, conv.padding, conv.dilation
        return F.conv2d(features, weight, bias, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, weight, taken = ctx.saved_tensors
        of_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        mask, places = (*ctx.needs_input_grad[:2], False), taken.nonzero()[:, 0]

        def passed(grad: Tensor, weight: Tensor) -> Any:
            arguments = (None, *ctx.how, False, (0, 0), 1, mask)
            return torch.ops.aten.convolution_backward(grad, features, weight, *arguments)[:2]

        if not 0 < len(places) < WORTH * len(taken):
            return *passed(grad, weight), of_bias, None, None
        of_features, of_some = passed(grad.index_select(1, places), weight.index_select(0, places))
        of_weight = None if of_some is None else torch.zeros_like(weight).index_add_(0, places, of_some)
        return of_features, of_weight, of_bias, None, None
