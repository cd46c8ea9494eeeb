"""The thread that hears what changes in the inbox.

In: inotify's events. Out: names, relative to the inbox, and the reason why there will be no more of them. It does not
mend anything: the watcher does, and builds a new one.
"""

import errno
import os
import threading
from collections.abc import Callable

from sorter.files.photo import opened_folder
from sorter.inbox import inotify
from sorter.inbox.inotify import Event, Inotify
from sorter.inbox.scan import Inbox

_EVENTS = inotify.CREATE | inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.ATTRIB | inotify.ONLY_FOLDERS
_LIMITS = (errno.ENOSPC, errno.ENOMEM)
_JOIN_SECONDS = 5.0


class Listener:
    """Hears one inbox, from the moment that it is made.

    Args:
        inbox: says which folder, whether its subfolders count, and which of them do not.
        notice: called with the name of a file that was made, written, moved in or made readable.
        notice_all: called when names do not tell what changed.

    Raises:
        OSError: the inbox cannot be watched, or there are not enough watches for all of its folders.
    """

    def __init__(self, inbox: Inbox, notice: Callable[[str], None], notice_all: Callable[[], None]) -> None:
        self.failure: str | None = None
        """Why there will be no more events."""
        self.inbox_lost = False
        """Whether that is because the folder that was watched is not the inbox any more."""
        self._inbox, self._notice, self._notice_all = inbox, notice, notice_all
        self._folders: dict[int, str] = {}  # watch -> path inside the inbox
        self._inotify = Inotify()
        try:
            self._watch("", lambda _: None)
        except BaseException:
            self._inotify.close()
            raise
        self._thread = threading.Thread(target=self._run, name="inotify", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and give all watches back."""
        self._inotify.end()
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():  # it hangs in a file system that hangs: better a few descriptors lost
            self._inotify.close()

    def _run(self) -> None:
        try:
            for event in self._inotify.events():
                self.failure = self._hear(event)
                if self.failure is not None:
                    break
        except OSError as error:
            self.failure = str(error.strerror)
        except Exception as error:  # a thread that ends in silence would leave an inbox that nobody hears
            self.failure = f"{type(error).__name__}: {error}"
        self._notice_all()

    def _hear(self, event: Event) -> str | None:
        """Take one event; tell why there will be no more, if that is what it says."""
        if event.mask & inotify.QUEUE_OVERFLOW:
            return "more happened at once than the inotify event queue holds"
        folder = self._folders.get(event.watch)
        if folder is None:  # it is not watched any more
            return None
        if not event.name:
            return self._hear_of_itself(event, folder)
        name = os.path.join(folder, event.name)
        if not event.mask & inotify.IS_FOLDER:
            if not event.mask & inotify.MOVED_FROM:
                self._notice(name)
        elif event.mask & inotify.MOVED_FROM:
            self._forget(name)
        elif self._inbox.recursive and self._inbox.enters(name):
            self._watch(name, self._notice)
        return None

    def _hear_of_itself(self, event: Event, folder: str) -> str | None:
        if folder:
            if event.mask & inotify.IGNORED:
                del self._folders[event.watch]
            return None
        self.inbox_lost = not event.mask & inotify.ATTRIB
        if event.mask & inotify.UNMOUNT:
            return "the file system of the inbox was unmounted"
        if event.mask & inotify.MOVE_SELF:
            return "the inbox was renamed"
        if event.mask & (inotify.DELETE_SELF | inotify.IGNORED):
            return "the inbox was deleted"
        self._notice_all()  # its permissions: what was named meanwhile may have been out of reach
        return None

    def _watch(self, folder: str, found: Callable[[str], None]) -> None:
        """Watch a folder, and those in it where they count; then name what was in them before they were watched."""
        folders = [folder]
        while folders:
            folder = folders.pop()
            extra = inotify.DONT_FOLLOW if folder else inotify.DELETE_SELF | inotify.MOVE_SELF
            if self._inbox.recursive:
                extra |= inotify.MOVED_FROM
            try:
                watch = self._inotify.watch(os.path.join(self._inbox.root, folder), _EVENTS | extra)
            except OSError as error:
                if error.errno in _LIMITS or not folder:
                    raise
                continue  # gone again, or nothing that we may list: then the scan says so
            self._folders[watch] = folder
            if self._inbox.recursive:
                folders += self._list(folder, found)

    def _list(self, folder: str, found: Callable[[str], None]) -> list[str]:
        """Name the files of a folder and return those of its subfolders that count."""
        inner: list[str] = []
        try:
            with opened_folder(self._inbox.root, folder) as descriptor, os.scandir(descriptor) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if not entry.is_dir(follow_symlinks=False):
                        found(name)
                    elif self._inbox.enters(name):
                        inner.append(name)
        except OSError:  # gone, or out of reach
            pass
        return inner

    def _forget(self, folder: str) -> None:
        """Watch a folder no more that was moved away, nor those in it."""
        for watch, watched in list(self._folders.items()):
            if watched == folder or watched.startswith(f"{folder}/"):
                del self._folders[watch]
                self._inotify.unwatch(watch)
