"""Convolutions that spend no backward on filters whose gradient is zero (ours).

As a rule those are the tuned filters that no image of a batch takes, and the frozen ones that all of them leave: gates
of one batch are much alike.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NUM_ARGUMENTS = 7  # in their places, as layers call torch's convolution
WORTH = 0.9  # of the filters: if more have a gradient, choosing costs more than it saves


def respond(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """What a convolution gives, with its own gradients, of finite numbers, and a backward that may cost less.

    A GPU would have to wait to know which filters are left, so there, and in a traced graph, it runs as it is.
    """
    is_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if features.device.type != "cpu" or is_graph or not torch.is_grad_enabled():
        return conv(features)  # type: ignore[no-any-return]
    if torch.is_inference_mode_enabled():  # in which a forward of the user's has enabled gradients
        return conv(features)  # type: ignore[no-any-return]
    with _Sparing():
        return conv(features)  # type: ignore[no-any-return]


class _Sparing(TorchFunctionMode):
    """Takes the place of torch's convolution, wherever a layer, its hooks or its own forward call it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and len(args) == NUM_ARGUMENTS:
            return _conv2d(*args)
        return func(*args, **(kwargs or {}))


def _conv2d(features: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    *shape, groups = how
    tensors = [features, weight] if bias is None else [features, weight, bias]
    is_usual = features.ndim == 4 and features.is_floating_point() and all(isinstance(each, tuple) for each in shape)
    is_dear = groups == 1 and weight.shape[2:] != (1, 1)  # else choosing filters costs what leaving some out saves
    if is_usual and is_dear and not torch._C._len_torch_function_stack() and _are_plain(*tensors):
        return _Conv2d.apply(features, weight, bias, shape)  # type: ignore[no-any-return]
    return torch.conv2d(features, weight, bias, *how)


def _are_plain(*tensors: Tensor) -> bool:
    """Whether nobody stands between tensors and torch: no classes of others, no transforms, no autocast."""
    is_changed = torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu")
    is_own = all(type(each) in (Tensor, nn.Parameter) for each in tensors)
    return is_own and not is_changed and not any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.shape = shape  # stride, padding, dilation
        return torch.conv2d(features, weight, bias, *shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, weight = ctx.saved_tensors
        of_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        mask = (*ctx.needs_input_grad[:2], False)

        def passed(grad: Tensor, weight: Tensor) -> Any:
            arguments = (None, *ctx.shape, False, (0, 0), 1, mask)
            return torch.ops.aten.convolution_backward(grad, features, weight, *arguments)[:2]

        is_more = torch.is_grad_enabled() or not _are_plain(grad)  # a second derivative, or several gradients at once
        places = None if is_more else grad.abs().sum((2, 3)).sum(0).nonzero()[:, 0]
        if places is None or len(places) > WORTH * len(weight):
            return *passed(grad, weight), of_bias, None
        if not len(places):
            of_features = torch.zeros_like(features) if mask[0] else None
            return of_features, torch.zeros_like(weight) if mask[1] else None, of_bias, None
        of_features, of_some = passed(grad.index_select(1, places), weight.index_select(0, places))
        of_weight = torch.zeros_like(weight).index_add_(0, places, of_some) if mask[1] else None
        return of_features, of_weight, of_bias, None
