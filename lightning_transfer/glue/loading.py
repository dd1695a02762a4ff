"""Load a checkpoint into a new module of the user's class, also one of a network with changed layers."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue.checkpoints import KEY, read_checkpoint, read_layers
from lightning_transfer.stamps import unstamped

T = TypeVar("T")


def load_from_checkpoint(cls: type[T], path: str | os.PathLike[str], **kwargs: Any) -> T:
    """Load a checkpoint, also one of a network whose layers this package has changed.

    Such layers are changed in the new module in the same way, before `cls.load_from_checkpoint` loads the weights.

    Args:
        cls: the user's LightningModule class.
        path: the checkpoint.
        kwargs: passed to `cls.load_from_checkpoint`. `weights_only=False` reads any object, such as a network in the
            hyperparameters, and runs any code in the file: only for files that you made, or whose maker you trust.

    Raises:
        TransferConfigError: the file is not a checkpoint, or another version of this package wrote it.

    Example:
        >>> import lightning as L, pathlib, tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_transfer.callbacks import GatedTransfer
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> gated = GatedTransfer(head="layer")
        >>> trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=gated, enable_checkpointing=False, **quiet)
        >>> trainer.fit(BoringModel())
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.ckpt")
        >>> trainer.save_checkpoint(path)
        >>> type(load_from_checkpoint(BoringModel, path).layer).__name__
        'GatedHead'
    """
    if not isinstance(cls, type) or not hasattr(cls, "load_from_checkpoint"):
        raise TransferConfigError(
            f"The first argument is {cls!r:.80}; expected your LightningModule class, and then the file: "
            "lightning_transfer.load_from_checkpoint(LitModel, 'run.ckpt')."
        )
    checkpoint = read_checkpoint(path, weights_only=kwargs.get("weights_only") is not False)
    if KEY in checkpoint:
        unstamped(checkpoint[KEY])
    with ExitStack() as hooks:
        for each in {cls, _class_named(cls, checkpoint)}:
            hooks.enter_context(_reading_layers(each))
        loaded: T = cls.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    return loaded


def _class_named(cls: Any, checkpoint: dict[str, Any]) -> Any:
    """Return the class that a checkpoint's hyperparameters name, as LightningCLI saves it, or the given class.

    Lightning builds one or the other; it depends on the arguments that the given class takes.
    """
    saved = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY)
    home, _, name = str(saved.get("_class_path") if isinstance(saved, Mapping) else "").rpartition(".")
    named = getattr(sys.modules.get(home), name, None)  # Lightning builds imported classes only
    return named if isinstance(named, type) and issubclass(named, cls) else cls


@contextmanager
def _reading_layers(cls: Any) -> Iterator[None]:
    """Let a class's `on_load_checkpoint` rebuild changed layers first, before Lightning loads the weights.

    A subclass would not do: LightningCLI's checkpoints name the class to build.
    """
    name = "on_load_checkpoint"
    hook, own = getattr(cls, name, None), vars(cls).get(name)

    def with_layers(self: Any, checkpoint: dict[str, Any]) -> None:
        read_layers(self, checkpoint)
        if hook is not None:
            hook(self, checkpoint)

    setattr(cls, name, with_layers)
    try:
        yield
    finally:
        delattr(cls, name) if own is None else setattr(cls, name, own)
