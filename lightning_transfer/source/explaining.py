"""What to write if images alone do not run through a user's module."""

from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.roles import Head, find_backbone

FORWARD = "Say how images run: SourceTask(forward=lambda module, images: {})."
MISUSE = (TypeError, ValueError, LookupError, AttributeError)  # of a forward that takes a batch, or more than images


def explain_joint(error: BaseException, network: nn.Module, num_target: int, num_source: int) -> None:
    """Name the cure of an error that came while source images were among the user's in a network."""
    if not isinstance(error, TransferConfigError):
        error.add_note(
            f"This happened in {type(network).__name__} while it ran {num_target} target and {num_source} source "
            "images in one pass. If its code counts on the target's images alone, such as a mask or a memory of the "
            "batch's size, run the source in a pass of its own: SourceTask(forward='separate')."
        )


def explain(error: Exception, module: nn.Module, head: Head, images: Tensor, *, how: str = FORWARD) -> None:
    """Name the cure of an error that came while images alone ran through a module's forward.

    Args:
        error: gets a note, unless it is one that a forward of other arguments raises.
        module: the user's.
        head: its head.
        images: that ran.
        how: what to write, with a place for the call.

    Raises:
        TransferConfigError: the forward seems to take something else.
    """
    if isinstance(error, TransferConfigError):
        return
    try:
        path = head.network_path if head.network_path != head.path else find_backbone(module, head)[0]
    except TransferConfigError:  # several parts may be what images enter
        path = "backbone"
    line = how.format(f"module.{path}(images)")
    if isinstance(error, MISUSE):
        found = f"{type(module).__name__}.forward does not run on images alone ({type(error).__name__}: {error})"
        raise TransferConfigError(f"{found}. {line}") from error
    error.add_note(f"{tuple(images.shape)} images ran alone. If the module's forward takes more: {line}")
