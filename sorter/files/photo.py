"""A photo as a file: which version it is, and opening it in a way that can open nothing else.

In: a folder and a relative path. Out: descriptors, and the `Identity` that distinguishes versions of a file.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sorter.files import inodes

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""For opening what may be a photo: follows no symbolic link, does not wait for a FIFO's writer, takes no terminal."""

COARSE_NS = 2_000_000_000
"""How far apart the times of a file and its copy may be: some file systems store them to two seconds."""


class Identity(NamedTuple):
    """Distinguishes versions of a file: any write or replacement changes it.

    The status change time catches a writer who sets the modification time back. A rename or a new hard link changes it
    too, so after a move only the other four fields are comparable: `is_same_file`. Where a file system makes its inode
    numbers up, the number is 0 and tells nothing: another file of the same size with about the same times then passes.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """The identity in a stat result."""
        return cls(status.st_dev, inodes.number(status), status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_same_file(self, other: "Identity") -> bool:
        """True if this is the same version of the same file, perhaps under another name."""
        if self.inode and other.inode:
            return self[:4] == other[:4]
        alike = abs(self.mtime_ns - other.mtime_ns) <= COARSE_NS
        return (self.device, self.size) == (other.device, other.size) and alike

    def is_same_version(self, other: "Identity") -> bool:
        """True if this is the same version of the same file, and nobody has touched it."""
        return self.is_same_file(other) and self.ctime_ns == other.ctime_ns


@dataclass(frozen=True, slots=True)
class Photo:
    """A settled file that may be a photo.

    Attributes:
        root: the inbox.
        name: its path inside the inbox, `a.jpg` or `holiday/a.jpg`.
        identity: of the settled version.
        seen: when this version was first seen, in seconds since the epoch.
    """

    root: Path
    name: str
    identity: Identity
    seen: float

    @property
    def path(self) -> str:
        """The full path, as in logs and history."""
        return os.path.join(self.root, self.name)


def open_folder(root: Path, relative: str) -> int:
    """Open a folder inside `root` without following symbolic links: a swapped folder cannot lead elsewhere.

    Returns:
        A descriptor that the caller closes.

    Raises:
        OSError: it is gone, not a folder, or a symbolic link.
    """
    # The root itself may be a symbolic link: the user chose it.
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, relative.split("/")):
        try:
            inner = open_part(folder, part)
        finally:
            os.close(folder)
        folder = inner
    return folder


def open_part(folder: int, part: str) -> int:
    """Open a folder in an open one, without following a symbolic link."""
    return os.open(part, _FOLDER, dir_fd=folder)


@contextlib.contextmanager
def opened_folder(root: Path, relative: str) -> Iterator[int]:
    """`open_folder` as a context manager."""
    descriptor = open_folder(root, relative)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(photo: Photo) -> int:
    """Open a photo for reading, without following links and without waiting for a FIFO's writer.

    Returns:
        A descriptor that the caller closes.

    Raises:
        OSError: it is gone, a symbolic link, or may not be read.
    """
    folder, _, base = photo.name.rpartition("/")
    with opened_folder(photo.root, folder) as descriptor:
        return os.open(base, FILE_FLAGS, dir_fd=descriptor)


def file_of(path: Path | str | int) -> tuple[int, int] | None:
    """The device and inode of a path or a descriptor; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
