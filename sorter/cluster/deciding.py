"""A node's model and decoders, shared by all the work that the node has in hand.

In: photos on a disk of this machine. Out: an `Outcome` for each, with the decision in it; nothing is moved. It is the
sorter's own pipeline on a dry run, so limits, isolation of decoders, thresholds and reasons are the sorter's.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.decisions import Outcome
from sorter.files.photo import Photo
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan
from sorter.pipeline.model_in_use import ModelInUse
from sorter.pipeline.pipeline import Pipeline
from sorter.settings import Settings

_MAX_WAITING = 64  # photos that are handed in and not in the pipeline yet
_LOOK_SECONDS = 0.02
_ERROR_SECONDS = 1.0  # how often a waiting caller asks whether the pipeline has failed


class _Nowhere(Mover):
    """Plans no places: a node does not know what is in the output, and must not remember every photo it saw."""

    def plan(self, photo: Photo, folder: str, name: str = "") -> Plan:
        return Plan(photo, folder, name or os.path.basename(photo.name), "")


class _Request:
    """One call of `decide`.

    Attributes:
        tell: where its outcomes go.
        in_hand: photos handed in and not decided yet.
    """

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self.tell, self.in_hand = tell, 0
        self.changed = threading.Condition()

    def count(self, photos: int) -> None:
        with self.changed:
            self.in_hand += photos
            self.changed.notify_all()


class Decider:
    """Decides on photos, for any number of threads at once; their photos share batches.

    Args:
        settings: as for `sorter run`; only those of model, thresholds and limits matter.
        workers: decoder processes.
    """

    def __init__(self, engine: Engine, manifest: Manifest, settings: Settings, workers: int) -> None:
        once = settings.model_copy(update={"once": True, "dry_run": True})
        model = ModelInUse.in_new_run(engine, manifest, settings.min_confidence)
        self._pipeline = Pipeline.start(model, _Nowhere(Path(os.devnull)), None, once, workers)
        self._asked: queue.Queue[tuple[Photo, _Request]] = queue.Queue(_MAX_WAITING)
        self._max_wait_seconds = settings.max_wait_ms / 1000
        self._requests: dict[str, _Request] = {}  # by the path of the photo
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self.decided = 0
        """Photos that were decided on, since the start: a sign of life."""
        self._thread = threading.Thread(target=self._run, name="decide", daemon=True)
        self._thread.start()

    def decide(self, photos: Iterable[Photo], tell: Callable[[Outcome], None]) -> None:
        """Decide on photos, and return once all of them are decided on.

        Args:
            photos: whose paths are not in hand already; taken as fast as the pipeline accepts them.
            tell: called with the outcome of each as soon as there is one, in whatever order, from another thread, which
                it must not hold up.

        Raises:
            SorterError: a stage could not go on.
        """
        request = _Request(tell)
        for photo in photos:
            request.count(1)
            while True:
                self._raise_error()
                with contextlib.suppress(queue.Full):
                    self._asked.put((photo, request), timeout=_ERROR_SECONDS)
                    break
        with request.changed:
            while not request.changed.wait_for(lambda: not request.in_hand, timeout=_ERROR_SECONDS):
                self._raise_error()

    def close(self) -> None:
        """End the decoders; what is in hand stays undecided."""
        self._closing.set()
        self._thread.join()
        self._pipeline.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """Feed the pipeline and hand out what it has decided, until closed."""
        fed = 0.0
        try:
            while not self._closing.is_set():
                try:
                    photo, request = self._asked.get(timeout=0 if self._pipeline.in_flight else _LOOK_SECONDS)
                except queue.Empty:
                    # More may be on their way, but they may also wait for the space that the photos of this batch take.
                    self._pipeline.backlog = time.monotonic() < fed + self._max_wait_seconds
                    self._answer(timeout_seconds=_LOOK_SECONDS)
                    continue
                self._pipeline.backlog, fed = True, time.monotonic()
                self._requests[photo.path] = request
                while not self._pipeline.submit(photo) and not self._closing.is_set():
                    self._answer()
                self._answer()
        except BaseException as error:
            self._error = error

    def _answer(self, *, timeout_seconds: float = 0.0) -> None:
        for outcome in self._pipeline.outcomes(timeout_seconds=timeout_seconds):
            request = self._requests.pop(outcome.photo.path)
            request.tell(outcome)
            request.count(-1)
            self.decided += 1
