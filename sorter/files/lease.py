"""Knowing that nobody has a file open for writing, with a read lease: fcntl(2), F_SETLEASE.

In: a file that is open for reading. Out: a `Lease`, which ends when that descriptor is closed. While it lasts, whoever
opens the file for writing waits, and the lease says that it is broken. Linux only, and only for a file's owner or with
CAP_LEASE.
"""

import errno
import fcntl
import os
import signal
import sys

from sorter.files import file_systems


class OpenForWritingError(Exception):
    """Another program has the file open for writing."""


class Lease:
    """A read lease, or the fact that there is none.

    Attributes:
        is_certain: True if no program can write to the file unnoticed. False where there are no leases, where this user
            may not have one, and on file systems that others may change behind this kernel's back.

    Raises:
        OpenForWritingError: somebody has the file open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.is_certain = self._taken = False
        if sys.platform != "linux":
            return
        kind = file_systems.kind_of_device(os.fstat(descriptor).st_dev)
        others_may_write = kind.startswith(file_systems.NETWORK) and kind != "fuseblk"
        try:
            # Whoever wants to write causes this signal. The default, SIGIO, would end the process; SIGURG is ignored.
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            # Network file systems also say EAGAIN if their server grants nothing.
            if error.errno == errno.EAGAIN and (kind.startswith("fuse") or not others_may_write):
                raise OpenForWritingError from None
        else:
            self._taken, self.is_certain = True, not others_may_write

    @property
    def is_broken(self) -> bool:
        """True once somebody has tried to open the file for writing, and waits."""
        return self._taken and fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK
