"""Reports to the service manager: ready, what is going on, still alive, stopping (systemd's sd_notify protocol).

In: the environment's NOTIFY_SOCKET and WATCHDOG_USEC. Out: datagrams, or nothing where no manager asked for them.
Nothing here raises: sorting matters more than reporting.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping

STATUS_SECONDS = 1.0
"""How often the status may change, so that a backlog does not keep the manager busy."""

_SEND_SECONDS = 5.0


class Notifier:
    """The connection to the service manager; does nothing where there is none.

    Args:
        environment: where the manager says where to send messages, and how often it expects a watchdog ping.
        clock: monotonic, in seconds.

    Attributes:
        alive_seconds: how often to call `alive`: three times within the manager's timeout; infinite if never.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = os.fsencode(name).replace(b"@", b"\0", 1) if name.startswith("@") else os.fsencode(name)
        self._is_wanted = name.startswith(("/", "@"))
        self.alive_seconds = _alive_seconds(environment) if self._is_wanted else float("inf")
        self._next_alive = self._next_status = 0.0
        self._status = ""

    def ready(self) -> None:
        """Report that photos are sorted from now on."""
        self._send("READY=1")
        self._next_alive = self._clock() + self.alive_seconds  # the manager's timeout starts here

    def alive(self) -> None:
        """Send a watchdog ping if it is time for one; cheap enough to call for every photo."""
        now = self._clock()
        if now >= self._next_alive and self._send("WATCHDOG=1"):
            self._next_alive = now + self.alive_seconds

    def status(self, describe: Callable[[], str]) -> None:
        """Show one line in `systemctl status`.

        Args:
            describe: returns the line; called only if the last one is old enough to be replaced.
        """
        now = self._clock()
        if not self._is_wanted or now < self._next_status:
            return
        self._next_status = now + STATUS_SECONDS
        # A line break in a file's name would start another message to the manager.
        text = " ".join(describe().split())
        if text != self._status and self._send(f"STATUS={text}"):
            self._status = text

    def stopping(self) -> None:
        """Report that the current batch is the last."""
        self._send("STOPPING=1\nSTATUS=Finishing the current batch")

    def _send(self, message: str) -> bool:
        if not self._is_wanted:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(_SEND_SECONDS)
                connection.sendto(message.encode(errors="backslashreplace"), self._address)
        except OSError:
            return False
        return True


def _alive_seconds(environment: Mapping[str, str]) -> float:
    # WATCHDOG_PID names the process that is to send pings; a child that inherited both variables is not it.
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return float("inf")
    with contextlib.suppress(ValueError):
        if (microseconds := int(environment.get("WATCHDOG_USEC", ""))) > 0:
            return microseconds / 3e6
    return float("inf")
