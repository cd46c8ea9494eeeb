"""One decoder process: descriptors in, pixels into shared memory.

It imports no numpy and so starts in a fraction of a second.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
import time
import warnings
from typing import Literal

from sorter.decoding import images, raw
from sorter.decoding.images import Limits, Preprocessing
from sorter.errors import PhotoError, Reason

WORKER_MEMORY_BYTES = 970_000_000
"""What a worker may allocate; a photo that needs more fails as out-of-memory. Together with mapped libraries a worker
stays under 1 GB. A picture of 100 megapixels needs 400 MB, a progressive JPEG of 250 megapixels 750 MB."""
REQUEST = struct.Struct("<I?")  # row, whether it is a camera's raw file
REPLY = struct.Struct("<BfIII")  # kind, seconds, width and height of the picture, bytes of text that follow
OK, FAILED, UNREADABLE = range(3)
READY = b"\1"


def _confine() -> None:
    """Die with the parent, ignore the signals meant for it, and limit the memory that a photo may use."""
    # Ctrl-C and systemd's SIGTERM reach all processes: the parent decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # Allocated memory, not address space, much of which threads and libraries reserve but never use.
        resource.setrlimit(resource.RLIMIT_DATA, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> None:
    """Decode one descriptor after another until the parent closes the connection."""
    parent = os.getppid()
    _confine()
    if os.getppid() != parent:  # the parent died before prctl
        return
    warnings.simplefilter("ignore", UserWarning)  # Pillow warns about odd metadata
    connection = socket.socket(fileno=int(arguments[0]))
    memory = int(arguments[1])
    crops: dict[str, Literal["squash", "center", "fit"]] = {"squash": "squash", "center": "center", "fit": "fit"}
    preprocessing = Preprocessing(int(arguments[2]), crops[arguments[3]], int(arguments[4]))
    limits = Limits(float(arguments[5]), float(arguments[6]), WORKER_MEMORY_BYTES)
    stride = preprocessing.size * preprocessing.size * 3
    connection.sendall(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, REQUEST.size, 1)
        if not request:
            return
        row, is_raw = REQUEST.unpack(request)
        start, kind, text, size = time.perf_counter(), OK, "", (0, 0)
        try:
            decode = raw.decode if is_raw else images.decode
            picture = decode(descriptors[0], preprocessing, limits)
            os.pwrite(memory, picture.tobytes(), row * stride)
            size = picture.size
        except PhotoError as error:
            kind, text = FAILED, f"{error.reason} {error.detail}"
        except MemoryError:
            kind, text = FAILED, f"{Reason.OUT_OF_MEMORY} decoding needs more than {WORKER_MEMORY_BYTES / 1e6:g} MB"
        except OSError as error:
            kind, text = UNREADABLE, error.strerror or str(error)
        finally:
            os.close(descriptors[0])
        encoded = text[:500].encode("utf-8", "replace")
        connection.sendall(REPLY.pack(kind, time.perf_counter() - start, *size, len(encoded)) + encoded)


if __name__ == "__main__":
    main(sys.argv[1:])
