"""The file system operations of the mover; none of them ever overwrites a file with something in it.

No system call unlinks "this name if it is still this file". So `take_away` renames it to a hidden name that nobody else
knows, checks which file it got, and unlinks it only if it is the right one; otherwise it renames it back.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sorter.files import inodes
from sorter.files.photo import COARSE_NS, FILE_FLAGS, Identity, open_folder, open_part, opened_folder

_PARTIAL_SUFFIX, _AWAY_SUFFIX = ".sorter-part", ".sorter-away"

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of a file system that does not support an operation; nothing has changed."""

_RENAME_NOREPLACE = 1
_RESERVATION = b"sorter is moving a photo here.\n"
_COPY_BYTES = 1 << 20
_TICK_NS = 10_000_000  # new times of files are those of the kernel's last tick: up to this long ago
_FICLONE = 0x40049409  # of linux/fs.h; where it is another number, contents are copied
_LONGEST_BYTES = 255 - len(".json")  # of a numbered name: file systems allow 255, and a sidecar appends to it


class StayedError(Exception):
    """This photo was not moved, for a reason that concerns it alone, such as its permissions or its file system."""


class ChangedError(StayedError):
    """The photo is no longer the file that was classified; it will be looked at again."""


class TakenError(ChangedError):
    """The photo is the same, but another file has taken its planned name meanwhile."""


def new_token() -> str:
    """64 random bits in hexadecimal, for a hidden name that nobody else knows."""
    return secrets.token_hex(8)


def partial_name(token: str) -> str:
    """The hidden name of a move's unfinished copy or first link: made by that move, so its contents exist elsewhere."""
    return f".{token}{_PARTIAL_SUFFIX}"


def away_name(token: str) -> str:
    """The hidden name of a file that a move is about to unlink: it may turn out to be another file's only name."""
    return f".{token}{_AWAY_SUFFIX}"


def take_away(
    folder: int, base: str, identity: Identity, token: str, is_wanted: Callable[[], bool] = lambda: False
) -> bool:
    """Unlink a name if it is still this file. The file must exist, durably, under another name.

    Args:
        folder: that the name is in.
        base: the name.
        identity: of the file.
        token: of the move, for the hidden name.
        is_wanted: asked at the last moment: True if another program has begun to use the file.

    Returns:
        False if the name is already gone.

    Raises:
        ChangedError: the name belongs to another file, the file has changed, or it is wanted.
    """
    hidden, began = away_name(token), time.time_ns()
    try:
        _rename_away(folder, base, hidden)
    except FileNotFoundError:
        return False
    found = Identity.of(status_after_rename(folder, hidden, identity, began))
    if found.is_same_file(identity) and not is_wanted():
        try:
            os.unlink(hidden, dir_fd=folder)
        except OSError:
            give_back(folder, hidden, folder, base)
            raise
        return True
    give_back(folder, hidden, folder, base)
    raise ChangedError("changed while it was being moved: both versions are kept")


def _rename_away(folder: int, base: str, hidden: str) -> None:
    try:
        rename_noreplace(folder, base, folder, hidden)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        # 64 random bits: no file of that name exists that could be replaced.
        os.rename(base, hidden, src_dir_fd=folder, dst_dir_fd=folder)


def status_after_rename(folder: int, name: str, identity: Identity, began_ns: int) -> os.stat_result:
    """The status of a file that was just renamed; where that set its time, as fusefat does, it gets its own back.

    Args:
        folder: that the file is in now.
        name: that it has now.
        identity: that it had before.
        began_ns: when the rename began, in nanoseconds since the epoch.
    """
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    found = Identity.of(status)
    if found.inode or found.is_same_file(identity):
        return status
    is_new_time = began_ns - _TICK_NS - COARSE_NS <= found.mtime_ns <= time.time_ns() + COARSE_NS
    if not is_new_time or not found._replace(mtime_ns=identity.mtime_ns).is_same_file(identity):
        return status
    os.utime(name, ns=(status.st_atime_ns, identity.mtime_ns), dir_fd=folder, follow_symlinks=False)
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def sync_folder(folder: int) -> None:
    """Make the names in a folder durable, if its file system can."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        with opened_folder(folder.parent, "") as descriptor:
            sync_folder(descriptor)


def make_inner_folder(root: Path, relative: str) -> int:
    """Open a folder inside `root` as `open_folder` does, and create what is missing on the way, durably.

    Returns:
        A descriptor that the caller closes.

    Raises:
        OSError: it cannot be created, or something on the way is not a folder or is a symbolic link.
    """
    folder = open_folder(root, "")
    for part in filter(None, relative.split("/")):
        try:
            try:
                inner = open_part(folder, part)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
                sync_folder(folder)
                inner = open_part(folder, part)
        finally:
            os.close(folder)
        folder = inner
    return folder


def give_back(target: int, name: str, source: int, base: str) -> None:
    """Rename somebody else's file back, to a free name if its own has been taken in the meantime."""
    publish(target, name, source, [numbered(base, number) for number in range(1000)])


def publish(folder: int, name: str, target: int, names: Sequence[str]) -> str:
    """Rename a file to the first free one of `names`, and return that name; never replaces a file.

    Where the file system cannot rename without replacing, a hard link takes the free name and the old one is removed;
    where it has no hard links either, see `rename_onto_reservation`.

    Raises:
        OSError: the file system refused, or all names are taken.
    """
    try:
        return _first_free(names, lambda free: rename_noreplace(folder, name, target, free))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise

    def link(free: str) -> None:
        os.link(name, free, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)

    if not inodes.are_real(target):
        return _first_free(names, lambda free: rename_onto_reservation(folder, name, target, free))
    published = _first_free(names, link)
    os.unlink(name, dir_fd=folder)
    return published


