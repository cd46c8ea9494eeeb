"""One sorter for an inbox, and one for an output: flock(2) on `<folder>/.sorter/lock`.

The kernel gives a lock back when its process ends, however it ends, so a crash leaves nothing to clean up. The file
says who holds the lock, for the sentence that the second one ends with; what it says decides nothing.
"""

import contextlib
import errno
import fcntl
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from sorter.atomic import sync_folder
from sorter.errors import ConfigurationError
from sorter.history import FOLDER
from sorter.inbox import opened_folder

_NAME = "lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class Lock:
    """The right to sort some folders, held until `release` or the end of the process.

    Args:
        folders: the inbox and the output; two names of one folder are taken once.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = [folder.absolute() for folder in folders]
        self._held: dict[tuple[int, int], int] = {}  # device and inode of a lock file -> its descriptor

    def take(self) -> None:
        """Take what is not held yet, and give back what stands no longer under its name.

        Raises:
            ConfigurationError: somebody else has one of the folders, or it cannot be locked.
        """
        before, self._held = self._held, {}
        try:
            for folder in self._folders:
                self._take(folder, before)
        finally:
            for descriptor in before.values():
                os.close(descriptor)

    def _take(self, folder: Path, before: dict[tuple[int, int], int]) -> None:
        try:
            descriptor = _open(folder)
        except OSError as error:
            raise ConfigurationError(
                f"{folder / FOLDER / _NAME} cannot be made or opened ({error.strerror}): give this user permission to"
            ) from None
        status = os.fstat(descriptor)
        file = status.st_dev, status.st_ino
        if file in self._held or file in before:
            os.close(descriptor)
            if file in before:
                self._held[file] = before.pop(file)
            return
        try:
            # A link would have us write into somebody else's file.
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise ConfigurationError(f"{folder / FOLDER / _NAME} is not a file of the sorter: move it away")
            _lock(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise
        self._held[file] = descriptor

    def release(self) -> None:
        """Give everything back; idempotent."""
        while self._held:
            os.close(self._held.popitem()[1])


def _open(folder: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder / FOLDER)
        with opened_folder(folder, "") as descriptor:
            sync_folder(descriptor)
    with opened_folder(folder, FOLDER) as hidden:
        return os.open(
            _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=hidden
        )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise ConfigurationError(f"{folder} is being sorted by {holder}: stop that one first") from None
        if error.errno in _NO_LOCKS:
            raise ConfigurationError(
                f"{folder} is on a file system without locks ({error.strerror}): sort a folder on another one"
            ) from None
        raise
    os.ftruncate(descriptor, 0)
    now = datetime.now(UTC).isoformat(" ", "seconds")
    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename} since {now}\n".encode(), 0)
