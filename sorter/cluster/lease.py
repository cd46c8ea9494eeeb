"""Keeps two commands from working on one job, and two jobs from working on the same photos.

In: a job's folder. Out: a lease, renewed until it is released. Each renewal is a new small object,
`lease/00000001.json`, because not every store can replace an object only if nobody else has: the one with the highest
number counts. Its age is told by the store's clock alone. No photo is lost without a lease, but two jobs with other
settings would put one into two folders.
"""

import collections
import contextlib
import json
import os
import re
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

from sorter.cluster.stores import Store, read_own
from sorter.errors import NotNowError, ObjectError, SorterError, StoreError

Action = Literal["run", "undo"]

RENEW_SECONDS = 30.0
FRESH_SECONDS = 120.0
_SOMEBODY = "another process"
_NAME = re.compile(r"/\d{8}\.json$")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has renewed a lease last.

    Attributes:
        number: of that renewal; 0 if there was none.
        text: the process, for a person.
        action: what it does with the job.
        is_fresh: it is at work.
        wait_seconds: until it counts as gone, if it was killed, and its nodes with it.
        nodes_until: until when nodes may be at work, in seconds since the epoch by the store's clock; 0 if there are
            none. Those on other machines outlive a run that is killed, for a while, and also the commands after it.
    """

    number: int
    text: str = _SOMEBODY
    action: Action = "run"
    is_fresh: bool = False
    wait_seconds: float = 0.0
    nodes_until: float = 0.0

    @property
    def may_have_nodes(self) -> bool:
        """Whether it or nodes may be at work."""
        return self.wait_seconds > 0

    def refusal(self, of_what: str) -> NotNowError:
        """For whoever cannot work on something meanwhile: who does, and what to do."""
        if not self.is_fresh:
            who = "nodes of a command that was killed may still be"
            return NotNowError(f"{who} at work on {of_what}: wait for {self.wait_seconds:.0f} seconds")
        or_for = f"or, if it was killed, for {self.wait_seconds:.0f} seconds"
        return NotNowError(f"{self.text} is at work on {of_what}: wait for its end, {or_for}")


def holder(store: Store, folder: str) -> Holder:
    """Who holds a job's lease.

    Args:
        store: of the output.
        folder: of the job.

    Raises:
        StoreError: the store does not answer, or refuses to read it.
    """
    renewals = (item for item in store.list(f"{folder}lease/") if _NAME.search(item.key))
    last = next(iter(collections.deque(renewals, maxlen=1)), None)
    if last is None:
        return Holder(0)
    number, gone = int(last.key[-13:-5]), last.modified.timestamp() + FRESH_SECONDS

    def parse(content: bytes) -> Holder:
        try:
            said: dict[str, Any] = json.loads(content)
            text, action = f"process {said['process']} on {said['host']}", said["action"]
            is_killed = said["process_table"] == _process_table() and not os.path.exists(f"/proc/{said['process']}")
            is_released, nodes_until = said["released"], float(said["nodes_until"])
        except (ValueError, TypeError, KeyError):  # a damaged one is somebody's until it is too old
            text, action, is_killed, is_released, nodes_until = _SOMEBODY, "run", False, False, 0.0
        if not is_released and action == "run":
            nodes_until = max(nodes_until, gone)
        if is_released and not nodes_until:
            return Holder(number, text, action)
        now = store.now(folder).timestamp()
        is_fresh = not is_released and not is_killed and now < gone
        wait_seconds = max(nodes_until, gone if is_fresh else 0.0) - now
        return Holder(number, text, action, is_fresh, max(0.0, wait_seconds), nodes_until)

    return read_own(store, last.key, parse) or Holder(0)


class Lease:
    """A job's lease, held while the context lasts.

    Args:
        store: of the output.
        folder: of the job.
        action: what it is held for. A run goes on at once where one was killed, beside its nodes; an undo waits for
            their end.

    Raises:
        NotNowError: another process has it.
    """

    def __init__(self, store: Store, folder: str, action: Action = "run") -> None:
        self._store, self._folder, self._action = store, folder, action
        self._ending = threading.Event()
        self._error: SorterError | ObjectError | None = None
        self._token = uuid4().hex
        last = holder(store, folder)
        self._number, self._nodes_until = last.number, last.nodes_until
        is_taken = last.may_have_nodes if action == "undo" else last.is_fresh
        if is_taken or not self._renew():
            raise last.refusal("this job")

    def __enter__(self) -> Self:
        """Start the thread that renews it."""
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release it."""
        self._ending.set()
        self._thread.join()
        if self._error is None:
            with contextlib.suppress(StoreError, ObjectError):
                self._renew(released=True)

    def check(self) -> None:
        """Make sure that nobody else has taken it.

        Raises:
            SorterError: somebody has, or the store does not answer.
        """
        if self._error is not None:
            raise self._error

    def _renew(self, *, released: bool = False) -> bool:
        content = {
            "process": os.getpid(),
            "host": os.uname().nodename,
            "process_table": _process_table(),
            "action": self._action,
            "released": released,
            "nodes_until": self._nodes_until,
            "token": self._token,
        }
        while True:
            key, data = f"{self._folder}lease/{self._number + 1:08d}.json", json.dumps(content).encode()
            # If the answer to a first try was lost, the second one finds the key taken, by this process.
            if not self._store.put_new(key, data) and self._token.encode() not in (self._store.read(key) or b""):
                return False
            self._number += 1
            if not released or self._store.read(key) == data:
                return True

    def _run(self) -> None:
        while not self._ending.wait(RENEW_SECONDS):
            try:
                if not self._renew():
                    raise NotNowError("another process has taken this job over: wait for its end")
            except StoreError:
                continue  # a later one may be in time; the nodes notice themselves that the store is away
            except (SorterError, ObjectError) as error:
                self._error = error
                return


def _process_table() -> list[str]:
    """What tells where a process number counts: containers of one machine have tables of their own."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return [os.uname().nodename, file.read().strip(), os.readlink("/proc/self/ns/pid")]
