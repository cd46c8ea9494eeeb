"""Tells a stage that hangs from one that is slow."""

import threading
import time
from collections.abc import Callable

STEP_SECONDS = 60.0
"""What any step may take beside its own time before it counts as hung: slow machines, cold disks, new processes."""
_NEVER = float("inf")


class Deadline:
    """By when a stage must finish the next of the steps that it has in hand.

    Work that arrives meanwhile does not extend the deadline; only a finished step does.

    Args:
        clock: monotonic, in seconds.

    Attributes:
        in_hand: steps begun and not finished.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_hand = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._step_seconds = 0.0
        self._due = _NEVER

    def begin(self, own_seconds: float = 0.0) -> None:
        """Begin a step.

        Args:
            own_seconds: how long the step may take in addition to `STEP_SECONDS`.
        """
        with self._lock:
            self.in_hand += 1
            if self.in_hand == 1:
                self._step_seconds = STEP_SECONDS + own_seconds
                self._due = self._clock() + self._step_seconds

    def finish(self) -> None:
        """Finish a step: those still in hand get their full time again."""
        with self._lock:
            self.in_hand -= 1
            self._due = self._clock() + self._step_seconds if self.in_hand else _NEVER

    def progress(self) -> None:
        """Give the steps in hand their full time again, because one of them goes on."""
        with self._lock:
            if self.in_hand:
                self._due = self._clock() + self._step_seconds

    def cancel(self) -> None:
        """Take back a `begin`: that is no progress, so the deadline of the others stays."""
        with self._lock:
            self.in_hand -= 1
            if not self.in_hand:
                self._due = _NEVER

    @property
    def is_overdue(self) -> bool:
        """Whether no step was finished in time."""
        return self._clock() > self._due
