"""The worker processes that decode, seen from the parent: a decoder's crash, hang, leak or output stays inside them.

In: settled `Photo`s. Out: a `Decoded` for each, with its pixels in a row of shared memory, or the reason why not.

Each worker process decodes one photo at a time for the thread that owns it, so a crash is known to be that photo's.
Workers get an open descriptor, never a path: they can read the one photo they were given and nothing else. They hold no
lock, write only to their row, and die with their parent.
"""

import contextlib
import errno
import mmap
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from sorter.decoding import formats, raw
from sorter.decoding.decoded import Decoded
from sorter.decoding.images import Limits, Preprocessing
from sorter.decoding.worker import OK, READY, REPLY, REQUEST, UNREADABLE
from sorter.errors import PhotoError, Reason, SorterError
from sorter.files import file_systems, inodes
from sorter.files.photo import Identity, Photo, open_file
from sorter.processors import available_cpus

START_SECONDS = 60.0
"""How long a worker may take to start; normally a fraction of a second."""

_MAX_WORKERS = 16
_READ_BYTES = 1 << 18  # of a file on a network at a time
_DEATHS = (Reason.DECODER_CRASH, Reason.DECODER_TIMEOUT)


def default_workers() -> int:
    """One worker process per CPU, but no more than one parent can keep busy."""
    return min(available_cpus(), _MAX_WORKERS)


