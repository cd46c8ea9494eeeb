"""The only code that changes the user's files.

In: a photo's name, its identity, and the folder it belongs in. Out: where it is now, or why it stayed.

Promise: at every instant, and after `kill -9` at any instant, the photo exists whole under at least one of its two
names, and nothing that was there before is overwritten or deleted.

- One file system: `renameat2(RENAME_NOREPLACE)`, then a look at what arrived; another file's arrival is undone.
- A file system without it: hard link, then the old name is taken away.
- Another file system: copy to a hidden partial name with mode, times and extended attributes, fsync, publish without
  replacing, fsync the folder, then the old name is taken away.

A name is taken away in two steps, because no call unlinks "this name if it still is this file": it is renamed to a
hidden name nobody else knows, looked at, and unlinked only if it is the file that was moved; otherwise put back.
`shutil.move` and `os.rename` overwrite or half-copy, so they have no place here.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from sorter.errors import StorageError
from sorter.inbox import Identity, Photo, open_file, open_folder

PARTIAL_SUFFIX = ".sorter-part"
"""Ends every hidden name made here: an unfinished copy in a destination, in the inbox a photo that was copied."""

_RENAME_NOREPLACE = 1
_COPY_BYTES = 1 << 20

# The file system cannot do what was asked; the photo is untouched and nothing else is wrong.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_LINKS = (*_UNSUPPORTED, errno.EPERM, errno.EMLINK)
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


class StayedError(Exception):
    """The photo was not moved, for a reason of its own: its owner forbids it, its file system has no safe way."""


class ChangedError(StayedError):
    """The photo is not the file any more that was classified; a later look will tell what it is now."""


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
        number = 0
        while (path := os.path.join(self.output, folder, numbered(base, number))) in self._promised or os.path.lexists(
            path
        ):
            number += 1
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
                    _check_removable(source, base)
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
        for name in self._free_names(base, folder):
            try:
                _rename_noreplace(source, base, target, name)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno == errno.EXDEV:  # two bind mounts of one file system
                    return self._copy_across(photo, source, target, base, folder)
                if error.errno not in _UNSUPPORTED:
                    raise
                return self._link_across(photo, source, target, base, folder)
            arrived = os.stat(name, dir_fd=target, follow_symlinks=False)
            if not Identity.of(arrived).is_same_file(photo.identity):
                # Somebody put another file under the name between the look and the rename: it goes back.
                _give_back(target, name, source, base)
                raise ChangedError("changed while it was moved")
            if arrived.st_nlink > 1:
                self._linked.add((arrived.st_dev, arrived.st_ino))
            return name
        raise AssertionError("names never run out")

    def _link_across(self, photo: Photo, source: int, target: int, base: str, folder: str) -> str:
        for name in self._free_names(base, folder):
            try:
                os.link(base, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise StayedError(
                        "its file system can neither rename without replacing nor make hard links: "
                        "sort into a folder on another file system with --output"
                    ) from error
                raise
            if not Identity.of(os.stat(name, dir_fd=target, follow_symlinks=False)).is_same_file(photo.identity):
                os.unlink(name, dir_fd=target)  # a second name of a file that keeps its first
                raise ChangedError("changed while it was moved")
            os.fsync(target)
            self._finish(source, base, photo.identity, target, name, photo.identity)
            return name
        raise AssertionError("names never run out")

    def _copy_across(self, photo: Photo, source: int, target: int, base: str, folder: str) -> str:
        partial = _hidden_name()
        original = open_file(photo)
        try:
            status = os.fstat(original)
            if Identity.of(status) != photo.identity:
                raise ChangedError("changed while it was moved")
            copy = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                _copy(original, copy, status)
                os.fsync(copy)
                copied = Identity.of(os.fstat(copy))
            finally:
                os.close(copy)
            self._check(source, base, photo.identity)
            name = self._publish(target, partial, base, folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=target)
            raise
        finally:
            os.close(original)
        os.fsync(target)
        self._finish(source, base, photo.identity, target, name, copied)
        return name

    def _finish(self, source: int, base: str, identity: Identity, target: int, name: str, published: Identity) -> None:
        """Take the old name away; where that is refused, take back the new one, so that none has two for good."""
        try:
            _take_away(source, base, identity)
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
        # Moving one of a file's hard links changes the status of the others.
        by_us = found.is_same_file(identity) and (found.device, found.inode) in self._linked
        if not stat.S_ISREG(status.st_mode) or (found != identity and not by_us):
            raise ChangedError("changed after it was classified")

    def _publish(self, target: int, partial: str, base: str, folder: str) -> str:
        """Give our own finished copy its name, without replacing anything."""
        for name in self._free_names(base, folder):
            try:
                _rename_noreplace(target, partial, target, name)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                try:
                    os.link(partial, name, src_dir_fd=target, dst_dir_fd=target, follow_symlinks=False)
                except FileExistsError:
                    continue
                os.unlink(partial, dir_fd=target)
            return name
        raise AssertionError("names never run out")

    def _free_names(self, base: str, folder: str) -> Iterator[str]:
        """`name.jpg`, `name-1.jpg` … without end, going on where the last photo of that name found room."""
        yield base
        while True:
            number = self._next_number[folder, base] = self._next_number.get((folder, base), 0) + 1
            yield numbered(base, number)


def numbered(base: str, number: int) -> str:
    """`a.jpg` and 2 make `a-2.jpg`, cut so that the name stays within the 255 bytes that file systems allow."""
    if not number:
        return base
    stem, extension = os.path.splitext(base)
    tail = os.fsencode(f"-{number}{extension}")
    if len(tail) > 254:  # an extension that long is none
        stem, tail = base, os.fsencode(f"-{number}")
    return os.fsdecode(os.fsencode(stem)[: 255 - len(tail)] + tail)


@contextlib.contextmanager
def _opened(root: Path, relative: str) -> Iterator[int]:
    descriptor = open_folder(root, relative)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_removable(folder: int, base: str) -> None:
    """Refuse before anything is copied what could not be taken out of its folder afterwards."""
    status = os.fstat(folder)
    allowed = os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=os.access in os.supports_effective_ids)
    if allowed and status.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid):
        allowed = os.stat(base, dir_fd=folder, follow_symlinks=False).st_uid == os.geteuid()
    if not allowed:
        raise StayedError("may not be taken out of its folder: give the sorter's user permission to change the folder")


def _hidden_name() -> str:
    return f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"


def _take_away(folder: int, base: str, identity: Identity) -> None:
    """Unlink a name if it still is this file; the file is known to exist, durably, under another name."""
    hidden = _hidden_name()
    try:
        _rename_away(folder, base, hidden)
    except FileNotFoundError:
        return
    if Identity.of(os.stat(hidden, dir_fd=folder, follow_symlinks=False)).is_same_file(identity):
        os.unlink(hidden, dir_fd=folder)
        return
    _give_back(folder, hidden, folder, base)
    raise ChangedError("changed while it was moved: both versions are kept")


def _rename_away(folder: int, base: str, hidden: str) -> None:
    try:
        _rename_noreplace(folder, base, folder, hidden)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        # 64 random bits: there is nothing of that name to replace.
        os.rename(base, hidden, src_dir_fd=folder, dst_dir_fd=folder)


def _give_back(target: int, name: str, source: int, base: str) -> None:
    """Put somebody else's file back where it was, under a free name if its own was taken meanwhile."""
    for number in range(1000):
        try:
            _rename_noreplace(target, name, source, numbered(base, number))
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            try:
                os.link(name, numbered(base, number), src_dir_fd=target, dst_dir_fd=source, follow_symlinks=False)
            except FileExistsError:
                continue
            os.unlink(name, dir_fd=target)
        return


