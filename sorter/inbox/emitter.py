"""An emitter for watchdog's observer that reports what the stock one for Linux hides.

In: inotify's events for one inbox. Out: watchdog's events, and a `WatchLostEvent` when there will be no more of them.

README.md beside this file compares it with the stock emitter, fault by fault. It repairs nothing: the watcher does.
"""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from watchdog.events import (
    DirAttribEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileSystemEvent,
)
from watchdog.observers.api import EventEmitter

from sorter.files.photo import opened_folder
from sorter.inbox import inotify
from sorter.inbox.inotify import Event, Inotify
from sorter.inbox.scan import Inbox

_EVENTS = inotify.CREATE | inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.ATTRIB | inotify.ONLY_FOLDERS
_LIMITS = (errno.ENOSPC, errno.ENOMEM)


@dataclass(unsafe_hash=True)
class WatchLostEvent(FileSystemEvent):
    """The last event of an emitter.

    Attributes:
        reason: in a few words, for the log.
        inbox_lost: the watched folder is no longer the inbox.
    """

    reason: str = ""
    inbox_lost: bool = False
    event_type: ClassVar[str] = "watch_lost"  # type: ignore[misc]


class InboxEmitter(EventEmitter):
    """Watches one inbox, and those of its subfolders that photos are taken from.

    Args:
        inbox: says which subfolders count.

    Raises:
        OSError: from `start`, if the inbox cannot be watched or there are not enough watches for all of its folders.
    """

    def __init__(self, *arguments: Any, inbox: Inbox, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._inbox = inbox
        self._folders: dict[int, str] = {}  # watch -> path inside the inbox
        self._inotify: Inotify | None = None
        self._closing = threading.Lock()

    def on_thread_start(self) -> None:
        """Add the watches before the thread starts, so that a failure reaches whoever starts it."""
        self._inotify = Inotify()
        try:
            self._add_watches("", lambda _: None)
        except BaseException:
            self._close()
            raise

    def on_thread_stop(self) -> None:
        """End the wait for events."""
        with self._closing:
            if self._inotify is not None:
                self._inotify.end()

    def run(self) -> None:
        """Queue events until the emitter is stopped or events end."""
        try:
            super().run()
        finally:
            self._close()

    def queue_events(self, timeout: float) -> None:
        """Wait for inotify's next events and queue them."""
        lost: WatchLostEvent | None = None
        try:
            assert self._inotify is not None
            for event in self._inotify.read():
                if lost := self._translate(event):
                    break
        except OSError as error:
            lost = self._lost(str(error.strerror))
        except Exception as error:  # a thread that ends silently would leave an inbox that nobody watches
            lost = self._lost(f"{type(error).__name__}: {error}")
        if lost is not None:
            self.queue_event(lost)
            self.stop()

    def _close(self) -> None:
        with self._closing:
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None

    def _translate(self, event: Event) -> WatchLostEvent | None:
        """Queue what watchdog calls one of inotify's events; return why there will be no more, if it says so."""
        if event.mask & inotify.QUEUE_OVERFLOW:
            return self._lost("more happened at once than the inotify event queue holds")
        folder = self._folders.get(event.watch)
        if folder is None:  # no longer watched
            return None
        if not event.name:
            return self._translate_own(event, folder)
        name = os.path.join(folder, event.name)
        if event.mask & inotify.IS_FOLDER:
            if event.mask & inotify.MOVED_FROM:
                self._forget(name)
            elif self._inbox.recursive and self._inbox.enters(name):
                self._add_watches(name, self._queue_created)
        elif event.mask & inotify.CLOSE_WRITE:
            self.queue_event(FileClosedEvent(self._path(name)))
        elif event.mask & inotify.ATTRIB:
            self.queue_event(FileAttribEvent(self._path(name)))
        elif not event.mask & inotify.MOVED_FROM:
            self._queue_created(name)
        return None

    def _translate_own(self, event: Event, folder: str) -> WatchLostEvent | None:
        """The same for an event of a watched folder itself."""
        if folder:
            if event.mask & inotify.IGNORED:
                del self._folders[event.watch]
            return None
        if event.mask & inotify.UNMOUNT:
            return self._lost("the file system of the inbox was unmounted", inbox_lost=True)
        if event.mask & inotify.MOVE_SELF:
            return self._lost("the inbox was renamed", inbox_lost=True)
        if event.mask & (inotify.DELETE_SELF | inotify.IGNORED):
            return self._lost("the inbox was deleted", inbox_lost=True)
        self.queue_event(DirAttribEvent(self._path("")))
        return None

    def _add_watches(self, folder: str, found: Callable[[str], None]) -> None:
        """Watch a folder and the subfolders that count, then report the files that were there before."""
        assert self._inotify is not None
        folders = [folder]
        while folders:
            folder = folders.pop()
            extra = inotify.DONT_FOLLOW if folder else inotify.DELETE_SELF | inotify.MOVE_SELF
            if self._inbox.recursive:
                extra |= inotify.MOVED_FROM
            try:
                watch = self._inotify.watch(self._path(folder), _EVENTS | extra)
            except OSError as error:
                if error.errno in _LIMITS or not folder:
                    raise
                continue  # gone again, or not readable: the scan reports that
            self._folders[watch] = folder
            if self._inbox.recursive:
                folders += self._list(folder, found)

    def _list(self, folder: str, found: Callable[[str], None]) -> list[str]:
        """Report the files in a folder and return its subfolders that count."""
        inner: list[str] = []
        try:
            with opened_folder(self._inbox.root, folder) as descriptor, os.scandir(descriptor) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if not entry.is_dir(follow_symlinks=False):
                        found(name)
                    elif self._inbox.enters(name):
                        inner.append(name)
        except OSError:  # gone, or not readable
            return []
        return inner

    def _forget(self, folder: str) -> None:
        """Stop watching a folder that was moved away; if it arrives elsewhere in the inbox, it is watched there."""
        assert self._inotify is not None
        for watch, path in list(self._folders.items()):
            if path == folder or path.startswith(folder + "/"):
                self._inotify.unwatch(watch)
                del self._folders[watch]

    def _queue_created(self, name: str) -> None:
        self.queue_event(FileCreatedEvent(self._path(name)))

    def _lost(self, reason: str, *, inbox_lost: bool = False) -> WatchLostEvent:
        return WatchLostEvent(self._path(""), reason=reason, inbox_lost=inbox_lost)

    def _path(self, name: str) -> str:
        return os.path.join(self._inbox.root, name) if name else str(self._inbox.root)
