"""Show the fix if a user's module does not run on images alone."""

from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.networks import find_backbone
from lightning_transfer.roles import Head

FORWARD = "Say how images run: SourceTask(forward=lambda module, images: {})."
MISUSE = (TypeError, ValueError, LookupError, AttributeError)  # of a forward that takes a batch, or more than images


def explain_joint(error: BaseException, network: nn.Module, num_target: int, num_source: int) -> None:
    """Add the fix to an error that was raised while a network ran source and target images in one pass."""
    if not isinstance(error, TransferConfigError):
        error.add_note(
            f"This happened in {type(network).__name__} while it ran {num_target} target and {num_source} source "
            "images in one pass. If its code counts on the target's images alone, such as a mask or a memory of the "
            "batch's size, run the source in a pass of its own: SourceTask(forward='separate')."
        )


def explain(error: Exception, module: nn.Module, head: Head, images: Tensor, *, how: str = FORWARD) -> None:
    """Add the fix to an error that was raised while a module's forward ran on images alone.

    Args:
        error: gets a note, unless its type suggests that the forward takes other arguments.
        module: the user's module.
        head: its head.
        images: the images that ran.
        how: the fix, with a place for the call.

    Raises:
        TransferConfigError: the forward seems to take something else.
    """
    if isinstance(error, TransferConfigError):
        return
    try:
        path = head.network_path if head.network_path != head.path else find_backbone(module, head)[0]
    except TransferConfigError:  # images may enter several parts
        path = "backbone"
    line = how.format(f"module.{path}(images)")
    if isinstance(error, MISUSE):
        found = f"{type(module).__name__}.forward does not run on images alone ({type(error).__name__}: {error})"
        raise TransferConfigError(f"{found}. {line}") from error
    error.add_note(f"{tuple(images.shape)} images ran alone. If the module's forward takes more: {line}")
