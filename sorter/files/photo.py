"""A photo as a file: which version of it, and how it is opened so that nothing else can be.

In: a folder and a relative path. Out: descriptors, and the `Identity` that tells one version of a file from another.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""To open what may be a photo: follows no link, waits for no FIFO's writer, takes no terminal."""


class Identity(NamedTuple):
    """What tells one version of a file from another: any write, replacement or exchange changes it.

    The time of the last status change catches a writer who sets the modification time back; a rename or a new hard
    link changes it too, so after a move only the other four are comparable: `is_same_file`.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """Take the identity from a stat."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_same_file(self, other: "Identity") -> bool:
        """Tell whether this is that file, perhaps under another name."""
        return self[:4] == other[:4]


@dataclass(frozen=True, slots=True)
class Photo:
    """A settled file that may be a photo.

    Attributes:
        root: the inbox.
        name: its path inside the inbox, `a.jpg` or `holiday/a.jpg`.
        identity: what it was when it was settled.
        seen: when this version was first seen, in seconds since the epoch.
    """

    root: Path
    name: str
    identity: Identity
    seen: float

    @property
    def path(self) -> str:
        """The whole path, as logs and history name it."""
        return os.path.join(self.root, self.name)


def open_folder(root: Path, relative: str) -> int:
    """Open a folder inside `root`, following no symbolic link on the way: a swapped folder cannot lead elsewhere.

    Returns:
        A descriptor that the caller closes.

    Raises:
        OSError: it is gone, not a folder, or a symbolic link.
    """
    # The root itself may be a symbolic link: it is the user's own word.
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, relative.split("/")):
        try:
            inner = os.open(part, _FOLDER, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


@contextlib.contextmanager
def opened_folder(root: Path, relative: str) -> Iterator[int]:
    """`open_folder` for the time of a `with`."""
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
    """The device and inode of a path or a descriptor, None where nothing is to be found."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
