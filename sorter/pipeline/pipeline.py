"""The way of every photo: decode, batch, classify, decide, move, overlapped.

In: settled `Photo`s, through `submit`. Out: one `Outcome` for each, through `outcomes`.

    submit → decoders (processes) → [Batcher] → ClassifyStage (threads) → [MoveStage (a thread)] → outcomes

The brackets have queues. Decoded photos are bounded by the rows of shared memory, so a slow stage holds up the ones
before it, and memory is the same for ten photos and for a million. A photo that cannot be decoded bypasses the engine:
its failure never touches the other photos of its batch.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from sorter.decisions import Outcome
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits
from sorter.files.photo import Photo
from sorter.history.store import History, Run
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover
from sorter.pipeline.batcher import Batcher
from sorter.pipeline.classify_stage import ClassifyStage
from sorter.pipeline.measures import Measures
from sorter.pipeline.model_in_use import ModelInUse
from sorter.pipeline.move_stage import MoveStage
from sorter.pipeline.stages import Failure, Stages
from sorter.settings import Settings


class Pipeline(Stages):
    """The running stages. Used by one thread, the service's loop; built by `start`.

    Attributes:
        model: decides on the next batches.
    """

    def __init__(
        self,
        model: ModelInUse,
        decoders: Decoders,
        batcher: Batcher,
        classifying: Sequence[ClassifyStage],
        moving: MoveStage,
        failure: Failure,
    ) -> None:
        super().__init__(moving, failure)
        self.model = model
        self._decoders, self._batcher = decoders, batcher
        self._classifying = classifying
        self._classify_threads = [self._thread("classify", stage.run) for stage in classifying]
        self._move_thread = self._thread("move", moving.run)
        self._stopped = self._closed = False

    @classmethod
    def start(
        cls,
        model: ModelInUse,
        mover: Mover,
        history: History | None,
        settings: Settings,
        workers: int,
        on_moved: Callable[[Sequence[Outcome]], None] = lambda _: None,
        measures: Measures | None = None,
        sorted_again: str | None = None,
    ) -> Self:
        """Start the decoder processes and the threads of the other stages.

        Args:
            model: classifies, in `engine.concurrency` threads, until `replace_model`.
            mover: moves; used by one thread only.
            history: records; used by that thread only; None for a dry run.
            settings: batch size, waiting time, limits.
            workers: decoder processes.
            on_moved: called with what was moved of each batch, in the mover's thread, which it must not hold up.
            measures: receives how long each step took.
            sorted_again: the folder that is the inbox, where that is `unsure` or `failed`.
        """
        failure, measures = Failure(), measures or Measures()
        concurrency, seen = model.engine.concurrency, model.manifest.input
        batcher = Batcher(
            batch_size=settings.batch_size,
            max_wait_seconds=float("inf") if settings.once else settings.max_wait_ms / 1000,
            # A photo that crashes or hangs its decoder is tried twice.
            decode_seconds=2 * settings.decode_timeout_seconds,
            stopping=failure.stopping,
        )
        # Those in the engine, one batch that is ready and one that is being filled, so that no stage waits for rows.
        rows = (concurrency + 2) * settings.batch_size + workers
        decoders = Decoders(
            workers=workers,
            rows=rows,
            preprocessing=seen.preprocessing,
            limits=Limits(settings.max_megapixels, settings.max_jpeg_megapixels),
            max_bytes=int(settings.max_megabytes * 1e6),
            timeout_seconds=settings.decode_timeout_seconds,
            deliver=batcher.put,
            fail=failure.record,
            on_progress=batcher.decoding.progress,
        )
        patient = not settings.once
        batch_mover = BatchMover(mover, history, patient=patient, stopping=failure.stopping, flat=settings.flat)
        moving = MoveStage(batch_mover, on_moved, measures)
        classifying = [
            ClassifyStage(
                model,
                catch_neither=settings.catch_neither,
                pixels=np.frombuffer(decoders.pixels, np.uint8).reshape(rows, seen.size, seen.size, 3),
                release=decoders.release,
                batcher=batcher,
                moving=moving,
                measures=measures,
                stopping=failure.stopping,
                sorted_again=sorted_again,
            )
            for _ in range(concurrency)
        ]
        pipeline = cls(model, decoders, batcher, classifying, moving, failure)
        for thread in (*pipeline._classify_threads, pipeline._move_thread):
            thread.start()
        return pipeline

    def replace_model(self, model: ModelInUse) -> None:
        """Classify with another model from the next batches on, and close the one before; from any one thread.

        Each decision names the run of its model, whatever is decided, moved and recorded meanwhile.

        Args:
            model: of the same classes and the same input as the one before.
        """
        before, self.model = self.model, model
        for stage in self._classifying:
            stage.replace_model(model)
        before.engine.close()

    @property
    def run(self) -> Run:
        """The present one, of the model in use."""
        return self.model.run

    @property
    def backlog(self) -> bool:
        """True while more photos are about to be submitted: batches are then filled, however long that takes."""
        return self._batcher.backlog

    @backlog.setter
    def backlog(self, value: bool) -> None:
        self._batcher.backlog = value

    @property
    def blocked(self) -> str | None:
        """Why nothing can be moved at present, while that is so."""
        return self._moving.blocked

    @property
    def hung(self) -> bool:
        """Whether a stage takes longer for one step than any healthy one; waiting for space on the disk is healthy.

        A step may take a minute, and in addition the decoders' timeout, a second for each photo of a batch, or a
        second for each megabyte of a photo that is moved.
        """
        classifying = (stage.deadline for stage in self._classifying)
        return any(deadline.is_overdue for deadline in (self._batcher.decoding, *classifying, self._moving.deadline))

    def waiting(self) -> dict[str, int]:
        """How many photos are in each stage or wait for it."""
        return {
            "decode": self._batcher.decoding.in_hand,
            "classify": self._batcher.waiting,
            "move": self._moving.waiting,
        }

    def submit(self, photo: Photo, *, timeout_seconds: float = 0.2) -> bool:
        """Hand over one photo; False if the stages had no space for it in time.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        self._failure.raise_error()
        self._batcher.expect()
        if not self._decoders.submit(photo, timeout_seconds=timeout_seconds):
            self._batcher.cancel()
            return False
        self.in_flight += 1
        return True

    def stop(self) -> None:
        """Finish the current batch and forget the photos that are not classified yet; idempotent.

        The mover goes on until `close`, for the sidecars of what it moves.
        """
        if self._stopped:
            return
        self._stopped = True
        self._failure.stopping.set()
        self._decoders.close()
        self._batcher.close()
        for thread in self._classify_threads:
            thread.join()

    def close(self) -> None:
        """Stop, and end the mover too; idempotent."""
        if self._closed:
            return
        self.stop()
        self._closed = True
        self._moving.close()
        self._move_thread.join()

    def _thread(self, name: str, stage: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._failure.guard, args=(stage,), name=name, daemon=True)