def _copy(original: int, copy: int, status: os.stat_result) -> None:
    offset = 0
    while block := _read(original, offset):
        view = memoryview(block)
        while view:
            view = view[os.write(copy, view) :]
        offset += len(block)
    if offset != status.st_size:
        raise ChangedError("changed while it was moved")
    # Owner first: changing it clears mode bits. Only root may, and a copy of one's own is right without.
    with contextlib.suppress(PermissionError):
        os.fchown(copy, status.st_uid, status.st_gid)
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):  # the other file system may have no extended attributes
            for attribute in os.listxattr(original):
                with contextlib.suppress(OSError):
                    os.setxattr(copy, attribute, os.getxattr(original, attribute))
    os.fchmod(copy, stat.S_IMODE(status.st_mode))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def _read(original: int, offset: int) -> bytes:
    try:
        return os.pread(original, _COPY_BYTES, offset)
    except OSError as error:  # the source's disk, not the destination's
        raise StayedError(f"cannot be read ({error.strerror})") from error


def _load_rename() -> "ctypes._NamedFuncPointer | None":
    library = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renameatx_np"
    function = getattr(library, name, None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


_rename_function = _load_rename()
# macOS: RENAME_EXCL of renameatx_np(2).
_rename_flag = _RENAME_NOREPLACE if sys.platform == "linux" else 4


def _rename_noreplace(source: int, old: str, target: int, new: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE.

    Raises:
        FileExistsError: the new name is taken.
        OSError: anything else; ENOSYS where the C library has no such call.
    """
    if _rename_function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _rename_function(source, os.fsencode(old), target, os.fsencode(new), _rename_flag) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)
