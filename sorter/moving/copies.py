"""Copies of photos under hidden names, for where a photo cannot be renamed or linked: on another file system.

In: a plan, the open photo and the open folder of its destination. Out: a complete, durable copy with mode, times and
extended attributes, which the mover publishes or withdraws.
"""

import contextlib
import os
import time
from pathlib import Path

from sorter.files.atomic import ChangedError, StayedError, copy_contents, partial_name
from sorter.files.lease import Lease, OpenForWritingError
from sorter.files.photo import Identity, opened_folder
from sorter.moving.recovery import Plan

# With less room than this a disk is full for all photos, and waited for.
_ROOM_BYTES = 20_000_000
# Whoever wrote to a photo so long ago has finished, also by a clock that is some minutes off.
_FINISHED_SECONDS = 600.0


class Copies:
    """Makes the copies, and knows those that are complete and not published yet.

    Args:
        settle_seconds: how long a copied photo must stay unchanged before the original is removed, where it cannot be
            known otherwise that nobody writes to it.
    """

    def __init__(self, settle_seconds: float) -> None:
        self._settle_seconds = settle_seconds
        self._completed: dict[str, float] = {}  # by the plan's token, a monotonic time

    def __contains__(self, plan: Plan) -> bool:
        return plan.token in self._completed

    def may_have_to_wait(self, mtime: float) -> bool:
        """Whether a photo that was modified at a time, in seconds since the epoch, may still be written to."""
        return self._settle_seconds > 0 and time.time() - mtime <= _FINISHED_SECONDS

    def make(self, plan: Plan, original: int, target: int) -> None:
        """Copy an open photo, durably, to the plan's hidden name; the caller checks the original again afterwards."""
        status, partial = os.fstat(original), partial_name(plan.token)
        if not Identity.of(status).is_same_file(plan.photo.identity):
            raise ChangedError("changed while it was moved")
        _check_room(target, status.st_size)
        copy = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            try:
                copy_contents(original, copy, status)
                os.fsync(copy)
            finally:
                os.close(copy)
        except BaseException:
            with contextlib.suppress(OSError):  # then recovery finds it
                os.unlink(partial, dir_fd=target)
            raise
        self._completed[plan.token] = time.monotonic()

    def wait(self, plan: Plan) -> None:
        """Wait until a copy is so old that a look at the original says whether somebody still writes to that."""
        if plan in self:
            time.sleep(max(0.0, self._completed[plan.token] + self._settle_seconds - time.monotonic()))

    def forget(self, plan: Plan) -> bool:
        """Count a copy as published or given up; False if there is none."""
        return self._completed.pop(plan.token, None) is not None

    def withdraw(self, plan: Plan, output: Path) -> None:
        """Remove the copy of a photo that will not be moved now, if there is one.

        Raises:
            OSError: the file system refused.
        """
        if self.forget(plan):
            with opened_folder(output, plan.folder) as target:
                os.unlink(partial_name(plan.token), dir_fd=target)


def lease(original: int) -> Lease:
    """A read lease on an open photo.

    Raises:
        ChangedError: somebody has it open for writing.
    """
    try:
        return Lease(original)
    except OpenForWritingError:
        raise ChangedError("is open for writing in another program, which may not have finished") from None


def _check_room(folder: int, size: int) -> None:
    """Leave one photo that does not fit where others do: it must not hold them up."""
    room = os.fstatvfs(folder)
    free = room.f_bavail * room.f_frsize
    if size > free >= _ROOM_BYTES:
        raise StayedError(f"needs {size / 1e6:.0f} MB and the output has {free / 1e6:.0f} MB free: free some space")
