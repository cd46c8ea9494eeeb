"""SIGTERM and SIGINT, for one process: when to end, and how soon."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


class Stop:
    """SIGTERM and SIGINT: the first asks for an end after the batch in hand, a second ends the process at once.

    Args:
        idle_code: the exit code while there is nothing in hand yet.
    """

    def __init__(self, idle_code: int) -> None:
        # No threading.Event: its lock may be held by the very thread that the handler interrupts.
        self.requested = False
        self.wake: Callable[[], None] = lambda: None
        """Ends the loop's sleep."""
        self.moving: threading.Lock | None = None
        """Held while one photo moves; None while nothing can be in hand."""
        self.kill_children: Callable[[], None] = lambda: None
        """Ends what would go on without this process."""
        self._idle_code = idle_code

    def listen(self) -> None:
        """Take the signals, for the rest of the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.moving is None:
            os._exit(self._idle_code)
        if self.requested:
            # One photo's move is let through, so that nothing is half moved; a copy that takes longer leaves a hidden
            # partial file and the photo where it was.
            self.moving.acquire(timeout=2)
            self.kill_children()
            os._exit(128 + number)
        self.requested = True
        self.wake()
