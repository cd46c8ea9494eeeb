"""SIGTERM and SIGINT, for one process: whether to end, and how soon."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_MOVE_SECONDS = 2.0  # how long a second signal lets the move in hand take


class Shutdown:
    """The first SIGTERM or SIGINT asks for an end after the current batch; a second one ends the process at once.

    Args:
        idle_code: the exit code while nothing is in hand yet.

    Attributes:
        requested: whether to end.
        wake: ends the loop's sleep.
        move_lock: held while one photo moves; None while nothing can be in hand.
        kill_children: ends what would outlive this process.
    """

    def __init__(self, idle_code: int) -> None:
        # Not a threading.Event: the thread that the handler interrupts may be the one that holds its lock.
        self.requested = False
        self.wake: Callable[[], None] = lambda: None
        self.move_lock: threading.Lock | None = None
        self.kill_children: Callable[[], None] = lambda: None
        self._idle_code = idle_code

    def listen(self) -> None:
        """Handle the signals, for the rest of the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.move_lock is None:
            os._exit(self._idle_code)
        if self.requested:
            # The photo in hand may finish its move, so that nothing is half moved. A copy that takes longer leaves a
            # hidden partial file, and the photo where it was.
            self.move_lock.acquire(timeout=_MOVE_SECONDS)
            self.kill_children()
            os._exit(128 + number)
        self.requested = True
        self.wake()
