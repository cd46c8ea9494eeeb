"""The settled files of the inbox. The scan decides; events only wake it.

In: a folder and a clock. Out: `Photo`s whose files have stopped changing.

A file is settled when
1. it is a regular file, not hidden, with no name that programs give to unfinished files;
2. its modification time is at least `settle_seconds` old (one look is enough), or, where that time is younger or in
   the future, two looks that far apart saw the same device, inode, size and times.

Nothing here opens a file: decoding works on an open descriptor and decides what the file contains.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sorter.errors import InboxGoneError
from sorter.files import FOLDER, HISTORY
from sorter.files.photo import Identity, Photo, file_of, open_folder, opened_folder
from sorter.inbox.selection import Selection


class Inbox:
    """The files of one folder, and which of them are still changing.

    Args:
        root: the folder.
        recursive: look into subfolders too; never through symbolic links.
        excluded: folders that photos are sorted into, as real paths.
        settle_seconds: how long a file must stay unchanged.
        selection: which files and folders count, by their names.
    """

    def __init__(
        self,
        root: Path,
        *,
        recursive: bool,
        excluded: frozenset[str],
        settle_seconds: float,
        selection: Selection | None = None,
    ) -> None:
        self.root = root.absolute()
        self.recursive = recursive
        self.settle_seconds = settle_seconds
        self.selection = selection or Selection()
        self._real_root = os.path.realpath(root)
        self._excluded = excluded
        self._anothers: set[str] = set()  # subfolders that other runs sort into
        self._own_outputs = frozenset(os.path.dirname(folder) for folder in excluded)
        self._excluded_files: frozenset[tuple[int, int]] = frozenset()  # the same by device and inode
        status = root.stat()
        self._folder = (status.st_dev, status.st_ino)
        self.unlisted: dict[str, str] = {}
        """Subfolders that the last scan did not list, and why."""
        self._changing: dict[str, tuple[Identity, float]] = {}  # name -> what it was, and when that was first seen

    @property
    def changing(self) -> list[str]:
        """Names of files that have been seen and are not settled yet."""
        return list(self._changing)

    def next_look(self, now: float) -> float:
        """When the first of them will be settled if nothing changes, in seconds since the epoch."""
        first_seen = [
            min(seen, identity.mtime_ns / 1e9) if identity.mtime_ns / 1e9 <= now else seen
            for identity, seen in self._changing.values()
        ]
        return min(first_seen, default=float("inf")) + self.settle_seconds

    def check(self) -> None:
        """Make sure that the inbox is still the same folder and can be opened.

        Raises:
            InboxGoneError: it is not.
        """
        try:
            with opened_folder(self.root, "") as descriptor:
                status = os.fstat(descriptor)
        except OSError as error:
            raise _gone(self.root, error) from error
        if (status.st_dev, status.st_ino) != self._folder:
            raise InboxGoneError(f"the inbox {self.root} is a different folder now: restart sorter")

    def scan(self, now: float) -> Iterator[Photo]:
        """List the inbox, one entry at a time, and yield the settled files.

        Raises:
            InboxGoneError: the inbox cannot be listed. Subfolders that are not are in `unlisted` afterwards.
        """
        self.unlisted, self._anothers = {}, set()
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
                if folder and file_of(descriptor) in self._excluded_files:  # reached by another path, such as a mount
                    continue
                if folder and self._is_anothers(folder, descriptor):
                    self._anothers.add(folder)
                    self.unlisted[folder] = "other runs sort from or into this folder: name it with --inbox or --output"
                    continue
                # By descriptor, not path: a swapped link cannot redirect the listing out of the inbox.
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
            self.unlisted[folder] = "this folder cannot be listed"

    def _is_anothers(self, folder: str, descriptor: int) -> bool:
        """Whether an open subfolder is the output of other runs: sorting it here too would part it from its history."""
        if os.path.join(self._real_root, folder) in self._own_outputs:
            return False
        try:
            os.stat(f"{FOLDER}/{HISTORY}", dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def enters(self, folder: str) -> bool:
        """Whether photos are taken from a subfolder."""
        return (
            self.selection.enters(folder)
            and folder not in self._anothers
            and os.path.join(self._real_root, folder) not in self._excluded
        )

    def _look(self, name: str, entry: "os.DirEntry[str]", now: float) -> Photo | None:
        if not self.selection.takes(name) or not entry.is_file(follow_symlinks=False):
            self._changing.pop(name, None)
            return None
        try:
            return self._settle(name, entry.stat(follow_symlinks=False), now)
        except OSError:  # gone since it was listed
            self._changing.pop(name, None)
            return None

    def look(self, name: str, now: float) -> Photo | None:
        """Look at one file by name; None unless it is settled."""
        folder, _, base = name.rpartition("/")
        if not self.selection.takes(name) or (folder and not (self.recursive and self._enters_all(folder))):
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
        """Look again at the files that were still changing, and yield those that are settled now."""
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
    reason = "is gone" if error.errno == errno.ENOENT else f"cannot be listed ({error.strerror})"
    return InboxGoneError(f"the inbox {root} {reason}: restore it and restart sorter")
