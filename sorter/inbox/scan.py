"""What is in the inbox and settled: the scan is the truth, events only wake it.

In: a folder and a clock. Out: `Photo`s whose files have stopped changing.

A file is settled when
1. it is a regular file, not hidden, with no name that programs give to unfinished files;
2. its modification time is at least `settle_seconds` old (one look is enough), or, where that time is younger or in
   the future, two looks that far apart saw the same device, inode, size and times.

Nothing here opens a file: what a file contains is decided from an open descriptor, further on.
"""

import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from sorter.errors import InboxGoneError
from sorter.files.photo import Identity, Photo, file_of, open_folder, opened_folder

# What downloads, copies, editors and synchronisers call a file that is not complete yet. Hidden names are never
# photos, so `.syncthing.*`, `.pending-*`, rsync's `.name.XXXXXX` and the like need no pattern.
TEMPORARY_NAMES = (
    "*.part",
    "*.partial",
    "*.filepart",
    "*.crdownload",
    "*.download",
    "*.opdownload",
    "*.!ut",
    "*.!qb",
    "*.!sync",
    "*.ffs_tmp",
    "*.aria2",
    "*.tmp",
    "*.temp",
    "*.swp",
    "*.lock",
    "~*",
    "*~",
)


def is_temporary(base: str) -> bool:
    """Tell whether a file's name says that it is hidden or not complete yet."""
    return base.startswith(".") or any(fnmatch(base.lower(), pattern) for pattern in TEMPORARY_NAMES)


class Inbox:
    """The files of one folder, and which of them are still changing.

    Args:
        root: the folder.
        recursive: look into subfolders too; never through symbolic links.
        excluded: folders that photos are sorted into, absolute and without symbolic links.
        settle_seconds: how long a file has to stay unchanged.
    """

    def __init__(self, root: Path, *, recursive: bool, excluded: frozenset[str], settle_seconds: float) -> None:
        self.root = root.absolute()
        self.recursive = recursive
        self.settle_seconds = settle_seconds
        self._real_root = os.path.realpath(root)
        self._excluded = excluded
        self._excluded_files: frozenset[tuple[int, int]] = frozenset()  # the same by device and inode
        status = root.stat()
        self._folder = (status.st_dev, status.st_ino)
        self.unlisted: list[str] = []
        """Subfolders that the last scan could not list."""
        self._changing: dict[str, tuple[Identity, float]] = {}  # name -> what it was, and when that was first seen

    @property
    def changing(self) -> list[str]:
        """Names of the files that were seen and are not settled yet."""
        return list(self._changing)

    def next_look(self, now: float) -> float:
        """When the first of them can be settled if nothing changes any more, in seconds since the epoch."""
        first_seen = [
            min(seen, identity.mtime_ns / 1e9) if identity.mtime_ns / 1e9 <= now else seen
            for identity, seen in self._changing.values()
        ]
        return min(first_seen, default=float("inf")) + self.settle_seconds

    def check(self) -> None:
        """Make sure that the inbox is still the folder it was, and can be listed.

        Raises:
            InboxGoneError: it is not.
        """
        try:
            with opened_folder(self.root, "") as descriptor:
                status = os.fstat(descriptor)
        except OSError as error:
            raise _gone(self.root, error) from error
        if (status.st_dev, status.st_ino) != self._folder:
            raise InboxGoneError(f"the inbox {self.root} is another folder now: start again")

    def scan(self, now: float) -> Iterator[Photo]:
        """List the whole inbox, one entry at a time, and yield what is settled.

        Raises:
            InboxGoneError: the inbox itself cannot be listed; a subfolder that cannot is in `unlisted` afterwards.
        """
        self.unlisted = []
        self._excluded_files = frozenset(filter(None, map(file_of, self._excluded)))
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                descriptor = open_folder(self.root, folder)
            except OSError as error:
                if folder:
                    self._note_unlisted(folder, error)
                    continue
                raise _gone(self.root, error) from error
            try:
                if folder and file_of(descriptor) in self._excluded_files:  # reached by another path, as a mount
                    continue
                # A descriptor, not a path: the listing cannot be led out of the inbox.
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if self.recursive and self.enters(name):
                                folders.append(name)
                        elif photo := self._look(name, entry, now):
                            yield photo
            except OSError as error:
                if not folder:
                    raise _gone(self.root, error) from error
                self._note_unlisted(folder, error)
            finally:
                os.close(descriptor)

    def _note_unlisted(self, folder: str, error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # gone, or replaced, since it was listed
            self.unlisted.append(folder)

    def enters(self, folder: str) -> bool:
        """Tell whether a subfolder is one that photos are taken from."""
        hidden = any(part.startswith(".") for part in folder.split("/"))
        return not hidden and os.path.join(self._real_root, folder) not in self._excluded

    def _look(self, name: str, entry: "os.DirEntry[str]", now: float) -> Photo | None:
        if is_temporary(entry.name) or not entry.is_file(follow_symlinks=False):
            self._changing.pop(name, None)
            return None
        try:
            return self._settle(name, entry.stat(follow_symlinks=False), now)
        except OSError:  # gone since it was listed
            self._changing.pop(name, None)
            return None

    def look(self, name: str, now: float) -> Photo | None:
        """Look at one file that an event or the wait for it to settle named; None if it is no settled file."""
        folder, _, base = name.rpartition("/")
        if is_temporary(base) or (folder and not (self.recursive and self._enters_all(folder))):
            return None
        try:
            with opened_folder(self.root, folder) as descriptor:
                status = os.stat(base, dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            self._changing.pop(name, None)
            return None
        if not stat.S_ISREG(status.st_mode):
            self._changing.pop(name, None)
            return None
        return self._settle(name, status, now)

    def look_again(self, now: float) -> Iterator[Photo]:
        """Look at every file that was not settled yet, and yield those that are now."""
        for name in self.changing:
            if photo := self.look(name, now):
                yield photo

    def _enters_all(self, folder: str) -> bool:
        parts = folder.split("/")
        return all(self.enters("/".join(parts[: i + 1])) for i in range(len(parts)))

    def _settle(self, name: str, status: os.stat_result, now: float) -> Photo | None:
        identity = Identity.of(status)
        before, seen = self._changing.get(name, (identity, now))
        if before != identity:
            seen = now
        age = now - identity.mtime_ns / 1e9
        if age >= self.settle_seconds or (before == identity and now - seen >= self.settle_seconds):
            self._changing.pop(name, None)
            return Photo(self.root, name, identity, seen)
        self._changing[name] = (identity, seen)
        return None


def _gone(root: Path, error: OSError) -> InboxGoneError:
    said = "is not there any more" if error.errno == errno.ENOENT else f"cannot be listed ({error.strerror})"
    return InboxGoneError(f"the inbox {root} {said}: put it back and start again")
