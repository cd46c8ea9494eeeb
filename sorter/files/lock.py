"""One sorter for an inbox, and one for an output: flock(2) on `<folder>/.sorter/lock`.

The descriptor that holds a lock keeps its file system busy, so a lock on an inbox that vanished is given back. The
kernel gives a lock back when its process ends, however it ends, so a crash leaves nothing to clean up. The file says
who holds the lock, for the sentence that the second one ends with; what it says decides nothing.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

from sorter.errors import ConfigurationError
from sorter.files import FOLDER
from sorter.files.atomic import sync_folder
from sorter.files.photo import opened_folder

SORTING, UNDOING = "lock", "undo-lock"
"""What the lock files are called."""
_DOING = {SORTING: "being sorted", UNDOING: "having photos put back"}
_LOOK_SECONDS = 0.05
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class Lock:
    """The right to do something in one folder, held until `release` or the end of the process.

    Args:
        folder: an inbox or an output.
        name: `SORTING`, or `UNDOING`, which may happen beside it.
    """

    def __init__(self, folder: Path, name: str = SORTING) -> None:
        self._folder, self._name = folder.absolute(), name
        self._descriptor: int | None = None

    def take(self, *, patience_seconds: float = 0.0) -> None:
        """Take the lock if it is not held, or if the folder is another one now; a folder that is gone has none.

        Args:
            patience_seconds: how long to wait for one who may only be clearing up after a crash.

        Raises:
            ConfigurationError: somebody else sorts the folder, or it cannot be locked.
        """
        try:
            descriptor = _open(self._folder, self._name)
        except FileNotFoundError:
            self.release()
            return
        except OSError as error:
            if self._descriptor is not None:  # out of reach for now, and ours still
                return
            raise ConfigurationError(
                f"{self._folder / FOLDER / self._name} cannot be made or opened ({error.strerror}): give this user "
                "permission to"
            ) from None
        if self._descriptor is not None and os.path.sameopenfile(self._descriptor, descriptor):
            os.close(descriptor)
            return
        deadline = time.monotonic() + patience_seconds
        try:
            while not _try_lock(descriptor, self._folder, self._name):
                if time.monotonic() >= deadline:
                    raise ConfigurationError(
                        f"{self._folder} is {_DOING[self._name]} by {_said(descriptor)}: stop that one first"
                    )
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        self.release()
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def holder(folder: Path, name: str = SORTING) -> str | None:
    """Who holds a lock, as a phrase; None if nobody does. Takes nothing and makes nothing."""
    try:
        with opened_folder(folder, FOLDER) as hidden:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=hidden)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _said(descriptor) if error.errno in _TAKEN else None
    finally:
        os.close(descriptor)
    return None


def _said(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"


def _open(folder: Path, name: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder / FOLDER)
        with opened_folder(folder, "") as descriptor:
            sync_folder(descriptor)
    with opened_folder(folder, FOLDER) as hidden:
        return os.open(
            name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=hidden
        )


def _try_lock(descriptor: int, folder: Path, name: str) -> bool:
    status = os.fstat(descriptor)
    # A link would have us write into somebody else's file.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ConfigurationError(f"{folder / FOLDER / name} is not a file of the sorter: move it away")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            raise ConfigurationError(
                f"{folder} is on a file system without locks ({error.strerror}): sort a folder on another one"
            ) from None
        raise
    now = datetime.now(UTC).isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename} since {now}\n".encode(), 0)
    return True
