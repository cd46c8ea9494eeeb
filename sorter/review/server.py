"""Serves the page on 127.0.0.1 until it is stopped, and opens the browser where there is one.

In: the application. Out: one address, which has a secret in it that is new at each start.
"""

import html
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from sorter.errors import ConfigurationError

HOST = "127.0.0.1"
USUAL_PORT = 8471
"""Taken if it is free: what the browser remembers for the page, such as whether keys are on, is remembered by port."""

_MAX_CONNECTIONS = 32
_GOODBYE_SECONDS = 2  # for requests in hand at the end

# The token is in no program's arguments, which any user of the machine can list: it is in a file that only this user
# can read, as Jupyter does it.
_REDIRECT = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={url}">
<title>sorter review</title>
<p>This page leads to <a href="{url}">sorter review</a>.</p>
"""


def new_token() -> str:
    """The secret part of an address: 32 random bytes."""
    return secrets.token_urlsafe(32)


def listen(port: int | None) -> socket.socket:
    """A socket that listens on this machine alone.

    Args:
        port: None for the usual one, or a free one if that is taken.

    Raises:
        ConfigurationError: the port is taken, or this user may not open it.
    """
    if port is None:
        with suppress(OSError):
            return _listen(USUAL_PORT)
    try:
        return _listen(port or 0)
    except OSError as error:
        raise ConfigurationError(
            f"--port {port or 0} cannot be used ({error.strerror}): choose another port, or none for a free one"
        ) from None


def _listen(port: int) -> socket.socket:
    listener = socket.create_server((HOST, port))
    # Connections inherit it. Without it the second half of an answer waits 40 ms for the first one's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer requests until SIGINT, SIGTERM or, unless it is ignored, SIGHUP."""
    # uvicorn raises the signal again that ended it: here as an exception, so that everything is closed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    config = uvicorn.Config(
        app,
        access_log=False,  # the token is in the path
        http="h11",
        lifespan="off",
        limit_concurrency=_MAX_CONNECTIONS,
        log_level="error",
        proxy_headers=False,  # by default it believes what other programs of this machine claim
        server_header=False,
        timeout_graceful_shutdown=_GOODBYE_SECONDS,
        ws="none",
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def opened_browser(url: str) -> Iterator[None]:
    """Open an address in the browser of this desktop, if there is one, without waiting for it."""
    if not _has_desktop():
        yield
        return
    descriptor, path = tempfile.mkstemp(suffix=".html", prefix="sorter-review-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_REDIRECT.format(url=html.escape(url)))
        threading.Thread(target=_open, args=(Path(path).as_uri(),), name="browser", daemon=True).start()
        yield
    finally:
        Path(path).unlink(missing_ok=True)


def _has_desktop() -> bool:
    """Whether a browser would have a window: those in a terminal would take it from the review."""
    return sys.platform == "darwin" or any(os.environ.get(n) for n in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))


def _open(url: str) -> None:
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(url)
