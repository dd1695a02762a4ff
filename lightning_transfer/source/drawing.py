"""Draw the source images of a run, one batch in each step, and continue where a resumed run stopped."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_transfer.errors import TransferConfigError
from lightning_transfer.glue import optimizers
from lightning_transfer.glue.batch_hooks import check_unmixed, has_hooks
from lightning_transfer.glue.loaders import source_workers, train_batch_size
from lightning_transfer.glue.logs import say
from lightning_transfer.glue.moving import to_device
from lightning_transfer.glue.part import TransferPart
from lightning_transfer.pending import PendingChecks
from lightning_transfer.source.redrawing import digests_of, redrawn
from lightning_transfer.source.stream import Order, Shuffled, SourceStream
from lightning_transfer.source.task import SourceTask
from lightning_transfer.stamps import BEGIN_ANEW


class Drawing:
    """Draws batches for one source task; the stream is opened for the first batch.

    Args:
        source: the task.
        num_classes: of its head.
    """

    def __init__(self, source: SourceTask, num_classes: int) -> None:
        self.source = source
        self.num_classes = num_classes
        self.batch: tuple[Tensor, Tensor, Tensor] | None = None  # of this step: images, labels, indices
        self._order: Order | None = None
        self._stream: SourceStream | None = None
        self._last: tuple[int, int, int] | None = None
        self._position = 0
        self._first: list[str] = []  # digests of the first samples of this run; a chooser checks its own images

    @property
    def position(self) -> int:
        """Return how many images were drawn, in all processes."""
        return self._position if self._stream is None else self._stream.position

    @property
    def is_at_first_batch(self) -> bool:
        """Return whether only one batch was drawn in this run."""
        stream = self._stream
        return stream is not None and stream.position == stream.batch_size * stream.num_ranks

    def seek(self, position: int) -> None:
        """Continue, or begin, at a position."""
        self.close()
        self._position, self._last, self._first = position, None, []

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"position": self.position, "first": self._first}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where a run stopped."""
        self.seek(state["position"])
        self._first = state.get("first", [])

    def follow(self, order: Order) -> None:
        """Draw in this order from now on."""
        if order is not self._order:
            self.close()
            self._order = order

    def say_who_reads(self, trainer: Any) -> None:
        """Log that source images have as many workers as the train loader, if nothing else was given."""
        if self.source.num_workers is None and (num := source_workers(None, trainer)["num_workers"]):
            say(trainer, f"Source images have {num} workers, as many as the train loader.")

    def draw(self, trainer: Any, part: TransferPart) -> Tensor:
        """Draw a batch, move it to the device and return its images; the labels are kept until the pass is done."""
        draw = trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        if draw == self._last:
            raise TransferConfigError(
                "The training step asked for a second source batch in one step: the optimizer runs its closure twice, "
                "or joint_loss was called twice. Use another optimizer, or call joint_loss once in each step."
            )
        self._last = draw
        if self._stream is None:
            self._stream = self._open(trainer, part)
        elif (size := self.batch_size(trainer)) != self._stream.batch_size:  # of a reloaded train loader
            self._stream.close()
            self._stream.batch_size = size
        indices, samples = self._stream.next_batch()
        if self.is_at_first_batch and self._order is None and trainer.is_global_zero:
            self._first = digests_of(samples)
        is_class, hooks = self.source.has_class_labels, self.source.batch_hooks and has_hooks(trainer)
        is_as_collated = self.source.adapt is None and not hooks
        if is_class and is_as_collated:
            images, labels = self.source.unpack(samples)
            samples = images, self._checked(labels, indices, None if labels.is_cpu else part.pending)
        were_set: dict[str, Any] = {}
        moved = to_device(trainer, samples, hooks=hooks, were_set=were_set)
        images, labels = self.source.unpack(moved)
        check_unmixed(were_set, (samples, moved), len(images))
        if is_class and not is_as_collated:
            labels = self._checked(labels, indices, part.pending)
        self.batch = images, labels, indices
        return images

    def _checked(self, labels: Tensor, indices: Tensor, pending: PendingChecks | None) -> Tensor:
        return self.source.check_labels(labels, self.num_classes, indices, pending)

    def _open(self, trainer: Any, part: nn.Module) -> SourceStream:
        """Open a stream for this fit, after checking that its loss can be trained."""
        optimizers.check_kind(trainer.optimizers)
        optimizers.check_held(trainer, part)
        workers = source_workers(self.source.num_workers, trainer)
        self._check_same(trainer, workers)
        stream = SourceStream(
            self.source,
            batch_size=self.batch_size(trainer),
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            order=self._order,
            workers=workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        stream.seek(self._position)
        return stream

    def _check_same(self, trainer: Any, workers: Mapping[str, Any]) -> None:
        """Refuse to resume with a source whose samples differ from those that the run began with.

        Raises:
            TransferConfigError: samples differ; the message names those that were read again.
        """
        if not self._first:
            return
        found = redrawn(self.source, len(self._first), workers)
        if not found:
            say(
                trainer,
                "Source samples differ when they are read again, because their random augmentation does not follow "
                "the seed, so it cannot be checked whether the source is the one that this run began with.",
            )
        elif found != self._first:
            order = Shuffled(self.source.num_images, self.source.seed)
            drawn = order(range(len(found)))
            others = [index for index, now, then in zip(drawn, found, self._first, strict=True) if now != then]
            raise TransferConfigError(
                f"The source has changed since this run began, or is in another order: samples {others} differ now. "
                f"Pass the same images in the same order. {BEGIN_ANEW}"
            )

    def batch_size(self, trainer: Any) -> int:
        """Return the number of source images in a step; by default as many as target images."""
        return self.source.batch_size or train_batch_size(trainer)

    def close(self) -> None:
        """Close the stream and its workers; the position is kept."""
        if self._stream is not None:
            self._position = self._stream.position
            self._stream.close()
            self._stream = None