class Decoders:
    """A fixed number of worker processes, the shared memory that they fill, and the threads that own them.

    Args:
        workers: how many photos are decoded at a time.
        rows: how many decoded photos may exist at a time; submitting blocks while all are taken.
        preprocessing: of the model.
        limits: pixels and memory.
        max_bytes: larger files fail as too-large without being read.
        timeout_seconds: a worker that takes longer is killed.
        deliver: called with each `Decoded`, from the threads here.
        fail: called with the exception that ended one of the threads here.
        on_progress: called while a photo is read from a slow disk.
    """

    def __init__(
        self,
        *,
        workers: int,
        rows: int,
        preprocessing: Preprocessing,
        limits: Limits,
        max_bytes: int,
        timeout_seconds: float,
        deliver: Callable[[Decoded], None],
        fail: Callable[[BaseException], None],
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._descriptor = _shared_memory(rows * preprocessing.size**2 * 3)
        self.pixels = mmap.mmap(self._descriptor, 0)  # uint8 (rows, S, S, 3)
        self._preprocessing, self._limits = preprocessing, limits
        self._max_bytes, self._timeout_seconds = max_bytes, timeout_seconds
        self._deliver, self._fail, self._on_progress = deliver, fail, on_progress
        self._on_network: dict[int, bool] = {}  # by device
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for row in range(rows):
            self._free.put(row)
        self._tasks: queue.SimpleQueue[tuple[Photo, int] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._workers: dict[int, _Worker] = {}  # by the thread that owns it
        self._threads = [threading.Thread(target=self._run, name=f"decoder-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, photo: Photo, *, timeout_seconds: float) -> bool:
        """Queue a photo, waiting for a free row; False if there was none in time."""
        try:
            row = self._free.get(timeout=timeout_seconds)
        except queue.Empty:
            return False
        self._tasks.put((photo, row))
        return True

    def release(self, row: int) -> None:
        """Return a row once its pixels have been used."""
        self._free.put(row)

    def close(self) -> None:
        """Kill the workers and drop the photos that are not decoded yet: they stay where they are."""
        self._closing.set()
        for worker in [*self._workers.values()]:
            worker.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)

    def _run(self) -> None:
        worker = None
        try:
            worker = self._new_worker()
            while (task := self._tasks.get()) is not None and not self._closing.is_set():
                photo, row = task
                for _ in range(2):  # a crash may not be this photo's fault (the machine out of memory): try twice
                    decoded = self._decode(worker, photo, row)
                    if decoded.reason not in _DEATHS or self._closing.is_set():
                        break
                    worker.kill()
                    worker = self._new_worker()
                if self._closing.is_set():  # which may have killed the worker: the photo is not to blame
                    break
                if decoded.verdict == "failed" and raw.is_raw(photo.name):
                    # LibRaw does not support every camera; an unsupported raw file is not a failure.
                    detail = f"a camera's raw file, {decoded.detail}"
                    decoded = replace(decoded, verdict="skipped", detail=detail)
                if decoded.verdict != "pixels":
                    self.release(row)
                self._deliver(decoded)
        except BaseException as error:
            if not self._closing.is_set():  # otherwise a worker was killed while it started
                self._fail(error)
        finally:
            if worker is not None:
                worker.kill()

    def _new_worker(self) -> "_Worker":
        worker = _Worker(self._descriptor, self._preprocessing, self._limits)
        self._workers[threading.get_ident()] = worker
        if self._closing.is_set():
            worker.stop()
        worker.await_ready()
        return worker

    def _decode(self, worker: "_Worker", photo: Photo, row: int) -> Decoded:
        try:
            descriptor = open_file(photo)
        except PermissionError:
            return Decoded(photo, "left", detail="permission denied: give sorter's user read permission")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):  # no longer a file
                return Decoded(photo, "gone", detail="is gone")
            return Decoded(photo, "left", detail=f"cannot be opened at the moment: {error.strerror}")
        try:
            status = os.fstat(descriptor)
            opened = Identity.of(status)
            if not opened.is_same_file(photo.identity) and _is_renumbered(photo, status):
                opened = Identity.of(status)
            if not stat.S_ISREG(status.st_mode) or not opened.is_same_file(photo.identity):
                return Decoded(photo, "gone", detail="changed since it was settled")
            photo = replace(photo, identity=opened)
            head = os.pread(descriptor, formats.SIGNATURE_BYTES, 0)
            is_raw = raw.is_raw(photo.name)
            extension = os.path.splitext(photo.name)[1].lower()
            if not is_raw and not formats.has_signature(head) and extension not in formats.EXTENSIONS:
                return Decoded(photo, "skipped", detail="not a photo")
            if status.st_size > self._max_bytes:
                detail = f"{status.st_size / 1e6:.0f} MB; the limit is {self._max_bytes / 1e6:g} MB"
                return Decoded(photo, "failed", reason=Reason.TOO_LARGE, detail=detail)
            with self._readable_at_once(descriptor, status) as source:
                kind, seconds, size, text = worker.decode(source, row, is_raw, self._timeout_seconds)
        except OSError as error:
            return Decoded(photo, "left", detail=f"cannot be read now: {error.strerror}")
        except PhotoError as error:
            return Decoded(photo, "failed", reason=error.reason, detail=error.detail)
        finally:
            os.close(descriptor)
        if kind == OK:
            return Decoded(photo, "pixels", row=row, size=size, milliseconds=seconds * 1000)
        if kind == UNREADABLE:
            return Decoded(photo, "left", detail=f"cannot be read now: {text}")
        reason, _, detail = text.partition(" ")
        return Decoded(photo, "failed", reason=Reason(reason), detail=detail, milliseconds=seconds * 1000)

    @contextlib.contextmanager
    def _readable_at_once(self, descriptor: int, status: os.stat_result) -> Iterator[int]:
        """A descriptor for the decoder: of a copy in memory if the file is on a network.

        The time limit is for decoding. A share that delivers slowly takes its time, and the photo is not to blame.
        """
        if status.st_dev not in self._on_network:
            self._on_network[status.st_dev] = file_systems.is_network_device(status.st_dev)
        if not self._on_network[status.st_dev]:
            yield descriptor
            return
        copy = _memory_file("sorter-photo")
        try:
            offset = 0
            while offset < self._max_bytes and (block := os.pread(descriptor, _READ_BYTES, offset)):
                offset += os.pwrite(copy, block, offset)
                self._on_progress()
            yield copy
        finally:
            os.close(copy)


def _is_renumbered(photo: Photo, opened: os.stat_result) -> bool:
    """Tell whether a file has another inode number only because it was opened, and remember file systems that do so."""
    if inodes.are_known_to_be_real(opened.st_dev) or Identity.of(opened)._replace(inode=0) != photo.identity._replace(
        inode=0
    ):
        return False
    with contextlib.suppress(OSError):
        if Identity.of(os.lstat(photo.path)) == photo.identity:  # still the old number by name
            inodes.distrust(opened.st_dev)
            return True
    return False


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, memory: int, preprocessing: Preprocessing, limits: Limits) -> None:
        self._socket, theirs = socket.socketpair()
        arguments: list[object] = [
            theirs.fileno(),
            memory,
            preprocessing.size,
            preprocessing.crop,
            preprocessing.resize,
        ]
        arguments += [limits.max_megapixels, limits.max_jpeg_megapixels]
        # -P: never import from the current folder, which may be an inbox. In one that is gone Python does not start.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sorter.decoding.worker", *map(str, arguments)],
                cwd="/",
                pass_fds=(theirs.fileno(), memory),
                # rawpy brings numpy: on 64 CPUs the stacks of 64 BLAS threads would fill a worker's memory.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            self._socket.close()
            raise _cannot_start(error.strerror) from None
        finally:
            theirs.close()

    def await_ready(self) -> None:
        """Wait until the worker can decode, so that no photo is blamed for a worker that cannot start."""
        self._socket.settimeout(START_SECONDS)
        try:
            _receive(self._socket, len(READY))
        except (EOFError, OSError):
            reason = self._exit_reason()
            self.kill()
            raise _cannot_start(reason) from None

    def _exit_reason(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def decode(
        self, descriptor: int, row: int, is_raw: bool, timeout_seconds: float
    ) -> tuple[int, float, tuple[int, int], str]:
        """Have one open file decoded into a row.

        Raises:
            PhotoError: the worker crashed or did not answer in time, and must be replaced.
        """
        self._socket.settimeout(timeout_seconds)
        try:
            socket.send_fds(self._socket, [REQUEST.pack(row, is_raw)], [descriptor])
            kind, seconds, width, height, length = REPLY.unpack(_receive(self._socket, REPLY.size))
            return kind, seconds, (width, height), _receive(self._socket, length).decode("utf-8", "replace")
        except TimeoutError:
            raise PhotoError(Reason.DECODER_TIMEOUT, f"not decoded after {timeout_seconds:g} s") from None
        except (EOFError, ConnectionError):
            raise PhotoError(Reason.DECODER_CRASH, f"the decoder crashed ({self._exit_reason()})") from None

    def stop(self) -> None:
        """Kill the process from another thread than its owner, which will notice."""
        self._process.kill()

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _cannot_start(why: str | None) -> SorterError:
    return SorterError(
        f"the decoder processes do not start ({why}): check free memory and whether the installation has changed, "
        "then restart"
    )


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def _shared_memory(size: int) -> int:
    descriptor = _memory_file("sorter-pixels")
    os.ftruncate(descriptor, size)
    return descriptor


def _memory_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
