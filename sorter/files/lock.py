"""One sorter per inbox and one per output: flock(2) on `<folder>/.sorter/lock`.

The kernel releases a lock when its process ends, however it ends, so a crash leaves nothing to clean up. The open
descriptor keeps its file system busy, so the lock on an inbox that vanished is released. The file's text names the
holder for the error message of a second sorter; nothing depends on it.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
from datetime import datetime
from pathlib import Path

from sorter.errors import ConfigurationError, NotNowError, StorageError
from sorter.files import file_systems
from sorter.files.atomic import sync_folder
from sorter.files.photo import opened_folder
from sorter.files.state import state_folder

SORTING, UNDOING = "lock", "undo-lock"
"""Names of the lock files; the second is for whatever moves sorted photos: an undo, and the corrections of a review."""
UNDOING_PATIENCE_SECONDS = 2.0
"""How long to wait for the second: a batch of corrections holds it for a moment."""
_DOING = {SORTING: "being sorted", UNDOING: "having photos restored or corrected"}
_RETRY_SECONDS = 0.05
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class Lock:
    """The right to sort, or to undo, in one folder, held until `release` or the end of the process.

    Args:
        folder: an inbox or an output.
        name: `SORTING` or `UNDOING`; the two do not exclude each other.
        state_dir: where the lock is, if not in the folder.
    """

    def __init__(self, folder: Path, name: str = SORTING, state_dir: Path | None = None) -> None:
        self._folder, self._name = folder.absolute(), name
        self._state, self._is_elsewhere = state_folder(self._folder, state_dir), state_dir is not None
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def take(self, *, patience_seconds: float = 0.0, create: bool = True) -> None:
        """Take the lock unless it is held already; take it again if another folder has this name now.

        If the folder is gone, the lock is released.

        Args:
            patience_seconds: how long to wait for a holder that may be about to end.
            create: create the file if it is missing; otherwise the lock is then released, as for a missing folder.

        Raises:
            NotNowError: another process holds the lock.
            StorageError: the disk is full.
            ConfigurationError: the folder cannot be locked.
        """
        try:
            if self._is_elsewhere:
                self._state.mkdir(parents=True, exist_ok=True)
            descriptor = _open(self._state, self._name, create=create)
        except FileNotFoundError:
            self.release()
            return
        except OSError as error:
            if self._descriptor is not None:  # cannot be reached at the moment, but still ours
                return
            if error.errno in file_systems.NO_SPACE:
                raise StorageError(f"{self._folder} is on a full disk ({error.strerror}): free some space") from None
            raise ConfigurationError(
                f"{self._state / self._name} cannot be created or opened ({error.strerror}): make the folder writable"
            ) from None
        if self._descriptor is not None and os.path.sameopenfile(self._descriptor, descriptor):
            _close(descriptor)
            return
        deadline = time.monotonic() + patience_seconds
        try:
            while not _try_lock(descriptor, self._state / self._name):
                if time.monotonic() >= deadline:
                    raise NotNowError(
                        f"{self._folder} is {_DOING[self._name]} by {_holder_text(descriptor)}: stop that one first"
                    )
                time.sleep(_RETRY_SECONDS)
        except BaseException:
            _close(descriptor)
            raise
        self.release()
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _close(descriptor)


def holder(folder: Path, name: str = SORTING, state_dir: Path | None = None) -> str | None:
    """Who holds a lock, as a phrase; None if nobody does. Neither takes the lock nor creates the file."""
    state = state_folder(folder, state_dir)
    try:
        with opened_folder(state.parent, state.name) as hidden:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=hidden)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _holder_text(descriptor) if error.errno in _HELD else None
    finally:
        _close(descriptor)
    return None


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # rclone reports here that it cannot write to a part of a file
        os.close(descriptor)


def _holder_text(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"


def _open(state: Path, name: str, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if create:
        flags |= os.O_CREAT
        with contextlib.suppress(FileExistsError):
            os.mkdir(state)
            with opened_folder(state.parent, "") as descriptor:
                sync_folder(descriptor)
    with opened_folder(state.parent, state.name) as hidden:
        return os.open(name, flags, 0o666, dir_fd=hidden)


def _try_lock(descriptor: int, path: Path) -> bool:
    status = os.fstat(descriptor)
    # Writing through a link would change somebody else's file.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ConfigurationError(f"{path} was not created by sorter: move it away")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _UNSUPPORTED:
            raise ConfigurationError(
                f"{path.parent} is on a file system without locks ({error.strerror}): keep locks and history on a "
                "local disk with --state-dir"
            ) from None
        raise
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk
        text = f"process {os.getpid()} on {os.uname().nodename} since {now}\n".encode()
        os.pwrite(descriptor, text, 0)
        # Not to 0 before: ext4 then writes the file to the disk when it is closed, which takes milliseconds.
        os.ftruncate(descriptor, len(text))
    return True
