"""Steps on the file system that never overwrite, from which the mover is made.

No call unlinks "this name if it still is this file", so `take_away` renames the name to a hidden one that nobody else
knows, looks at what it got, and unlinks it only if it is that file; otherwise it is put back.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sorter.files.photo import FILE_FLAGS, Identity, opened_folder

_PARTIAL_SUFFIX, _AWAY_SUFFIX = ".sorter-part", ".sorter-away"

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""The file system cannot do what was asked; nothing has changed."""

_RENAME_NOREPLACE = 1
_COPY_BYTES = 1 << 20
_LONGEST_BYTES = 255 - len(".json")  # of a numbered name: file systems allow 255, and sidecars add to it


class StayedError(Exception):
    """The photo was not moved, for a reason of its own: its owner forbids it, its file system has no safe way."""


class ChangedError(StayedError):
    """The photo is not the file any more that was classified; a later look will tell what it is now."""


def new_token() -> str:
    """64 random bits: what makes a hidden name one that nobody else knows."""
    return secrets.token_hex(8)


def partial_name(token: str) -> str:
    """The hidden name of a move's unfinished copy or first link: it was made by that move, and exists elsewhere."""
    return f".{token}{_PARTIAL_SUFFIX}"


def away_name(token: str) -> str:
    """The hidden name of what a move takes away: it may turn out to be somebody else's, and the only one of that."""
    return f".{token}{_AWAY_SUFFIX}"


def take_away(folder: int, base: str, identity: Identity, token: str) -> bool:
    """Unlink a name if it still is this file; the file is known to exist, durably, under another name.

    Returns:
        False if the name is gone already.

    Raises:
        ChangedError: the name is another file's, or the file has changed.
    """
    hidden = away_name(token)
    try:
        _rename_away(folder, base, hidden)
    except FileNotFoundError:
        return False
    if Identity.of(os.stat(hidden, dir_fd=folder, follow_symlinks=False)).is_same_file(identity):
        try:
            os.unlink(hidden, dir_fd=folder)
        except OSError:
            give_back(folder, hidden, folder, base)
            raise
        return True
    give_back(folder, hidden, folder, base)
    raise ChangedError("changed while it was moved: both versions are kept")


def _rename_away(folder: int, base: str, hidden: str) -> None:
    try:
        rename_noreplace(folder, base, folder, hidden)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        # 64 random bits: there is nothing of that name to replace.
        os.rename(base, hidden, src_dir_fd=folder, dst_dir_fd=folder)


def sync_folder(folder: int) -> None:
    """Make the names in a folder durable, where its file system knows how."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise


def make_folder(path: Path) -> None:
    """Make a folder and the missing ones above it, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        with opened_folder(folder.parent, "") as descriptor:
            sync_folder(descriptor)


def give_back(target: int, name: str, source: int, base: str) -> None:
    """Put somebody else's file back where it was, under a free name if its own was taken meanwhile."""
    publish(target, name, source, [numbered(base, number) for number in range(1000)])


def publish(folder: int, name: str, target: int, names: Sequence[str]) -> str:
    """Give a file the first of some names that is free, and return that.

    Raises:
        OSError: the file system refused, or no name was free.
    """
    try:
        return _first_free(names, lambda free: rename_noreplace(folder, name, target, free))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise

    def link(free: str) -> None:
        os.link(name, free, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)

    published = _first_free(names, link)
    os.unlink(name, dir_fd=folder)
    return published


def _first_free(names: Sequence[str], place: Callable[[str], None]) -> str:
    """Try names until `place` finds one that is not taken, and return it.

    Raises:
        FileExistsError: all were taken.
    """
    for name in names:
        try:
            place(name)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def numbered(base: str, number: int) -> str:
    """`a.jpg` and 2 make `a-2.jpg`, cut so that it stays within the bytes that file systems allow."""
    if not number:
        return base
    stem, extension = os.path.splitext(base)
    tail = os.fsencode(f"-{number}{extension}")
    if len(tail) >= _LONGEST_BYTES:  # an extension that long is none
        stem, tail = base, os.fsencode(f"-{number}")
    return os.fsdecode(os.fsencode(stem)[: _LONGEST_BYTES - len(tail)] + tail)


def check_removable(folder: int, base: str) -> None:
    """Refuse before anything is copied what could not be taken out of its folder afterwards."""
    status = os.fstat(folder)
    allowed = os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=os.access in os.supports_effective_ids)
    if allowed and status.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid):
        allowed = os.stat(base, dir_fd=folder, follow_symlinks=False).st_uid == os.geteuid()
    if not allowed:
        raise StayedError("may not be taken out of its folder: give the sorter's user permission to change the folder")


def copy_contents(original: int, copy: int, status: os.stat_result) -> None:
    """Copy bytes, owner where allowed, extended attributes where they exist, mode and times, between descriptors."""
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
    # A photo that runs as its owner would run as the sorter's user, where the owner could not be kept.
    os.fchmod(copy, stat.S_IMODE(status.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))
    with contextlib.suppress(OverflowError):  # a date that the other file system cannot hold
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def same_contents(folder: int, name: str, other_folder: int, other_name: str) -> bool:
    """Tell whether two regular files have the same bytes."""
    with contextlib.ExitStack() as stack:
        descriptors = []
        for where, what in ((folder, name), (other_folder, other_name)):
            descriptors.append(os.open(what, FILE_FLAGS, dir_fd=where))
            stack.callback(os.close, descriptors[-1])
        first, second = map(os.fstat, descriptors)
        if os.path.samestat(first, second):
            return True
        if first.st_size != second.st_size or not (stat.S_ISREG(first.st_mode) and stat.S_ISREG(second.st_mode)):
            return False
        offsets = range(0, first.st_size, _COPY_BYTES)
        return all(len({os.pread(d, _COPY_BYTES, offset) for d in descriptors}) == 1 for offset in offsets)


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


def rename_noreplace(source: int, old: str, target: int, new: str) -> None:
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
