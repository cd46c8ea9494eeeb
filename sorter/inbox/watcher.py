"""Hints about what changed in the inbox, and the supervision of the listener that gives them.

In: an inbox. Out: names worth a look, or a request for a full rescan. An event never decides anything: the scan does.

Events end when the inbox is deleted, renamed, unmounted or replaced, and some are lost when more arrive than the
kernel's queue holds. The kernel reports most of that; a look at the folder every few seconds finds the rest: is it
still the same (device, inode), and can it be listed? Neither is enough alone: a new folder often gets the old one's
inode number, and renaming a folder above the inbox causes no event. Whatever went wrong, the listener is replaced and
the entire inbox is listed. Where events do not work at all (network file systems, no inotify watches left), the inbox
is polled.
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
"""How often to check that the inbox still exists and is still the same folder."""
GONE_SECONDS = 1.0
"""How often to check whether a missing inbox is back."""
GATHER_SECONDS = 0.05
"""Events seldom come alone: the loop runs no more often than this for them."""
STABLE_SECONDS = 60.0
"""After this long without trouble, the next restart happens at once and is logged."""
RETRY_SECONDS = 300.0
"""How often to try for inotify watches after they ran out: a try uses up all that are free, for a moment."""
MAX_NAMES = 10_000
"""With more names than this between two turns of the loop, a rescan is cheaper than remembering them."""


log = structlog.get_logger()


class Watcher:
    """Watches one inbox.

    Args:
        inbox: the folder, and which of its subfolders count.
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
        self._waiting = False  # for a missing inbox, which has been logged
        self._restarted_for: str | None = None
        self._repeats = False
        self._started = self._resume = self._retry = self._delay_seconds = 0.0
        self.restarts = 0
        """How often the listener was replaced, including restarts that were not logged."""
        self.next_check = 0.0
        """When `supervise` should be called again, in monotonic seconds."""
        self.poll_seconds = POLL_SECONDS
        """How often to list the inbox because there are no events; infinite while there are."""

    def start(self, now: float) -> None:
        """Start watching, or polling where that is impossible.

        Args:
            now: monotonic seconds.
        """
        if reason := self._begin(now):
            self._log_polling(reason)

    def stop(self) -> None:
        """Stop watching."""
        self.poll_seconds = POLL_SECONDS
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def supervise(self, now: float) -> None:
        """Check the listener at each call and the folder every few seconds; restart with backoff.

        Args:
            now: monotonic seconds.
        """
        if self._trouble is None:
            self._trouble = self._find_trouble(now)
            if self._trouble is None:
                return
            self._schedule_restart(now, self._trouble)
            self.stop()
        if now >= self.next_check:
            self._restart(now, self._trouble)

    @property
    def trouble(self) -> str | None:
        """Why the watcher is waiting for the inbox, in a few words; None while it is not."""
        return self._trouble

    def take_names(self) -> list[str]:
        """The names, relative to the inbox, that events mentioned since the last call."""
        with self._lock:
            names, self._names = self._names, set()
        return list(names)

    def take_rescan(self) -> bool:
        """Whether a full rescan was requested since the last call."""
        with self._lock:
            wanted, self._rescan = self._rescan, False
        return wanted

    def wait(self, seconds: float) -> None:
        """Sleep until an event, `wake`, or the end of this time."""
        waiting = select.poll()
        waiting.register(self._woken, select.POLLIN)
        if waiting.poll(1000 * seconds):
            time.sleep(GATHER_SECONDS)
            os.read(self._woken, 1 << 16)

    def wake(self) -> None:
        """End `wait`; safe in a signal handler, where taking a lock could deadlock."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of requests to wake already
            os.write(self._wake, b".")

    def notice(self, name: str) -> None:
        """Remember a name from an event."""
        with self._lock:
            if len(self._names) < MAX_NAMES:
                self._names.add(name)
            else:
                self._rescan = True
        self.wake()

    def notice_all(self) -> None:
        """Remember that anything may have changed, including the inbox itself."""
        with self._lock:
            self._rescan = True
        self.next_check = 0.0
        self.wake()

    def _find_trouble(self, now: float) -> str | None:
        """What is wrong, in a few words."""
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
                self._log_restart("there are inotify watches again")
        return None

    def _schedule_restart(self, now: float, trouble: str) -> None:
        """Decide when to restart the listener, and whether to log it."""
        failed = self._listener is not None and self._listener.failure == trouble and not self._listener.inbox_lost
        held = now - self._started >= STABLE_SECONDS
        # A listener that failed while the inbox was fine may fail again at once: back off, and log it only once. A lost
        # inbox is different: the listener is needed as soon as the folder is back.
        self._repeats = failed and not held and trouble == self._restarted_for
        self._delay_seconds = min(STABLE_SECONDS, 2 * self._delay_seconds or 1.0) if failed and not held else 0.0
        self.next_check, self._resume = now, now + self._delay_seconds

    def _restart(self, now: float, trouble: str) -> None:
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
            self._log_restart(trouble)
        if reason is not None:
            self._log_polling(reason)
        self._trouble, self._waiting = None, False

    def _log_restart(self, reason: str) -> None:
        self._restarted_for = reason
        log.warning("watcher.restarted", path=self._root, reason=reason)

    def _log_polling(self, reason: str) -> None:
        log.warning("watcher.polling", path=self._root, reason=reason, seconds=POLL_SECONDS)

    def _begin(self, now: float) -> str | None:
        """Start a listener; return why the inbox has to be polled instead, if so."""
        self._started, self._retry = now, float("inf")
        self.next_check = now + CHECK_SECONDS
        # Before the watch is added, so that a folder that takes its place meanwhile is noticed as another one.
        self._folder = self._identity()
        if file_systems.is_network(self._inbox.root):
            return f"{file_systems.kind(self._inbox.root)} reports no changes"
        try:
            self._listener = Listener(self._inbox, self.notice, self.notice_all)
        except OSError as error:
            if self._identity() is None:  # the next check reports it
                self.next_check = now
                return None
            self._retry = now + RETRY_SECONDS
            return str(error.strerror)
        self.poll_seconds = float("inf")
        with self._lock:
            self._rescan = True  # what arrived before the watch was added caused no event
        return None

    def _identity(self) -> tuple[int, int] | None:
        try:
            with os.scandir(self._root) as entries:
                next(entries, None)
            status = os.stat(self._root)
        except OSError:
            return None
        return status.st_dev, status.st_ino
