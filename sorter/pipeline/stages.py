"""The way of every photo, as the service's loop sees it: photos go in, outcomes come out, and the mover is its end.

`Pipeline` is the one of a single process; in a cluster, other machines decode and classify.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from sorter.decisions import Decision, Outcome
from sorter.files.photo import Photo
from sorter.history.store import Run
from sorter.pipeline.move_stage import MoveStage


class Failure:
    """The first error of any stage, which makes all of them end.

    Attributes:
        stopping: set when the stages are to end, for this or any other reason.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._error: BaseException | None = None

    def record(self, error: BaseException) -> None:
        """Keep the first error, and make all stages end."""
        self._error = self._error or error
        self.stopping.set()

    def raise_error(self) -> None:
        """Raise the recorded error, if there is one."""
        if self._error is not None:
            raise self._error

    def guard(self, stage: Callable[[], None]) -> None:
        """Run a stage, and record what it fails with."""
        try:
            stage()
        except BaseException as error:
            self.record(error)


class Stages(ABC):
    """The running stages. Used by one thread, the service's loop.

    Attributes:
        in_flight: photos submitted whose outcome has not been taken yet.
    """

    def __init__(self, moving: MoveStage, failure: Failure) -> None:
        self._moving, self._failure = moving, failure
        self.in_flight = 0

    @property
    @abstractmethod
    def run(self) -> Run:
        """The present one, of the model in use."""

    @property
    @abstractmethod
    def backlog(self) -> bool:
        """True while more photos are about to be submitted: batches are then filled, however long that takes."""

    @backlog.setter
    @abstractmethod
    def backlog(self, value: bool) -> None: ...

    @property
    @abstractmethod
    def blocked(self) -> str | None:
        """Why nothing can be moved at present, while that is so."""

    @property
    @abstractmethod
    def hung(self) -> bool:
        """Whether a stage takes longer for one step than any healthy one."""

    @property
    def idle(self) -> bool:
        """Whether the mover has finished what it was given, or has ended."""
        return self._moving.is_idle

    @abstractmethod
    def waiting(self) -> dict[str, int]:
        """How many photos are in each stage or wait for it."""

    @abstractmethod
    def submit(self, photo: Photo, *, timeout_seconds: float = 0.2) -> bool:
        """Hand over one photo; False if the stages had no space for it in time.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """

    def follow(self, sidecars: Sequence[Decision]) -> bool:
        """Hand over sidecars, which are moved without being opened; False if there is no space for them now.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        self._failure.raise_error()
        if not self._moving.offer(sidecars):
            return False
        self.in_flight += len(sidecars)
        return True

    def outcomes(self, *, timeout_seconds: float = 0.0) -> Iterator[Outcome]:
        """Take the outcomes that are ready, waiting up to `timeout_seconds` for the first.

        Raises:
            SorterError: a stage could not go on; nothing is half moved.
        """
        ready = self._moving.outcomes
        try:
            outcome = ready.get(timeout=timeout_seconds)
            while True:
                self.in_flight -= 1
                yield outcome
                outcome = ready.get_nowait()
        except queue.Empty:
            self._failure.raise_error()

    @abstractmethod
    def stop(self) -> None:
        """Forget the photos that are not decided on yet; idempotent. The mover goes on until `close`."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and end the mover too; idempotent."""
