"""Decisions become moves, a batch and its fsyncs at a time.

In: `Decision`s, and `Outcome`s of the photos that stay. Out: an `Outcome` for each.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence

from sorter.deadlines import Deadline
from sorter.decisions import Decided, Decision, Outcome
from sorter.moving.batch_mover import BatchMover
from sorter.pipeline.measures import Measures

_MAX_QUEUED_BATCHES = 2
_PUT_SECONDS = 0.2  # how often to ask whether the stage has failed while waiting for a place in its queue


class MoveStage:
    """What the only thread that moves photos does, and the queue in front of it.

    The queue is bounded: while the disk is full, the stages before this one stand still.

    Args:
        on_moved: called with what was moved of each batch, in this stage's thread, which it must not hold up.

    Attributes:
        outcomes: filled with one outcome for each photo that was put in.
        waiting: photos put in and not finished.
    """

    def __init__(self, mover: BatchMover, on_moved: Callable[[Sequence[Outcome]], None], measures: Measures) -> None:
        self._mover, self._on_moved, self._measures = mover, on_moved, measures
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.waiting = 0
        self._queue: queue.Queue[Sequence[Decided] | None] = queue.Queue(_MAX_QUEUED_BATCHES)
        self._counting = threading.Lock()
        self._ended = threading.Event()

    def put(self, batch: Sequence[Decided]) -> None:
        """Hand over a batch, waiting for a place in the queue; a stage that has ended accepts nothing."""
        while not self._ended.is_set() and not self.offer(batch, timeout_seconds=_PUT_SECONDS):
            pass

    def offer(self, batch: Sequence[Decided], *, timeout_seconds: float = 0.0) -> bool:
        """Hand over a batch; False if there was no place in the queue in time."""
        self._count(len(batch))
        try:
            self._queue.put(batch, block=timeout_seconds > 0, timeout=timeout_seconds)
        except queue.Full:
            self._count(-len(batch))
            return False
        return True

    def close(self) -> None:
        """Have `run` return once everything that was put in is done."""
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_PUT_SECONDS)
                return

    @property
    def is_idle(self) -> bool:
        """Whether everything that was put in is done, or nothing more ever will be."""
        return not self.waiting or self._ended.is_set()

    @property
    def blocked(self) -> str | None:
        """Why nothing can be moved at present, while that is so."""
        return self._mover.blocked

    @property
    def deadline(self) -> Deadline:
        """Of the step in hand; waiting for space on the disk is healthy."""
        return self._mover.deadline

    def run(self) -> None:
        """Move until closed.

        Raises:
            StorageError: nothing more can be moved; nothing is lost or half moved.
        """
        try:
            while (batch := self._queue.get()) is not None:
                for item in batch:
                    if isinstance(item, Outcome):
                        self.outcomes.put(item)
                if decisions := [item for item in batch if isinstance(item, Decision)]:
                    self._move(decisions)
                self._count(-len(batch))
        finally:
            self._ended.set()

    def _move(self, decisions: list[Decision]) -> None:
        moved: list[Outcome] = []

        def tell(outcome: Outcome) -> None:
            if outcome.destination is not None:
                moved.append(outcome)
            self.outcomes.put(outcome)

        started = time.monotonic()
        try:
            self._mover.move(decisions, tell)
        finally:
            self._measures.moved(len(moved), time.monotonic() - started)
            if moved:  # also where the rest of the batch could not be
                self._on_moved(moved)

    def _count(self, photos: int) -> None:
        with self._counting:
            self.waiting += photos
