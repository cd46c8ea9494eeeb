"""The command that runs after each batch, `--on-sorted`.

In: the outcomes of each batch, from the mover's thread. Out: one call of the command for each batch, with JSON on its
standard input, in a thread of its own. Batches that are moved while the command runs share the next call, or, if the
model was replaced meanwhile, the next two: no more waits than is sorted within `LIMIT_SECONDS`. Whatever the command
does, sorting goes on, and the exit code is the same.
"""

import contextlib
import itertools
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
from sorter.history.store import Run

LIMIT_SECONDS = 30.0
"""A command that takes longer is killed, with everything it started. Twice this, for the call that is running and the
last one, must fit into the service's TimeoutStopSec=."""
_MAX_OUTPUT_BYTES = 1000  # of standard error, from its end
_LOOK_SECONDS = 0.05  # how often to ask whether a running command has ended
_KILL_SECONDS = 5.0  # how long a killed command may take to end

log = structlog.get_logger()


def split(command: str) -> list[str]:
    """Split the command into its program and arguments, as a shell would.

    Raises:
        ConfigurationError: it is empty, its quotes are not balanced, or its program does not exist.
    """
    try:
        words = shlex.split(command)
        words[:1] = [os.path.expanduser(word) for word in words[:1]]
        found = shutil.which(words[0]) if words else None
    except ValueError as error:  # quotes; a NUL
        reason = str(error)[:1].lower() + str(error)[1:]
        raise ConfigurationError(f"--on-sorted: cannot parse {command!r} ({reason}): correct the command") from None
    if not words:
        raise ConfigurationError("--on-sorted is empty: give a command or omit it")
    if found is None:
        raise ConfigurationError(
            f"--on-sorted: {words[0]!r} was not found or is not executable: check its path and its permissions"
        )
    return words


class Hook:
    """Runs the command after each batch, one call at a time.

    Args:
        words: the program and its arguments, see `split`.
        fields: what each call gets in addition to `run`, `model` and the photos.
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
        """Have the command called for one batch; returns at once."""
        with self._changed:
            self._waiting += moved
            self._changed.notify()

    def close(self) -> None:
        """Call the command for what still waits, and end; idempotent.

        That takes two calls at most, or three if the model was replaced during the one that is running.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def kill(self) -> None:
        """Kill a running command and everything it started, as when it takes too long."""
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):  # it has ended, or runs as another user by now
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                moved = [*itertools.takewhile(self._is_of_next_run, self._waiting)]
                del self._waiting[: len(moved)]
            if not moved:
                return
            try:
                problem, output = self._call(moved)
            except Exception as error:  # program removed, disk full …: this thread goes on, or the queue would grow
                problem, output = f"cannot be run: {str(error) or type(error).__name__}", b""
            if problem:
                detail = output.decode(errors="backslashreplace").strip()
                log.warning("hook.failed", command=self._words[0], reason=problem, detail=detail, photos=len(moved))

    def _is_of_next_run(self, outcome: Outcome) -> bool:
        return _run(outcome) == _run(self._waiting[0])

    def _call(self, moved: Sequence[Outcome]) -> tuple[str, bytes]:
        """Run the command once, for photos of one run.

        Returns:
            What went wrong, empty if nothing did, and the end of the command's standard error.
        """
        run = _run(moved[0])
        content = {"run": run.id, "model": run.model, **self._fields, "photos": [described(o) for o in moved]}
        # A file, not a pipe: then a command that reads slowly, or not at all, delays nothing.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(content).encode())
            stdin.seek(0)
            process = self._process = subprocess.Popen(
                self._words,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the sorter alone; and the command is killed as a group
            )
        assert process.stderr is not None
        try:
            with process.stderr as errors:
                output, in_time = _follow(process, errors.fileno(), time.monotonic() + LIMIT_SECONDS)
            if not in_time:
                self.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel: nothing more to be done
                    process.wait(_KILL_SECONDS)
                return f"took longer than {LIMIT_SECONDS:g} seconds and was killed", output
        finally:
            self._process = None
        code = process.returncode
        if code == 0:
            return "", output
        return f"ended with {code}" if code > 0 else f"was ended by signal {-code}", output


def _run(outcome: Outcome) -> Run:
    assert outcome.decision is not None, "it was moved"
    return outcome.decision.run


def _follow(process: subprocess.Popen[bytes], errors: int, deadline: float) -> tuple[bytes, bool]:
    """Read a command's standard error until it ends; processes that it leaves behind may keep the pipe open.

    Returns:
        The end of the output, and whether the command ended before the deadline (a monotonic time).
    """
    os.set_blocking(errors, False)
    waiting = select.poll()
    waiting.register(errors, select.POLLIN)
    output = b""
    while time.monotonic() < deadline:
        # Asked before reading: everything that the command wrote before it ended is in the pipe by then.
        ended = process.poll() is not None
        if waiting.poll(0 if ended else 1000 * _LOOK_SECONDS):
            piece = os.read(errors, 1 << 16)
            output = (output + piece)[-_MAX_OUTPUT_BYTES:]
            if piece and not ended:
                continue
            if not piece and not ended:  # it has closed its standard error and goes on
                waiting.unregister(errors)
        if ended:
            return output, True
    return output, False
