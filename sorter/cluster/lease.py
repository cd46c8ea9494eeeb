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
from sorter.errors import NotNowError, SorterError, StoreError

Action = Literal["run", "undo"]

RENEW_SECONDS = 30.0
FRESH_SECONDS = 120.0
_NAME = re.compile(r"/\d{8}\.json$")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has renewed a lease last.

    Attributes:
        number: of that renewal; 0 if there was none.
        text: the process, for a person.
        age_seconds: how long ago that was, by the store's clock.
        is_released: its work has ended in good order.
        is_killed: its process was on this machine, and has ended.
        action: what it does with the job.
    """

    number: int
    text: str = ""
    age_seconds: float = 0.0
    is_released: bool = True
    is_killed: bool = False
    action: Action = "run"

    @property
    def is_fresh(self) -> bool:
        """Whether somebody is at work."""
        return self._is_recent and not self.is_killed

    @property
    def may_have_nodes(self) -> bool:
        """Whether nodes may be at work: those on other machines outlive a command that is killed, for a while."""
        return self.is_fresh or (self._is_recent and self.action == "run")  # an undo has none

    @property
    def _is_recent(self) -> bool:
        return not self.is_released and self.age_seconds < FRESH_SECONDS

    @property
    def advice(self) -> str:
        """What whoever cannot have the lease is to do."""
        wait_seconds = max(0.0, FRESH_SECONDS - self.age_seconds)
        return f"wait for its end, or, if it was killed, for {wait_seconds:.0f} seconds"


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
    number, age_seconds = int(last.key[-13:-5]), (store.now() - last.modified).total_seconds()

    def parse(content: bytes) -> Holder:
        try:
            said: dict[str, Any] = json.loads(content)
            here = said["process_table"] == _process_table()
            return Holder(
                number=number,
                text=f"process {said['process']} on {said['host']}",
                age_seconds=age_seconds,
                is_released=said["released"],
                is_killed=here and not os.path.exists(f"/proc/{said['process']}"),
                action=said["action"],
            )
        except (ValueError, TypeError, KeyError):  # a damaged one is somebody's until it is too old
            return Holder(number, "another process", age_seconds, is_released=False)

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
        self._error: SorterError | None = None
        self._token = uuid4().hex
        last = holder(store, folder)
        self._number = last.number
        is_taken = last.may_have_nodes if action == "undo" else last.is_fresh
        if is_taken or not self._renew():
            raise NotNowError(f"{last.text or 'another process'} is at work on this job: {last.advice}")

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
            with contextlib.suppress(StoreError):
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
            "token": self._token,
        }
        key, data = f"{self._folder}lease/{self._number + 1:08d}.json", json.dumps(content).encode()
        # If the answer to a first try was lost, the second one finds the key taken, by this process.
        if not self._store.put_new(key, data) and self._store.read(key) != data:
            return False
        self._number += 1
        return True

    def _run(self) -> None:
        while not self._ending.wait(RENEW_SECONDS):
            try:
                if not self._renew():
                    raise NotNowError("another process has taken this job over: wait for its end")
            except StoreError:
                continue  # a later one may be in time; the nodes notice themselves that the store is away
            except SorterError as error:
                self._error = error
                return


def _process_table() -> list[str]:
    """What tells where a process number counts: containers of one machine have tables of their own."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return [os.uname().nodename, file.read().strip(), os.readlink("/proc/self/ns/pid")]
