"""What every state of this package begins with, and the refusal of one that is of another form."""

from typing import Any

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.version import __version__

FORMAT = 1  # raised when a reader of the old form would go wrong
BEGIN_ANEW = (
    "To begin a new run from its weights, load them and fit without ckpt_path: "
    "trainer.fit(lightning_transfer.load_from_checkpoint(YourModule, path), ...)."
)


def stamp() -> dict[str, Any]:
    """The form and the version that writes it."""
    return {"format": FORMAT, "version": __version__}


def check_stamp(state: dict[str, Any]) -> None:
    """Refuse a state that another version of this package wrote in a form that this one cannot read.

    Raises:
        TransferConfigError: naming both versions.
    """
    if state["format"] != FORMAT:
        raise TransferConfigError(
            f"This checkpoint was written by lightning_transfer {state['version']} (format {state['format']}); this is "
            f"{__version__} (format {FORMAT}). Install that version. {BEGIN_ANEW}"
        )
