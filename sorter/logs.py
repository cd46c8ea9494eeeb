"""Log set-up: one JSON object per line on standard error, or readable lines on a terminal.

Descriptor 2 is reserved for the log. Anything else written to it (by native libraries, Python's warnings) is captured
through a pipe and logged as `native.output`, so that a program can parse every line of standard error. The traceback of
a crash of Python itself (a segmentation fault, the watchdog's SIGABRT) is the one exception: it is written as it is.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import IO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sorter.settings import LogFormat, LogLevel

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class LogStream:
    """The terminal or file behind the log. If it cannot be written (disk full, closed pipe), sorting goes on.

    Attributes:
        above: prints a line above the progress bar while one is shown.
        only_problems: show warnings and errors only, because the rest is shown in another way.
    """

    def __init__(self, descriptor: int) -> None:
        self._file: IO[str] = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.above: Callable[[str], None] | None = None
        self.only_problems = False
        self.encoding = self._file.encoding

    def write(self, text: str) -> int:
        """Write text; errors are ignored."""
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; errors are ignored."""
        with contextlib.suppress(OSError):
            self._file.flush()

    def show_cursor(self) -> None:
        """Show the cursor that a progress bar has hidden; safe in a signal handler, unlike `write`."""
        with contextlib.suppress(OSError, ValueError):  # it may be closed
            os.write(self._file.fileno(), b"\x1b[?25h\n")

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def isatty(self) -> bool:
        """True for a terminal."""
        return self._file.isatty()

    def close(self) -> None:
        """Close the descriptor; errors are ignored."""
        with contextlib.suppress(OSError):
            self._file.close()


class _LineLogger:
    """Receives structlog's rendered lines."""

    def __init__(self, stream: LogStream) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock:
            if self._stream.above is not None:
                self._stream.above(line)
            else:
                self._stream.write(line + "\n")

    debug = info = warning = error = critical = msg


def _only_problems(stream: LogStream) -> Processor:
    """Drop what the terminal shows in another way, and keep warnings and errors."""

    def drop(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if stream.only_problems and method in ("debug", "info"):
            raise structlog.DropEvent
        return event

    return drop


def _event_first(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put timestamp, level and event first, for people reading the JSON."""
    return {"timestamp": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event"), **event}


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Escape control characters: file names may contain any."""
    return {k: _escape(v) if isinstance(v, str) else v for k, v in event.items()}


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _is_json(log_format: LogFormat) -> bool:
    """True if the log is JSON: because it was asked for, or because standard error is not a terminal."""
    return log_format == "json" or (log_format == "auto" and not os.isatty(2))


def say(line: str) -> None:
    """Write a line that is no event to standard error, which may be reserved for the log."""
    if structlog.is_configured():
        structlog.get_config()["logger_factory"]().msg(line)
    else:
        sys.stderr.write(f"{line}\n")


def configure(log_format: LogFormat, log_level: LogLevel) -> LogStream:
    """Reserve standard error for the log, for the rest of the process.

    Returns:
        The stream behind the log, for a progress bar to draw on.
    """
    try:
        descriptor = os.dup(2)
    except OSError:  # standard error is closed
        descriptor = os.open(os.devnull, os.O_WRONLY)
    stream = LogStream(descriptor)
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not _is_json(log_format):
        render = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), pad_event_to=16, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )
        processors += [_only_problems(stream), _printable, render]
    else:
        # Escaped to ASCII: names that are not UTF-8 contain lone surrogates, which cannot be encoded as UTF-8.
        processors += [_event_first, structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[log_level]),
        logger_factory=lambda *_: _LineLogger(stream),
        cache_logger_on_first_use=True,
    )
    # The text of a crash of Python itself: whoever forwards descriptor 2 dies in it.
    faulthandler.enable(stream.fileno())
    _capture_descriptor_2()
    return stream


def _capture_descriptor_2() -> None:
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    log = structlog.get_logger()

    def forward() -> None:
        crashed = False
        with os.fdopen(read_end, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                crashed = crashed or line.startswith(("Traceback", "Fatal Python error"))
                if text := line.strip():
                    (log.error if crashed else log.debug)("native.output", text=text)

    threading.Thread(target=forward, name="native-output", daemon=True).start()
