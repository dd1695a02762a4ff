"""Record the calls of torch's criteria in the user's code, however they are named or wrapped there."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

CRITERIA = ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy")
RESHAPING = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "ToCopy", "Clamp")  # names of graph nodes


class CriterionCall(NamedTuple):
    """Holds a call of one of torch's criteria.

    Attributes:
        name: of the function.
        scores: (n, classes, ...), or (n,) of one output.
        target: of the scores.
        ignored: the class number that is left out.
        maker: the name of the operation that made the scores; "" if they have no gradient.
        error: that the call raised, or None.
    """

    name: str
    scores: Tensor
    target: Tensor
    ignored: int
    maker: str
    error: Exception | None


class Listening(TorchFunctionMode):
    """Records calls of criteria inside its context."""

    def __init__(self, calls: list[CriterionCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        kwargs, tensors = kwargs or {}, [each for each in args[:2] if isinstance(each, Tensor)]
        if getattr(func, "__name__", "") not in CRITERIA or len(tensors) < 2:  # it raises of other things
            return func(*args, **kwargs)
        scores, target = tensors
        ignored, error = kwargs.get("ignore_index", -100), None
        try:
            return func(*args, **kwargs)
        except Exception as raised:
            error = raised
            raise
        finally:
            maker = _maker(scores)
            self.calls.append(CriterionCall(func.__name__, scores.detach(), target.detach(), ignored, maker, error))


def _maker(scores: Tensor) -> str:
    """Return the name of the operation that made a tensor, before it was reshaped or cast."""
    node: Any = scores.grad_fn
    while node is not None and node.name().startswith(RESHAPING):
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name())
