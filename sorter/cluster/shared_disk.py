"""Nodes decide on the photos of a folder that all machines share; this process moves them, as `sorter run` does.

In: settled photos. Out: an `Outcome` for each. It stands in for the pipeline of one machine: everything before and
after decoding and classifying (scan, sidecars, locks, history, recovery, undo) is what it is there.

    submit → chunks → [nodes: decode, classify] → decisions → [MoveStage (a thread)] → outcomes
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from sorter.cluster.node import MAX_DEATHS, Judged
from sorter.cluster.pool import TASKS_PER_NODE, Finished, Pool, Task
from sorter.decisions import Decided, Decision, Outcome, kept
from sorter.decoding.decoded import Decoded
from sorter.errors import Reason
from sorter.files import FAILED
from sorter.files.photo import Photo
from sorter.history.store import History, Run
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover
from sorter.pipeline.measures import Measures
from sorter.pipeline.move_stage import MoveStage
from sorter.pipeline.stages import Failure, Stages
from sorter.settings import Settings

CHUNK_PHOTOS = 100

_WAIT_SECONDS = 0.2
_MOVED_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class _Chunk:
    photos: tuple[Photo, ...]
    deaths: int = 0
    suspected: bool = False


class RemotePipeline(Stages):
    """The running stages; built by `start`."""

    def __init__(self, pool: Pool, run: Run, moving: MoveStage, failure: Failure, sorted_again: str | None) -> None:
        super().__init__(moving, failure)
        self._pool, self._run, self._sorted_again = pool, run, sorted_again
        self._forming: list[Photo] = []
        self._chunks: queue.Queue[_Chunk] = queue.Queue()
        # Photos of a few chunks for each node, so that none is idle, and memory stays constant.
        self._places = threading.Semaphore(CHUNK_PHOTOS * (TASKS_PER_NODE + 2) * pool.size)
        self._closed = self._backlog = False
        self._threads = [
            threading.Thread(target=failure.guard, args=(stage,), name=name, daemon=True)
            for name, stage in (("nodes", self._run_nodes), ("move", moving.run))
        ]

    @classmethod
    def start(
        cls,
        pool: Pool,
        run: Run,
        mover: Mover,
        history: History | None,
        settings: Settings,
        on_moved: Callable[[Sequence[Outcome]], None] = lambda _: None,
        measures: Measures | None = None,
        sorted_again: str | None = None,
    ) -> Self:
        """Start the threads; the arguments are those of `Pipeline.start`, with nodes in place of model and decoders."""
        failure = Failure()
        batch_mover = BatchMover(mover, history, patient=False, stopping=failure.stopping, flat=settings.flat)
        pipeline = cls(pool, run, MoveStage(batch_mover, on_moved, measures or Measures()), failure, sorted_again)
        for thread in pipeline._threads:
            thread.start()
        return pipeline

    @property
    def run(self) -> Run:
        """The only one."""
        return self._run

    @property
    def backlog(self) -> bool:
        """True while more photos are about to be submitted: chunks are then filled."""
        return self._backlog

    @backlog.setter
    def backlog(self, value: bool) -> None:
        self._backlog = value
        if not value:
            self._hand_over()

    @property
    def blocked(self) -> str | None:
        """Why nothing can be moved at present; here that ends the run instead."""
        return None

    @property
    def hung(self) -> bool:
        """Never: nodes that do nothing end the run."""
        return False

    def waiting(self) -> dict[str, int]:
        """How many photos are in each stage or wait for it."""
        return {"decode": self.in_flight - self._moving.waiting, "classify": 0, "move": self._moving.waiting}

    def submit(self, photo: Photo, *, timeout_seconds: float = 0.2) -> bool:
        """Hand over one photo; False if the nodes had no place for it in time.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        self._failure.raise_error()
        if not self._places.acquire(timeout=timeout_seconds):
            return False
        self.in_flight += 1
        self._forming.append(photo)
        if len(self._forming) >= CHUNK_PHOTOS or not self._backlog:
            self._hand_over()
        return True

    def stop(self) -> None:
        """Forget the photos that are not decided on yet; idempotent. The mover goes on until `close`."""
        self._failure.stopping.set()
        self._threads[0].join()

    def close(self) -> None:
        """Stop, and end the mover too; idempotent."""
        if self._closed:
            return
        self.stop()
        self._closed = True
        self._moving.close()
        self._threads[1].join()

    def _hand_over(self) -> None:
        if self._forming:
            self._chunks.put(_Chunk(tuple(self._forming)))
            self._forming = []

    def _run_nodes(self) -> None:
        """Hand chunks to the nodes and their decisions to the mover, until stopped."""
        pool = self._pool
        while not self._failure.stopping.is_set():
            while pool.wants_more:
                try:
                    self._give(self._chunks.get(timeout=0 if pool.in_hand else _WAIT_SECONDS))
                except queue.Empty:
                    break
            if not pool.in_hand:
                pool.progressed = time.monotonic()  # there is nothing to do
                continue
            for finished in pool.wait(_WAIT_SECONDS):
                self._receive(finished)
            pool.check_progress()

    def _give(self, chunk: _Chunk) -> None:
        names = [photo.name for photo in chunk.photos]
        self._pool.submit(Task("decide", (chunk.photos[0].root, names), chunk, alone=chunk.suspected))

    def _receive(self, finished: Finished) -> None:
        chunk: _Chunk = finished.task.tag
        if not finished.died:
            by_name = {photo.name: photo for photo in chunk.photos}
            decided = [_decided(by_name[judged.name], judged, self.run) for judged in finished.result]
            self._move([kept(item, self._sorted_again) for item in decided])
            return
        photos, deaths = chunk.photos, chunk.deaths + 1
        if deaths < MAX_DEATHS:
            self._give(_Chunk(photos, deaths, suspected=True))
        elif len(photos) > 1:
            half = len(photos) // 2
            for part in (photos[:half], photos[half:]):
                self._give(_Chunk(part, suspected=True))
        else:
            self._move([_blamed(photos[0], self.run)])

    def _move(self, decided: list[Decided]) -> None:
        for start in range(0, len(decided), _MOVED_TOGETHER):
            self._moving.put(decided[start : start + _MOVED_TOGETHER])
        self._places.release(len(decided))


def _blamed(photo: Photo, run: Run) -> Decision:
    """What becomes of a photo that killed every node that worked on it alone."""
    detail = f"{MAX_DEATHS} nodes died while they worked on it"
    return Decision(Decoded(photo, "failed", reason=Reason.DECODER_CRASH, detail=detail), FAILED, FAILED, run=run)


def _decided(photo: Photo, judged: Judged, run: Run) -> Decided:
    """What a node said, of the photo as this machine has seen it."""
    if judged.kind not in ("sorted", "unsure", "failed"):
        return Outcome(photo, judged.kind, detail=judged.detail, look_again=judged.look_again)
    if (judged.size, judged.mtime_ns) != (photo.identity.size, photo.identity.mtime_ns):
        return Outcome(photo, "again", detail="changed since it was settled")
    failed = judged.kind == "failed"
    decoded = Decoded(
        photo,
        "failed" if failed else "pixels",
        reason=None if judged.reason is None else Reason(judged.reason),
        detail=judged.detail if failed else "",
        milliseconds=judged.milliseconds,
    )
    return Decision(
        decoded,
        judged.kind,
        judged.folder,
        judged.label,
        judged.confidence,
        judged.batch_size,
        detail="" if failed else judged.detail,
        run=run,
    )
