"""SIGTERM, SIGINT and SIGHUP, for one process: whether to end, how soon, and whether to take a new model."""

import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType

_MOVE_SECONDS = 2.0  # how long a second signal lets the move in hand take


class Shutdown:
    """The first SIGTERM or SIGINT asks for an end after the current batch; a second one ends the process at once.

    SIGHUP is like the first where there is a terminal, because it closes. A service has none, and takes a new model.

    Args:
        idle_code: the exit code while nothing is in hand yet.

    Attributes:
        requested: whether to end.
        unwinds: while nothing is in hand yet, have the first signal raise `KeyboardInterrupt`, so that what was started
            is ended; otherwise it ends the process.
        reloads: filled with an item for each SIGHUP that asks for a new model.
        wake: ends the loop's sleep.
        move_lock: held while one photo moves; None while nothing can be in hand.
        kill_children: ends what would outlive this process.
        restore_terminal: undoes what a progress bar did to the terminal; called in the signal handler.
    """

    def __init__(self, idle_code: int) -> None:
        # Not a threading.Event: the thread that the handler interrupts may be the one that holds its lock. To put
        # something into a SimpleQueue needs none.
        self.requested = self.unwinds = False
        self.reloads: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.wake: Callable[[], None] = lambda: None
        self.move_lock: threading.Lock | None = None
        self.kill_children: Callable[[], None] = lambda: None
        self.restore_terminal: Callable[[], None] = lambda: None
        self._idle_code = idle_code

    def listen(self) -> None:
        """Handle the signals, for the rest of the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self._handle if _has_terminal() else self._request_reload)

    def _request_reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reloads.put(True)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.move_lock is None and not self.unwinds:
            os._exit(self._idle_code)
        if self.requested and number == signal.SIGHUP:  # the kernel and the shell each send one
            return
        if self.requested:
            # The photo in hand may finish its move, so that nothing is half moved. A copy that takes longer leaves a
            # hidden partial file, and the photo where it was.
            if self.move_lock is not None:
                self.move_lock.acquire(timeout=_MOVE_SECONDS)
            self.kill_children()
            self.restore_terminal()
            os._exit(128 + number)
        self.requested = True
        if self.move_lock is None:
            raise KeyboardInterrupt
        self.wake()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, and no service manager."""
    if "NOTIFY_SOCKET" in os.environ:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
