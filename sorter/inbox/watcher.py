"""Hints of what changed in the inbox, and the supervision of whoever gives them.

In: an inbox. Out: names worth a look, or the wish for a whole rescan. An event never decides anything: the scan does.

Events end when the inbox is deleted, renamed, unmounted or replaced, and some are lost when more come than the kernel's
queue holds. Most of that the kernel reports; the rest shows when the folder itself is asked every few seconds: the same
(device, inode), and listable? Neither is enough alone: a new folder often gets the old one's inode number, and a folder
above the inbox is renamed without an event. Whatever went wrong, all is built anew and the whole inbox listed. Where
events do not work at all (network file systems, no inotify watches left) it is listed every few seconds instead.
"""

import contextlib
import os
import select
import threading
import time

import structlog

from sorter.files import file_systems
from sorter.inbox.listener import Listener
from sorter.inbox.scan import Inbox

POLL_SECONDS = 5.0
CHECK_SECONDS = 5.0
"""How often to ask whether the inbox is still there and still the same."""
GONE_SECONDS = 1.0
"""How often to ask whether a missing inbox is back."""
GATHER_SECONDS = 0.05
"""Events seldom come alone: the loop turns no more often than this for them."""
HELD_SECONDS = 60.0
"""What went well for so long is forgotten: the next restart follows at once, and is said."""
RETRY_SECONDS = 300.0
"""How often to ask for inotify watches where there were none left: asking takes all there are, for a moment."""
MAX_NAMES = 10_000
"""More names than this between two turns of the loop are not worth remembering: a rescan is cheaper."""


log = structlog.get_logger()


class Watcher:
    """Watches one inbox.

    Args:
        inbox: says which folder, whether its subfolders count, and which of them do not.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox, self._root = inbox, str(inbox.root)
        self._listener: Listener | None = None
        self._folder: tuple[int, int] | None = None
        self._names: set[str] = set()
        self._rescan = False
        self._lock = threading.Lock()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._trouble: str | None = None
        self._waiting = False  # for the inbox, and that was said
        self._restarted_for: str | None = None
        self._repeats = False
        self._started = self._resume = self._retry = self._delay_seconds = 0.0
        self.restarts = 0
        """How often it was built anew, also where that was not said."""
        self.next_check = 0.0
        """When `supervise` wants to look again, a monotonic time."""
        self.poll_seconds = POLL_SECONDS
        """How often to list the inbox because no events come; infinite while they do."""

    def start(self, now: float) -> None:
        """Begin to watch; where that is impossible, to poll.

        Args:
            now: a monotonic time, seconds.
        """
        if reason := self._begin(now):
            self._say_polling(reason)

    def stop(self) -> None:
        """Stop watching."""
        self.poll_seconds = POLL_SECONDS
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def supervise(self, now: float) -> None:
        """Look after the listener at each call and after the folder every few seconds; rebuild with backoff.

        Args:
            now: a monotonic time, seconds.
        """
        if self._trouble is None:
            self._trouble = self._examine(now)
            if self._trouble is None:
                return
            self._plan(now, self._trouble)
            self.stop()
        if now >= self.next_check:
            self._mend(now, self._trouble)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the inbox while it is waited for, in a few words; None while nothing is."""
        return self._trouble

    def take_names(self) -> list[str]:
        """The names, relative to the inbox, that events mentioned since the last call."""
        with self._lock:
            names, self._names = self._names, set()
        return list(names)

    def take_rescan(self) -> bool:
        """Tell whether a whole rescan is wanted since the last call."""
        with self._lock:
            wanted, self._rescan = self._rescan, False
        return wanted

    def wait(self, seconds: float) -> None:
        """Sleep until an event, `wake`, or the time is over."""
        waiting = select.poll()
        waiting.register(self._woken, select.POLLIN)
        if waiting.poll(1000 * seconds):
            time.sleep(GATHER_SECONDS)
            os.read(self._woken, 1 << 16)

    def wake(self) -> None:
        """End `wait`; safe in a signal handler, where taking a lock could wait for itself."""
        with contextlib.suppress(BlockingIOError):  # it is full of wishes to wake already
            os.write(self._wake, b".")

    def notice(self, name: str) -> None:
        """Remember a name that an event brought."""
        with self._lock:
            if len(self._names) < MAX_NAMES:
                self._names.add(name)
            else:
                self._rescan = True
        self.wake()

    def notice_all(self) -> None:
        """Remember that anything may have changed, the inbox itself too."""
        with self._lock:
            self._rescan = True
        self.next_check = 0.0
        self.wake()

    def _examine(self, now: float) -> str | None:
        """Tell in a few words what is wrong, None if nothing is."""
        if self._listener is not None and self._listener.failure is not None:
            return self._listener.failure
        if now < self.next_check:
            return None
        self.next_check = now + CHECK_SECONDS
        identity = self._identity()
        if identity is None:
            return "the inbox is gone or cannot be listed"
        if identity != self._folder:
            return "the inbox is another folder now"
        if self._listener is None and now >= self._retry:
            self._begin(now)
            if self._listener is not None:
                self.restarts += 1
                self._say_restarted("there are inotify watches again")
        return None

    def _plan(self, now: float, trouble: str) -> None:
        """Decide when to watch again, and whether to say so."""
        failed = self._listener is not None and self._listener.failure == trouble and not self._listener.inbox_lost
        held = now - self._started >= HELD_SECONDS
        # What fails by itself may do so again and again: it is tried less and less often, and said once.
        self._repeats = failed and not held and trouble == self._restarted_for
        self._delay_seconds = min(HELD_SECONDS, 2 * self._delay_seconds or 1.0) if failed and not held else 0.0
        self.next_check, self._resume = now, now + self._delay_seconds

    def _mend(self, now: float, trouble: str) -> None:
        if self._identity() is None:
            if not self._waiting:
                log.warning("watcher.waiting", path=self._root, reason=trouble)
            self._waiting, self.next_check = True, now + GONE_SECONDS
            return
        if now < self._resume:
            self.next_check = min(self._resume, now + GONE_SECONDS)
            return
        reason = self._begin(now)
        self.restarts += 1
        if reason != trouble and (self._waiting or not self._repeats):
            self._say_restarted(trouble)
        if reason is not None:
            self._say_polling(reason)
        self._trouble, self._waiting = None, False

    def _say_restarted(self, reason: str) -> None:
        self._restarted_for = reason
        log.warning("watcher.restarted", path=self._root, reason=reason)

    def _say_polling(self, reason: str) -> None:
        log.warning("watcher.polling", path=self._root, reason=reason, seconds=POLL_SECONDS)

    def _begin(self, now: float) -> str | None:
        """Watch, and return None; or tell why the inbox has to be polled."""
        self._started, self._retry = now, float("inf")
        self.next_check = now + CHECK_SECONDS
        # Asked before it is watched: one that takes its place meanwhile is noticed as another.
        self._folder = self._identity()
        if file_systems.is_network(self._inbox.root):
            return f"{file_systems.kind(self._inbox.root)} reports no changes"
        try:
            self._listener = Listener(self._inbox, self.notice, self.notice_all)
        except OSError as error:
            if self._identity() is None:  # then the next look says so
                self.next_check = now
                return None
            self._retry = now + RETRY_SECONDS
            return str(error.strerror)
        self.poll_seconds = float("inf")
        with self._lock:
            self._rescan = True  # what came before it was watched made no event
        return None

    def _identity(self) -> tuple[int, int] | None:
        try:
            with os.scandir(self._root) as entries:
                next(entries, None)
            status = os.stat(self._root)
        except OSError:
            return None
        return status.st_dev, status.st_ino
