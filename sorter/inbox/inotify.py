"""Linux's inotify, as it is: one instance, the folders it watches, and every event that it reports.

Nothing is held back or made up. A queue that ran over, a file system that was unmounted and a watch that the kernel
took away are events like the others, because whoever relies on events has to know when there will be none.
"""

import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator
from typing import NamedTuple

ATTRIB = 0x4
CLOSE_WRITE = 0x8
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATE = 0x100
DELETE_SELF = 0x400
MOVE_SELF = 0x800
UNMOUNT = 0x2000
QUEUE_OVERFLOW = 0x4000
IGNORED = 0x8000
ONLY_FOLDERS = 0x01000000
DONT_FOLLOW = 0x02000000
IS_FOLDER = 0x40000000

_BUFFER_BYTES = 1 << 16
_HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_LIMITS = {
    errno.ENOSPC: "all inotify watches are in use: raise fs.inotify.max_user_watches",
    errno.EMFILE: "all inotify instances are in use: raise fs.inotify.max_user_instances",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """What happened in a watched folder.

    Attributes:
        watch: what `Inotify.watch` returned for the folder; -1 where the event concerns no folder.
        mask: the bits above.
        name: the entry of the folder that it happened to, empty if to the folder itself.
    """

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify instance. Any thread may add watches; one reads and one closes.

    Raises:
        OSError: there is no inotify here, or all instances are in use.
    """

    def __init__(self) -> None:
        if not hasattr(_libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, "this system has no inotify")
        self._descriptor = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._ended, self._end = os.pipe()

    def watch(self, path: str, mask: int) -> int:
        """Report what happens in a folder.

        Raises:
            OSError: it cannot be watched, or all watches are in use (ENOSPC).
        """
        return _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), ctypes.c_uint32(mask)))

    def unwatch(self, watch: int) -> None:
        """Report no more of a folder; one that is not watched any more is no error."""
        _libc.inotify_rm_watch(self._descriptor, watch)

    def events(self) -> Iterator[Event]:
        """Wait for events and yield them, until `end`."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLIN)
        waiting.register(self._ended, select.POLLIN)
        while all(descriptor != self._ended for descriptor, _ in waiting.poll()):
            buffer = os.read(self._descriptor, _BUFFER_BYTES)
            offset = 0
            while offset < len(buffer):
                watch, mask, _, length = _HEADER.unpack_from(buffer, offset)
                offset += _HEADER.size + length
                yield Event(watch, mask, os.fsdecode(buffer[offset - length : offset].rstrip(b"\0")))

    def end(self) -> None:
        """End `events`, in whichever thread that runs."""
        os.write(self._end, b".")

    def close(self) -> None:
        """Give the instance and all its watches back, once nobody is in `events`."""
        for descriptor in (self._descriptor, self._ended, self._end):
            os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, _LIMITS.get(number, os.strerror(number)))
    return result
