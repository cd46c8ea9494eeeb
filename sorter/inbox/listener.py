"""watchdog's observer for one inbox: its events become names to look at.

In: watchdog's events. Out: names relative to the inbox, and the reason why there will be no more of them.

On Linux the observer runs `emitter.InboxEmitter`; elsewhere (macOS, the BSDs) it is watchdog's stock observer, which
was never tried there.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable

from watchdog.events import DirAttribEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver

from sorter.inbox.emitter import InboxEmitter, WatchLostEvent
from sorter.inbox.scan import Inbox

_JOIN_SECONDS = 5.0
_NOT_ARRIVALS = {"deleted", "opened", "closed_no_write"}


class Listener(FileSystemEventHandler):
    """Hears one inbox, from the moment that it is made.

    Args:
        inbox: the folder, and which of its subfolders count.
        notice: called with the name of a file that was created, written, moved in or made readable.
        notice_all: called when names do not tell what changed.

    Raises:
        OSError: the inbox cannot be watched, or there are not enough watches for all of its folders.
    """

    def __init__(self, inbox: Inbox, notice: Callable[[str], None], notice_all: Callable[[], None]) -> None:
        self.failure: str | None = None
        """Why there will be no more events."""
        self.inbox_lost = False
        """Whether that is because the watched folder is no longer the inbox."""
        self._root, self._notice, self._notice_all = str(inbox.root), notice, notice_all
        self._observer = open_observer(inbox)
        self._observer.schedule(self, self._root, recursive=inbox.recursive)
        self._observer.start()

    def stop(self) -> None:
        """Stop the observer and release its watches."""
        # In a thread, since watchdog waits for its emitter, and that may hang in a file system that hangs.
        stopping = threading.Thread(target=self._stop, name="observer-stop", daemon=True)
        stopping.start()
        stopping.join(_JOIN_SECONDS)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Take one event from the observer, whose thread would end silently with an exception."""
        if self.failure is not None:
            return
        try:
            self._take(event)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _take(self, event: FileSystemEvent) -> None:
        path = os.fsdecode(event.dest_path or event.src_path)
        if isinstance(event, WatchLostEvent):
            self.inbox_lost = event.inbox_lost
            self._fail(event.reason)
        elif isinstance(event, DirAttribEvent) and path == self._root:
            self._notice_all()  # its permissions: what events named meanwhile may have been out of reach
        elif not event.is_directory and event.event_type not in _NOT_ARRIVALS:
            self._notice(os.path.relpath(path, self._root))

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._notice_all()

    def _stop(self) -> None:
        self._observer.stop()
        self._observer.join()


def open_observer(inbox: Inbox) -> BaseObserver:
    """The observer for this operating system, not started yet."""
    if sys.platform != "linux":
        from watchdog.observers import Observer  # on Linux it would load the stock emitter for nothing

        return Observer()
    return BaseObserver(functools.partial(InboxEmitter, inbox=inbox))  # type: ignore[arg-type]
