"""The way of every photo: decode, batch, classify, decide, move, overlapped.

In: settled `Photo`s, through `submit`. Out: one `Outcome` for each, through `outcomes`.

    submit → decoders (processes) → [decoded] → engine (threads) → [decided] → mover (a thread) → [outcomes]

The brackets are queues; decoded photos are bounded by the rows of shared memory, so a slow stage holds up the ones
before it and memory stays the same for ten photos and for a million. A photo that cannot be decoded passes the engine
by: its failure never touches the batch of the others.
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.decisions import Decision, Outcome, complete_after, decide
from sorter.decoding.decoded import Decoded
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits
from sorter.files.photo import Photo
from sorter.history.store import FAILED, History
from sorter.moving.batch_mover import NEVER, STEP_SECONDS, BatchMover
from sorter.moving.mover import Mover
from sorter.settings import Settings

_MOST_DECIDED = 2


class Measures:
    """What the stages tell of themselves; nobody listens here."""

    def decoded(self, seconds: float) -> None:
        """One photo was decoded."""

    def classified(self, photos: int, seconds: float) -> None:
        """One batch was classified."""

    def moved(self, photos: int, seconds: float) -> None:
        """One batch was moved; `photos` of it left the inbox."""


class Pipeline:
    """The stages and the threads that run them.

    Args:
        engine: classifies; used by `engine.concurrency` threads.
        manifest: of the engine's model.
        mover: moves; used by one thread only.
        history: records; used by that thread only; None for a dry run.
        run: the id that the history has this process under.
        settings: batch size, waiting time, limits.
        workers: decoder processes.
        on_moved: called with what was moved of each batch, in the mover's thread, which it must not hold up.
        measures: told how long each step took.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        mover: Mover,
        history: History | None,
        run: str,
        settings: Settings,
        workers: int,
        on_moved: Callable[[Sequence[Outcome]], None] = lambda _: None,
        measures: Measures | None = None,
    ) -> None:
        self._engine, self._manifest, self._settings = engine, manifest, settings
        self._decoded: queue.SimpleQueue[Decoded | None] = queue.SimpleQueue()
        # Bounded, so that nothing piles up while the disk is full: the stages before it stand still then.
        self._decided: queue.Queue[list[Decision | Outcome] | None] = queue.Queue(_MOST_DECIDED)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._on_moved, self._measures = on_moved, measures or Measures()
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._decoding = 0  # photos between submit and the engine's queue
        self._counting = threading.Lock()
        # By when each stage has to be done with its step in hand (monotonic, seconds), see `hung`. A photo that crashes
        # or hangs its decoder is tried twice.
        self._decode_seconds = STEP_SECONDS + 2 * settings.decode_timeout_seconds
        self._decode_deadline = NEVER
        self._classify_deadlines = [NEVER] * engine.concurrency
        self._batching = threading.Lock()  # held by the thread that forms the next batch
        self._stopped = self._closed = False
        self.backlog = False
        """True while more photos are about to be submitted: batches are then filled, however long that takes."""
        self._mover = BatchMover(mover, history, run=run, patient=not settings.once, stopping=self._stopping)
        self.in_flight = 0
        """Photos submitted whose outcome has not been taken yet."""

        # Those in the engine, one that is ready and one that is being filled, so that neither decoders nor engine wait.
        rows = (engine.concurrency + 2) * settings.batch_size + workers
        self._decoders = Decoders(
            workers=workers,
            rows=rows,
            preprocessing=manifest.input.preprocessing,
            limits=Limits(settings.max_megapixels, settings.max_jpeg_megapixels),
            max_bytes=int(settings.max_megabytes * 1e6),
            timeout_seconds=settings.decode_timeout_seconds,
            deliver=self._deliver,
            fail=self._fail,
        )
        side = manifest.input.size
        self._pixels = np.frombuffer(self._decoders.pixels, np.uint8).reshape(rows, side, side, 3)
        classify = [functools.partial(self._classify, number) for number in range(engine.concurrency)]
        self._threads = [
            threading.Thread(target=self._guarded, args=(stage,), name=name, daemon=True)
            for name, stage in [*(("classify", stage) for stage in classify), ("move", self._move)]
        ]
        for thread in self._threads:
            thread.start()

    @property
    def blocked(self) -> str | None:
        """Why nothing can be moved at present, while that is so."""
        return self._mover.blocked

    def submit(self, photo: Photo, *, timeout_seconds: float = 0.2) -> bool:
        """Hand over one photo; False if there was no room for it in time.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        self._raise_error()
        with self._counting:
            self._decoding += 1
            if self._decoding == 1:
                self._decode_deadline = time.monotonic() + self._decode_seconds
        if not self._decoders.submit(photo, timeout_seconds=timeout_seconds):
            with self._counting:
                self._decoding -= 1
                if not self._decoding:
                    self._decode_deadline = NEVER
            return False
        self.in_flight += 1
        return True

    def follow(self, sidecars: list[Decision]) -> bool:
        """Hand over sidecars, which are moved as they are; False if there is no room for them now.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        self._raise_error()
        try:
            self._decided.put_nowait([*sidecars])
        except queue.Full:
            return False
        self.in_flight += len(sidecars)
        return True

    def outcomes(self, *, timeout_seconds: float = 0.0) -> Iterator[Outcome]:
        """Take the outcomes that are ready, waiting at most so long for the first.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        try:
            outcome = self._outcomes.get(timeout=timeout_seconds) if timeout_seconds else self._outcomes.get_nowait()
            while True:
                self.in_flight -= 1
                yield outcome
                outcome = self._outcomes.get_nowait()
        except queue.Empty:
            self._raise_error()

    @property
    def hung(self) -> bool:
        """Tell whether a stage has been at one step for longer than any healthy one takes; waiting for room is healthy.

        That is a minute, and beside it what decoders may take, a second for each photo of a batch, and a second for
        each megabyte of a photo that moves.
        """
        now = time.monotonic()
        return any(now > d for d in (self._decode_deadline, *self._classify_deadlines, self._mover.deadline))

    def waiting(self) -> dict[str, int]:
        """How many photos are in each stage or wait for it."""
        with self._decided.mutex:
            decided = sum(len(batch) for batch in self._decided.queue if batch is not None)
        return {"decode": self._decoding, "classify": self._decoded.qsize(), "move": decided}

    def stop(self) -> None:
        """Finish the batch in hand and forget the photos that are not classified yet; idempotent.

        The mover goes on until `close`, for the sidecars of what it moves.
        """
        if self._stopped:
            return
        self._stopped = True
        self._stopping.set()
        self._decoders.close()
        self._decoded.put(None)
        for thread in self._threads[:-1]:
            thread.join()

    @property
    def idle(self) -> bool:
        """Tell whether the mover has done all that it was given, or has ended."""
        return not self._decided.unfinished_tasks or not self._threads[-1].is_alive()

    def close(self) -> None:
        """Stop, and end the mover too; idempotent."""
        if self._closed:
            return
        self.stop()
        self._closed = True
        self._hand_over(None)
        self._threads[-1].join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stopping.set()

    def _guarded(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except BaseException as error:
            self._fail(error)

    def _deliver(self, decoded: Decoded) -> None:
        if decoded.milliseconds:
            self._measures.decoded(decoded.milliseconds / 1000)
        self._decoded.put(decoded)
        with self._counting:
            self._decoding -= 1
            self._decode_deadline = time.monotonic() + self._decode_seconds if self._decoding else NEVER

    def _classify(self, number: int) -> None:
        """Batch what is decoded, classify it, and decide."""
        while (batch := self._next_batch()) is not None:
            passed: list[Decision | Outcome] = [self._unclassified(d) for d in batch if d.verdict != "pixels"]
            ready = [d for d in batch if d.verdict == "pixels"]
            if ready and not self._stopping.is_set():
                rows = [d.row for d in ready]
                self._classify_deadlines[number] = time.monotonic() + STEP_SECONDS + len(ready)
                started = time.monotonic()
                distances: list[float | None] = [None] * len(ready)
                if self._settings.catch_neither:
                    probabilities, found = self._engine.classify_with_distance(self._pixels[rows])  # (N, C), (N,)
                    distances = found.tolist()
                else:
                    probabilities = self._engine.classify(self._pixels[rows])  # (N, C)
                self._measures.classified(len(ready), time.monotonic() - started)
                self._classify_deadlines[number] = NEVER
                least, count = self._settings.min_confidence, len(ready)
                for decoded, row, distance in zip(ready, probabilities.tolist(), distances, strict=True):
                    passed.append(decide(decoded, row, self._manifest, least, count, distance))
            for decoded in ready:
                self._decoders.release(decoded.row)
            self._hand_over(passed)

    def _hand_over(self, decided: list[Decision | Outcome] | None) -> None:
        """Wait for the mover to take one more batch; one that has failed takes none any more."""
        mover = self._threads[-1]
        while mover.is_alive():
            with contextlib.suppress(queue.Full):
                self._decided.put(decided, timeout=0.2)
                return

    def _next_batch(self) -> list[Decoded] | None:
        """Wait for photos: a full batch in a backlog, what `max_wait_ms` brings otherwise; None at the end."""
        with self._batching:
            return self._filled_batch()

    def _filled_batch(self) -> list[Decoded] | None:
        first = self._decoded.get()
        if first is None:
            self._decoded.put(None)  # for the other threads
            return None
        batch, pictures = [first], int(first.verdict == "pixels")
        deadline = time.monotonic() + self._settings.max_wait_ms / 1000
        while pictures < self._settings.batch_size and len(batch) < 4 * self._settings.batch_size:
            # In a backlog only the end of the photos that are on their way dispatches early. Asked before the look into
            # the queue: what arrives in between is not on its way any more.
            patient = self._settings.once or time.monotonic() < deadline
            on_their_way = self.backlog or (self._decoding > 0 and patient)
            try:
                decoded = self._decoded.get(timeout=0.005 if on_their_way else 0)
            except queue.Empty:
                if on_their_way and not self._stopping.is_set():
                    continue
                break
            if decoded is None:
                self._decoded.put(None)
                break
            batch.append(decoded)
            pictures += decoded.verdict == "pixels"
        return batch

    def _unclassified(self, decoded: Decoded) -> Decision | Outcome:
        now = time.time()
        if (look_again := complete_after(decoded, now)) > now:
            return Outcome(decoded.photo, "again", detail="may still be written", look_again=look_again)
        if decoded.verdict == "failed":
            return Decision(decoded, "failed", FAILED)
        if decoded.verdict == "skipped":
            return Outcome(decoded.photo, "skipped", detail=decoded.detail)
        if decoded.verdict == "left":
            return Outcome(decoded.photo, "left", detail=decoded.detail)
        return Outcome(decoded.photo, "again", detail=decoded.detail)

    def _move(self) -> None:
        """Move what is decided, a batch and its fsyncs at a time."""
        while (batch := self._decided.get()) is not None:
            for item in batch:
                if isinstance(item, Outcome):
                    self._outcomes.put(item)
            if decisions := [item for item in batch if isinstance(item, Decision)]:
                self._move_batch(decisions)
            self._decided.task_done()

    def _move_batch(self, decisions: list[Decision]) -> None:
        moved: list[Outcome] = []
        started = time.monotonic()
        try:
            self._mover.move(decisions, functools.partial(self._tell, moved))
        finally:
            self._measures.moved(len(moved), time.monotonic() - started)
            if moved:  # also where the rest of the batch could not be
                self._on_moved(moved)

    def _tell(self, moved: list[Outcome], outcome: Outcome) -> None:
        if outcome.destination is not None:
            moved.append(outcome)
        self._outcomes.put(outcome)