def rename_onto_reservation(source: int, old: str, target: int, new: str) -> None:
    """Take a free name with a file that says so, then rename onto that.

    The one way where a file system can neither rename without replacing nor make hard links. Between the look at the
    reservation and the rename another program could replace it, and would lose its file: a moment, and only for a
    program that uses a name which another one has just taken.

    Raises:
        FileExistsError: the name is taken.
        OSError: the file system refused; the name is free again.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    reservation = os.open(new, flags, 0o600, dir_fd=target)
    try:
        try:
            # Not left empty: rclone would upload an empty file at some time after it was closed, over the renamed one.
            os.write(reservation, _RESERVATION)
        finally:
            os.close(reservation)
        if not is_reservation(target, new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
    except FileExistsError:
        raise
    except OSError:
        with contextlib.suppress(OSError):
            drop_reservation(target, new)
        raise


def is_reservation(folder: int, name: str) -> bool:
    """True if a name is taken by a reservation, or by one that was never written, and nothing else."""
    with contextlib.suppress(OSError):
        descriptor = os.open(name, FILE_FLAGS, dir_fd=folder)
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            return is_file and os.pread(descriptor, len(_RESERVATION) + 1, 0) in (b"", _RESERVATION)
        finally:
            os.close(descriptor)
    return False


def drop_reservation(folder: int, name: str) -> None:
    """Remove a reservation; what has replaced it stays."""
    if is_reservation(folder, name):
        with contextlib.suppress(ChangedError):
            take_away(folder, name, Identity.of(os.stat(name, dir_fd=folder, follow_symlinks=False)), new_token())


def _first_free(names: Sequence[str], place: Callable[[str], None]) -> str:
    """Call `place` with each name until one is not taken, and return that name.

    Raises:
        FileExistsError: all names are taken.
    """
    for name in names:
        try:
            place(name)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def numbered(base: str, number: int) -> str:
    """`a.jpg` and 2 make `a-2.jpg`, shortened to the length that file systems allow."""
    if not number:
        return base
    stem, extension = os.path.splitext(base)
    tail = os.fsencode(f"-{number}{extension}")
    if len(tail) >= _LONGEST_BYTES:  # too long to be an extension
        stem, tail = base, os.fsencode(f"-{number}")
    encoded, end = os.fsencode(stem), _LONGEST_BYTES - len(tail)
    # Not in the middle of a character, whose other bytes begin with the bits 10: many file systems want UTF-8.
    for _ in range(3):
        if end < len(encoded) and encoded[end] & 0xC0 == 0x80:
            end -= 1
    return os.fsdecode(encoded[:end] + tail)


def check_removable(folder: int, base: str) -> None:
    """Raise `StayedError` for a file that could not be removed from its folder after it was copied."""
    status = os.fstat(folder)
    allowed = os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=os.access in os.supports_effective_ids)
    if allowed and status.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid):
        allowed = os.stat(base, dir_fd=folder, follow_symlinks=False).st_uid == os.geteuid()
    if not allowed:
        raise StayedError("cannot be removed from its folder: give sorter's user write permission on the folder")


def copy_contents(original: int, copy: int, status: os.stat_result) -> None:
    """Copy contents, owner if allowed, extended attributes if supported, mode and times between two descriptors.

    Where the file system can, the copy shares its blocks with the original until one of them is changed.
    """
    if not _clone(original, copy):
        _copy_blocks(original, copy)
    if os.fstat(copy).st_size != status.st_size:
        raise ChangedError("changed while it was being moved")
    # Owner first: changing it clears mode bits. Only root may do so, and nobody else needs to.
    with _if_possible(), contextlib.suppress(PermissionError):
        os.fchown(copy, status.st_uid, status.st_gid)
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):  # the other file system may have no extended attributes
            for attribute in os.listxattr(original):
                with contextlib.suppress(OSError):
                    os.setxattr(copy, attribute, os.getxattr(original, attribute))
    # If the owner could not be kept, a setuid file would run as the sorter's user.
    with _if_possible():
        os.fchmod(copy, stat.S_IMODE(status.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))
    with _if_possible(), contextlib.suppress(OverflowError):  # a date beyond the range of the other file system
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def _clone(original: int, copy: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(copy, _FICLONE, original)
    except OSError:  # another file system, or one that cannot
        return False
    return True


def _copy_blocks(original: int, copy: int) -> None:
    offset = 0
    while block := _read(original, offset):
        view = memoryview(block)
        while view:
            view = view[os.write(copy, view) :]
        offset += len(block)


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
    """Go on where a file system stores no owners, modes or times."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise


def same_contents(folder: int, name: str, other_folder: int, other_name: str) -> bool:
    """True if two regular files have the same contents."""
    with contextlib.ExitStack() as stack:
        descriptors = []
        for parent, base in ((folder, name), (other_folder, other_name)):
            descriptors.append(os.open(base, FILE_FLAGS, dir_fd=parent))
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
        OSError: anything else; ENOSYS if the C library lacks the call.
    """
    if _rename_function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _rename_function(source, os.fsencode(old), target, os.fsencode(new), _rename_flag) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)
