"""The only code that changes the user's files.

In: a photo's name, its identity, and the folder it belongs in. Out: where it is now, or why it stayed.

Promise: at every instant, and after `kill -9` at any instant, the photo exists whole under at least one of its two
names, and nothing that was there before is overwritten or deleted.

- One file system: `renameat2(RENAME_NOREPLACE)`, then a look at what arrived; another file's arrival is undone.
- A file system without it: hard link, then the old name is taken away.
- Another file system: copy to a hidden partial name with mode, times and extended attributes, fsync, publish without
  replacing, fsync the folder, then the old name is taken away.

`shutil.move` and `os.rename` overwrite or half-copy, so they have no place here.
"""

import contextlib
import errno
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from sorter.atomic import (
    UNSUPPORTED,
    ChangedError,
    StayedError,
    check_removable,
    copy_contents,
    first_free,
    give_back,
    hidden_name,
    numbered,
    publish,
    rename_noreplace,
    take_away,
)
from sorter.errors import StorageError
from sorter.inbox import Identity, Photo, open_file, open_folder

# What a hard link is refused with where there are none, or no more.
_NO_LINKS = (*UNSUPPORTED, errno.EPERM, errno.EMLINK)
# Nothing can be moved until somebody makes room or mends the disk.
_STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)


class Mover:
    """Moves photos from the inbox into the folders beside each other in `output`.

    Args:
        output: the folder that has `cats/` and the others; folders are made when first needed.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.lock = threading.Lock()
        """Held while one photo moves: whoever holds it can end the process with nothing half moved."""
        self._touched: set[tuple[Path, str]] = set()
        self._next_number: dict[tuple[str, str], int] = {}
        self._linked: set[tuple[int, int]] = set()  # device and inode of moved files that have other names too
        self._promised: set[str] = set()  # destinations that a dry run has named
        self._folder: tuple[int, int] | None = None  # the output's own device and inode, once it was used

    def destination(self, photo: Photo, folder: str) -> str:
        """Where `move` would put a photo; changes nothing."""
        base = os.path.basename(photo.name)
        paths = (os.path.join(self.output, folder, numbered(base, number)) for number in itertools.count())
        path = next(path for path in paths if path not in self._promised and not os.path.lexists(path))
        self._promised.add(path)
        return path

    def move(self, photo: Photo, folder: str) -> str:
        """Move one photo and return its new path; `settle` makes a batch of moves durable.

        Raises:
            StayedError: this photo stays where it is; `ChangedError` if it is not the one any more that was classified.
            StorageError: no photo can be moved now; this one is still where it was.
        """
        source_folder, _, base = photo.name.rpartition("/")
        with self.lock:
            try:
                with _opened(photo.root, source_folder) as source:
                    self._check(source, base, photo.identity)
                    check_removable(source, base)
                    with self._target(folder) as target:
                        try:
                            name = self._place(photo, source, target, base, folder)
                        except PermissionError as error:
                            if error.errno == errno.EACCES and not os.access(self.output / folder, os.W_OK):
                                raise self._refused(folder, error) from error
                            raise StayedError("may not be moved: its folder or its owner forbids it") from error
            except OSError as error:
                if error.errno in _STORAGE:
                    raise self._refused(folder, error) from error
                gone = error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
                if gone:
                    raise ChangedError("is gone") from error
                raise StayedError(f"cannot be moved: {error.strerror}") from error
            self._touched |= {(photo.root, source_folder), (self.output, folder)}
        return os.path.join(self.output, folder, name)

    @contextlib.contextmanager
    def _target(self, folder: str) -> Iterator[int]:
        """The descriptor of a destination folder, made where it is missing."""
        try:
            if self._folder is None:
                self.output.mkdir(parents=True, exist_ok=True)
            status = self.output.stat()
            if self._folder not in (None, (status.st_dev, status.st_ino)):
                # A disk that was unmounted leaves an empty folder behind: nothing belongs there.
                raise OSError(errno.ENODEV, "it is not the folder any more that it was at the start")
            self._folder = (status.st_dev, status.st_ino)
            if not os.path.lexists(self.output / folder):
                (self.output / folder).mkdir(exist_ok=True)
                self._touched.add((self.output, ""))
            descriptor = open_folder(self.output, folder)
        except OSError as error:
            raise self._refused(folder, error) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _refused(self, folder: str, error: OSError) -> StorageError:
        return StorageError(
            f"{self.output / folder} takes no photos ({error.strerror}): make room or mend the folder, and start again"
        )

    def settle(self) -> None:
        """Make the moves since the last call durable: one fsync a folder, the destinations' first.

        Raises:
            StorageError: the disk refused.
        """
        touched, self._touched = self._touched, set()
        for root, folder in sorted(touched, key=lambda place: place[0] != self.output):
            # A folder that was taken away since holds nothing that could be lost by not syncing it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                try:
                    with _opened(root, folder) as descriptor:
                        os.fsync(descriptor)
                except OSError as error:
                    if error.errno in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
                        continue
                    if error.errno in _STORAGE:
                        raise StorageError(f"{root / folder} cannot be synced ({error.strerror})") from error
                    raise

    def _place(self, photo: Photo, source: int, target: int, base: str, folder: str) -> str:
        """Put the file under the first free of `name.jpg`, `name-1.jpg`, `name-2.jpg` …; return that name."""
        if os.fstat(source).st_dev != os.fstat(target).st_dev:
            return self._copy_across(photo, source, target, base, folder)
        try:
            names = self._free_names(base, folder)
            name = first_free(names, lambda free: rename_noreplace(source, base, target, free))
        except OSError as error:
            if error.errno == errno.EXDEV:  # two bind mounts of one file system
                return self._copy_across(photo, source, target, base, folder)
            if error.errno not in UNSUPPORTED:
                raise
            return self._link_across(photo, source, target, base, folder)
        arrived = os.stat(name, dir_fd=target, follow_symlinks=False)
        if not Identity.of(arrived).is_same_file(photo.identity):
            # Somebody put another file under the name between the look and the rename: it goes back.
            give_back(target, name, source, base)
            raise ChangedError("changed while it was moved")
        self._note_links(arrived)
        return name

    def _link_across(self, photo: Photo, source: int, target: int, base: str, folder: str) -> str:
        def link(free: str) -> None:
            os.link(base, free, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

        try:
            name = first_free(self._free_names(base, folder), link)
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StayedError(
                    "its file system can neither rename without replacing nor make hard links: sort into a folder on "
                    "another file system with --output"
                ) from error
            raise
        arrived = os.stat(name, dir_fd=target, follow_symlinks=False)
        if not Identity.of(arrived).is_same_file(photo.identity):
            os.unlink(name, dir_fd=target)  # a second name of a file that keeps its first
            raise ChangedError("changed while it was moved")
        self._note_links(arrived)
        os.fsync(target)
        self._finish(source, base, photo.identity, target, name, photo.identity)
        return name

    def _copy_across(self, photo: Photo, source: int, target: int, base: str, folder: str) -> str:
        partial = hidden_name()
        original = open_file(photo)
        try:
            status = os.fstat(original)
            if not Identity.of(status).is_same_file(photo.identity):
                raise ChangedError("changed while it was moved")
            copy = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                copy_contents(original, copy, status)
                os.fsync(copy)
                copied = Identity.of(os.fstat(copy))
            finally:
                os.close(copy)
            self._check(source, base, photo.identity)
            name = publish(target, partial, target, lambda: self._free_names(base, folder))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=target)
            raise
        finally:
            os.close(original)
        os.fsync(target)
        self._note_links(status)
        self._finish(source, base, photo.identity, target, name, copied)
        return name

    def _note_links(self, status: os.stat_result) -> None:
        """Remember a file that has other names: moving one of them changes the status of all."""
        if status.st_nlink > 1:
            self._linked.add((status.st_dev, status.st_ino))

    def _finish(self, source: int, base: str, identity: Identity, target: int, name: str, published: Identity) -> None:
        """Take the old name away; where that is refused, take back the new one, so that none has two for good."""
        try:
            take_away(source, base, identity)
        except OSError as error:
            here = Identity.of(os.stat(base, dir_fd=source, follow_symlinks=False))
            there = Identity.of(os.stat(name, dir_fd=target, follow_symlinks=False))
            if here.is_same_file(identity) and there.is_same_file(published):
                os.unlink(name, dir_fd=target)
            raise StayedError(f"may not be taken out of its folder ({error.strerror})") from error

    def _check(self, folder: int, base: str, identity: Identity) -> None:
        """Make sure that a name still is the file that was classified."""
        try:
            status = os.stat(base, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise ChangedError("is gone") from None
        found = Identity.of(status)
        # The status of a file with several names changes when one of them moves.
        by_us = found.is_same_file(identity) and (found.device, found.inode) in self._linked
        if not stat.S_ISREG(status.st_mode) or (found != identity and not by_us):
            raise ChangedError("changed after it was classified")

    def _free_names(self, base: str, folder: str) -> Iterator[str]:
        """`name.jpg`, `name-1.jpg` … without end, going on where the last photo of that name found room."""
        yield base
        while True:
            number = self._next_number[folder, base] = self._next_number.get((folder, base), 0) + 1
            yield numbered(base, number)


@contextlib.contextmanager
def _opened(root: Path, relative: str) -> Iterator[int]:
    descriptor = open_folder(root, relative)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
