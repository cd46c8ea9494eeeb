"""Hints of what changed in the inbox, and the supervision of whoever gives them.

In: an inbox. Out: names worth a look, or the wish for a whole rescan. An event never decides anything: the scan does.

watchdog's threads can die or fall silent without a word (a deleted, renamed or unmounted root, a full event queue), so
the folder itself is asked every few seconds, and the observer is built anew when it is not the one that was watched.
Where events do not work (network file systems, no inotify watches left) the inbox is listed every few seconds instead.
"""

import os
import threading
from pathlib import Path

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from sorter import file_systems

POLL_SECONDS = 5.0
CHECK_SECONDS = 5.0
"""How often to ask whether the observer and the inbox are still there."""
MAX_NAMES = 10_000
"""More names than this between two turns of the loop are not worth remembering: a rescan is cheaper."""

_EVENTS = [FileCreatedEvent, FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]

log = structlog.get_logger()


class Watcher:
    """Watches one folder.

    Args:
        root: the inbox.
        recursive: watch its subfolders too.
    """

    def __init__(self, root: Path, *, recursive: bool) -> None:
        self._root, self._recursive = str(root), recursive
        self._observer: BaseObserver | None = None
        self._folder: tuple[int, int] | None = None
        self._names: set[str] = set()
        self._rescan = False
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._next_check = 0.0
        self._delay_seconds = 1.0
        self._trouble: str | None = None
        self.poll_seconds = float("inf")
        """How often to list the inbox because no events come; infinite while they do."""

    def start(self) -> None:
        """Begin to watch; where that is impossible, to poll."""
        self._folder = self._identity()
        root = Path(self._root)
        reason = f"{file_systems.kind(root)} reports no changes" if file_systems.is_network(root) else None
        if reason is None:
            try:
                self._observer = self._observe()
            except OSError as error:  # no watches or no inotify instances left
                reason = f"{error.strerror}: raise fs.inotify.max_user_watches or max_user_instances"
        if reason is not None:
            log.warning("watcher.polling", path=self._root, reason=reason, seconds=POLL_SECONDS)
        self.poll_seconds = POLL_SECONDS if self._observer is None else float("inf")

    def stop(self) -> None:
        """Stop watching."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join(5)

    def supervise(self, now: float) -> None:
        """Look after the observer and the folder, at most every few seconds; rebuild with backoff.

        Args:
            now: a monotonic time, seconds.
        """
        if now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        trouble = self._examine()
        if trouble is None and self._trouble is None:
            return
        if self._trouble is None:
            log.warning("watcher.waiting", path=self._root, reason=trouble)
            self.stop()
        self._trouble = trouble or self._trouble
        if self._identity() is None:
            self._next_check = now + self._delay_seconds
            self._delay_seconds = min(CHECK_SECONDS, 2 * self._delay_seconds)
            return
        self.start()
        log.warning("watcher.restarted", path=self._root, reason=self._trouble)
        self._trouble, self._delay_seconds, self._rescan = None, 1.0, True

    def take_names(self) -> list[str]:
        """The names, relative to the inbox, that events mentioned since the last call."""
        with self._lock:
            names, self._names = self._names, set()
        return list(names)

    def take_rescan(self) -> bool:
        """Tell whether a whole rescan is wanted since the last call."""
        wanted, self._rescan = self._rescan, False
        return wanted

    def wait(self, seconds: float) -> None:
        """Sleep until an event, `wake`, or the time is over."""
        self._woken.wait(seconds)
        self._woken.clear()

    def wake(self) -> None:
        """End `wait`; safe in a signal handler."""
        self._woken.set()

    def notice(self, path: str, *, folder: bool) -> None:
        """Remember what an event named."""
        if folder:
            # What is written into a new folder before it is watched makes no event.
            self._rescan = self._rescan or self._recursive
        else:
            with self._lock:
                if len(self._names) < MAX_NAMES:
                    self._names.add(os.path.relpath(path, self._root))
                else:
                    self._rescan = True
        self._woken.set()

    def _observe(self) -> BaseObserver:
        observer = Observer()
        observer.schedule(_Handler(self), self._root, recursive=self._recursive, event_filter=_EVENTS)
        observer.start()
        return observer

    def _examine(self) -> str | None:
        """Tell in a few words what is wrong, None if nothing is."""
        identity = self._identity()
        if identity is None:
            return "the inbox is gone or cannot be listed"
        if identity != self._folder:
            return "the inbox is another folder now"
        observer = self._observer
        if observer is None:
            return None
        if not observer.is_alive() or not all(emitter.is_alive() for emitter in observer.emitters):
            return "the observer died"
        return None

    def _identity(self) -> tuple[int, int] | None:
        try:
            with os.scandir(self._root) as entries:
                next(entries, None)
            status = os.stat(self._root)
        except OSError:
            return None
        return status.st_dev, status.st_ino


class _Handler(FileSystemEventHandler):
    """Adds to a set and does nothing else: an exception in a handler ends watchdog's thread."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def on_any_event(self, event: FileSystemEvent) -> None:
        path = event.dest_path or event.src_path
        self._watcher.notice(os.fsdecode(path), folder=event.is_directory)
