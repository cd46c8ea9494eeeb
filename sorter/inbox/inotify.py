"""Linux's inotify, with every event it has: also those that say events were lost or that there will be no more."""

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
        watch: what `Inotify.watch` returned for the folder; -1 for an event of no folder.
        mask: the bits above.
        name: the entry in the folder, empty for the folder itself.
    """

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify instance. One thread reads events and adds watches; any thread may call `end`.

    Raises:
        OSError: all instances are in use.
    """

    def __init__(self) -> None:
        self._descriptor = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._ended, self._end = os.pipe()

    def watch(self, path: str, mask: int) -> int:
        """Report events in a folder.

        Raises:
            OSError: it cannot be watched, or all watches are in use (ENOSPC).
        """
        return _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), ctypes.c_uint32(mask)))

    def unwatch(self, watch: int) -> None:
        """Stop reporting a folder; no error if it is not watched any more."""
        _libc.inotify_rm_watch(self._descriptor, watch)

    def read(self) -> Iterator[Event]:
        """Wait for events and yield those that came; none after `end`."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLIN)
        waiting.register(self._ended, select.POLLIN)
        if any(descriptor == self._ended for descriptor, _ in waiting.poll()):
            return
        buffer = os.read(self._descriptor, _BUFFER_BYTES)
        offset = 0
        while offset < len(buffer):
            watch, mask, _, length = _HEADER.unpack_from(buffer, offset)
            offset += _HEADER.size + length
            yield Event(watch, mask, os.fsdecode(buffer[offset - length : offset].rstrip(b"\0")))

    def end(self) -> None:
        """Wake `read` for good, in whichever thread it waits."""
        os.write(self._end, b".")

    def close(self) -> None:
        """Release the instance with all its watches; only after the last `read`, and once."""
        for descriptor in (self._descriptor, self._ended, self._end):
            os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, _LIMITS.get(number, os.strerror(number)))
    return result
