"""One decoder process: descriptors in, pixels into shared memory.

It imports no numpy, so that it starts in a fraction of a second.
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
"""What a worker may allocate before its photo fails as out-of-memory. With the libraries that are mapped it stays
under 1 GB: a picture of 100 megapixels takes 400 MB once, a progressive JPEG of 250 megapixels 750 MB."""
REQUEST = struct.Struct("<I?")  # row, whether it is a camera's raw file
REPLY = struct.Struct("<BfI")  # kind, seconds, bytes of text that follow
OK, FAILED, UNREADABLE = range(3)
READY = b"\1"


def _confine() -> None:
    """Die with the parent, leave its signals to it, and stay within the memory that one photo may take."""
    # Ctrl-C and systemd's SIGTERM reach the whole group: the parent decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # What is allocated, not the address space: threads and libraries reserve much that they never use.
        resource.setrlimit(resource.RLIMIT_DATA, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> None:
    """Decode one descriptor after another until the parent closes the connection."""
    parent = os.getppid()
    _confine()
    if os.getppid() != parent:  # it died before we could ask to die with it
        return
    warnings.simplefilter("ignore", UserWarning)  # Pillow warns of odd metadata; nobody reads it here
    connection = socket.socket(fileno=int(arguments[0]))
    memory = int(arguments[1])
    crop: Literal["squash", "center"] = "center" if arguments[3] == "center" else "squash"
    preprocessing = Preprocessing(int(arguments[2]), crop, int(arguments[4]))
    limits = Limits(float(arguments[5]), float(arguments[6]), WORKER_MEMORY_BYTES)
    stride = preprocessing.size * preprocessing.size * 3
    connection.sendall(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, REQUEST.size, 1)
        if not request:
            return
        row, is_raw = REQUEST.unpack(request)
        start, kind, text = time.perf_counter(), OK, ""
        try:
            decode = raw.decode if is_raw else images.decode
            pixels = decode(descriptors[0], preprocessing, limits).tobytes()
            os.pwrite(memory, pixels, row * stride)
        except PhotoError as error:
            kind, text = FAILED, f"{error.reason} {error.detail}"
        except MemoryError:
            kind, text = FAILED, f"{Reason.OUT_OF_MEMORY} it needs more than {WORKER_MEMORY_BYTES / 1e6:g} MB"
        except OSError as error:
            kind, text = UNREADABLE, error.strerror or str(error)
        finally:
            os.close(descriptors[0])
        said = text[:500].encode("utf-8", "replace")
        connection.sendall(REPLY.pack(kind, time.perf_counter() - start, len(said)) + said)


if __name__ == "__main__":
    main(sys.argv[1:])
