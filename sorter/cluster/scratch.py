"""A private folder for the photos that a node has fetched and not decided on yet, in memory if they fit there.

In: names and sizes. Out: paths of files. What a killed node leaves behind, the next one on the machine removes.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

IN_FLIGHT_BYTES = 1_000_000_000
"""So much of an inbox lies in the folder at a time; a single photo may be larger."""

_IN_MEMORY = Path("/dev/shm")  # noqa: S108
_LOCK = "lock"


class PrivateFolder:
    """A new folder for this process. What killed processes left of the same kind is removed.

    Args:
        parent: a folder for temporary files.
        prefix: of its name, for this kind.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        _remove_abandoned(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Held as long as this process lives, however it ends; named once it is held, or another process might take it.
        unnamed = self.path / f"{_LOCK}.new"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(self.path / _LOCK)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class Scratch:
    """The folder, and how much is in it. Any number of threads may use it.

    Args:
        limit_bytes: `reserve` waits while more than that is in it.
    """

    def __init__(self, limit_bytes: int = IN_FLIGHT_BYTES) -> None:
        self._private = PrivateFolder(_parent(limit_bytes), "sorter-node-")
        self.folder = self._private.path
        self._limit_bytes, self._reserved_bytes, self._count = limit_bytes, 0, 0
        self._free = threading.Condition()

    def reserve(self, size: int) -> None:
        """Have space for that many bytes until `release`; waits for it."""
        with self._free:
            self._free.wait_for(lambda: not self._reserved_bytes or self._reserved_bytes + size <= self._limit_bytes)
            self._reserved_bytes += size

    def release(self, size: int) -> None:
        """Give the space back, once the file is gone."""
        with self._free:
            self._reserved_bytes -= size
            self._free.notify_all()

    def new_name(self, extension: str) -> str:
        """A name that no file of this process ever had.

        Args:
            extension: with its dot, because a camera's raw files are known by it; empty for none.
        """
        with self._free:
            self._count += 1
            return f"{self._count:06d}{extension}"

    def close(self) -> None:
        """Remove the folder."""
        self._private.close()


def _parent(limit_bytes: int) -> Path:
    """Memory, if there is twice as much of it free; else the folder for temporary files."""
    with suppress(OSError):
        if os.access(_IN_MEMORY, os.W_OK) and shutil.disk_usage(_IN_MEMORY).free >= 2 * limit_bytes:
            return _IN_MEMORY
    return Path(tempfile.gettempdir())


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
