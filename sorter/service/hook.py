"""The command that is told what was moved, `--on-sorted`.

In: the outcomes of each batch, from the mover's thread. Out: one call of the command for each batch, with JSON on its
standard input, in a thread of its own. Batches that wait while the command runs share the next call: what waits is at
most what is sorted within `LIMIT_SECONDS`. Whatever the command does, sorting goes on and ends with the same exit code.
"""

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import structlog

from sorter.decisions import Outcome, described
from sorter.errors import ConfigurationError

LIMIT_SECONDS = 30.0
"""A command that takes longer is killed, with what it started. Two of these, the one that runs
and the last one, have to fit into the service's TimeoutStopSec=."""
_MOST_SAID = 1000  # bytes of standard error, the last ones
_LOOK_SECONDS = 0.05  # how often a running command is asked whether it has ended
_KILLED_SECONDS = 5.0

log = structlog.get_logger()


def split(command: str) -> list[str]:
    """The program and its arguments, as a shell would take them apart.

    Raises:
        ConfigurationError: there is none, its quotes are not balanced, or there is no such program.
    """
    try:
        words = shlex.split(command)
        words[:1] = [os.path.expanduser(word) for word in words[:1]]
        found = shutil.which(words[0]) if words else None
    except ValueError as error:  # quotes; a NUL
        reason = str(error)[:1].lower() + str(error)[1:]
        raise ConfigurationError(f"--on-sorted {command!r} cannot be taken apart ({reason}): mend it") from None
    if not words:
        raise ConfigurationError("--on-sorted is empty: name a command, or leave it away")
    if found is None:
        raise ConfigurationError(
            f"--on-sorted: there is no program {words[0]!r} that can be run: check its path and its permissions"
        )
    return words


class Hook:
    """Runs the command after each batch, one call at a time.

    Args:
        words: the program and its arguments, see `split`.
        fields: what stands beside the photos, `run` and `model`.
    """

    def __init__(self, words: Sequence[str], fields: dict[str, Any]) -> None:
        self._words, self._fields = list(words), fields
        self._waiting: list[Outcome] = []
        self._changed = threading.Condition()
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="on-sorted", daemon=True)
        self._thread.start()

    def notify_batch(self, moved: Sequence[Outcome]) -> None:
        """Have the command told of one batch; returns at once."""
        with self._changed:
            self._waiting += moved
            self._changed.notify()

    def close(self) -> None:
        """Tell what still waits, and end: after at most two calls; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def kill(self) -> None:
        """End a command that is running, with what it started, as for one that takes too long."""
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):  # it has ended, or become another user
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                moved, self._waiting = self._waiting, []
            if not moved:
                return
            try:
                problem, said = self._call(moved)
            except Exception as error:  # the program is gone, no room; without this thread what waits would pile up
                problem, said = f"cannot be run: {str(error) or type(error).__name__}", b""
            if problem:
                detail = said.decode(errors="backslashreplace").strip()
                log.warning("hook.failed", command=self._words[0], reason=problem, detail=detail, photos=len(moved))

    def _call(self, moved: Sequence[Outcome]) -> tuple[str, bytes]:
        """Run the command once; what went wrong, empty if nothing did, and the end of what it said."""
        # A file and not a pipe, so that nobody has to wait for a command that reads slowly, or not at all.
        with tempfile.TemporaryFile() as told:
            told.write(json.dumps(self._fields | {"photos": [described(outcome) for outcome in moved]}).encode())
            told.seek(0)
            process = self._process = subprocess.Popen(
                self._words,
                stdin=told,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is meant for the sorter; and it is killed as a group
            )
        assert process.stderr is not None
        try:
            with process.stderr as errors:
                said, in_time = _follow(process, errors.fileno(), time.monotonic() + LIMIT_SECONDS)
            if not in_time:
                self.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel is left there
                    process.wait(_KILLED_SECONDS)
                return f"took longer than {LIMIT_SECONDS:g} seconds and was killed", said
        finally:
            self._process = None
        code = process.returncode
        return "" if code == 0 else f"ended with {code}" if code > 0 else f"was ended by signal {-code}", said


def _follow(process: subprocess.Popen[bytes], errors: int, deadline: float) -> tuple[bytes, bool]:
    """Read what a command says until it has ended; what it left behind may hold the pipe for longer."""
    os.set_blocking(errors, False)
    waiting = select.poll()
    waiting.register(errors, select.POLLIN)
    said = b""
    while time.monotonic() < deadline:
        # Asked before the look into the pipe: what it said before it ended is there by then.
        ended = process.poll() is not None
        if waiting.poll(0 if ended else 1000 * _LOOK_SECONDS):
            piece = os.read(errors, 1 << 16)
            said = (said + piece)[-_MOST_SAID:]
            if piece and not ended:
                continue
            if not piece and not ended:  # it has closed its standard error and goes on
                waiting.unregister(errors)
        if ended:
            return said, True
    return said, False
