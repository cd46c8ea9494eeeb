"""A store in memory that keeps every condition, and a scheduler that tries all orders in which movers may use it.

For what no server lets a test decide: which of two processes is next, at each single request.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sorter.cluster.stores import MARK, MODIFIED, Mode, Store, StoredObject, in_parts
from sorter.errors import ChangedError, StoreError

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class MemoryStore:
    """One bucket; `step` is called before each request. By its clock each write takes a second."""

    bucket: str = "photos"
    step: Callable[[str], None] = lambda request: None
    objects: dict[str, tuple[StoredObject, bytes]] = field(default_factory=dict)
    writes: int = 0
    changes: list[tuple[str, str]] = field(default_factory=list)
    """`put` or `delete`, and the key, in their order."""
    idle_seconds: float = 0.0
    url: str = "memory://photos"

    def put(self, key: str, data: bytes, *, as_parts: bool = False, **metadata: str) -> StoredObject:
        """What another program does: it writes, whatever is there."""
        self.writes += 1
        etag = f'"{hashlib.md5(data).hexdigest()}{"-1" * as_parts}"'
        item = StoredObject(key, len(data), etag, START + timedelta(seconds=self.writes), "STANDARD", dict(metadata))
        self.objects[key] = item, data
        self.changes.append(("put", key))
        return replace(item, metadata=None)

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        for key in sorted(self.objects):
            if key.startswith(prefix) and key > after and key in self.objects:
                yield replace(self.objects[key][0], metadata=None)

    def head(self, key: str) -> StoredObject | None:
        self.step("head")
        return self.objects[key][0] if key in self.objects else None

    def read(self, key: str) -> bytes | None:
        return self.objects[key][1] if key in self.objects else None

    def download(self, item: StoredObject, path: Path) -> None:
        there = self.objects.get(item.key)
        if there is None or there[0].etag != item.etag:
            raise ChangedError("it was replaced or deleted after it was listed")
        path.write_bytes(there[1])

    def put_new(self, key: str, data: bytes) -> bool:
        self.step("put")
        if key in self.objects:
            return False
        self.put(key, data)
        return True

    def copy_new(
        self, item: StoredObject, source: Store, key: str, token: str, mode: Mode, *, unlike: str | None = None
    ) -> str | None:
        assert isinstance(source, MemoryStore)
        as_parts = item.is_in_parts if unlike is None else not in_parts(unlike)  # as the mode `copy` has it
        in_one_request = mode == "copy" and not as_parts
        if not in_one_request:  # the bytes are read first, and become an object later
            self.step("get")
            read = source.objects.get(item.key)
            if read is None or read[0].etag != item.etag:
                return None
        self.step("copy")
        there = source.objects.get(item.key) if in_one_request else read
        if there is None or there[0].etag != item.etag or key in self.objects:
            return None
        original, data = there
        metadata = {MODIFIED: original.modified.isoformat(), **(original.metadata or {}), MARK: token}
        return self.put(key, data, as_parts=as_parts, **metadata).etag

    def delete_exact(self, item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        self.step("delete")
        if item.key not in self.objects:
            return "gone"
        if self.objects[item.key][0].etag != item.etag:
            return "changed"
        del self.objects[item.key]
        self.changes.append(("delete", item.key))
        return "deleted"

    def remove_own(self, key: str) -> None:
        self.objects.pop(key, None)

    def now(self, prefix: str) -> datetime:
        return START + timedelta(seconds=self.writes + self.idle_seconds)


class KilledError(BaseException):
    """Ends a mover at a request, as SIGKILL does: it is no `Exception`, and nothing cleans up."""


class _Turns:
    """Lets one thread run at a time, each from one request to the next."""

    def __init__(self, programs: list[Callable[[], object]], store: MemoryStore) -> None:
        self.results: list[object] = [None] * len(programs)
        self._names: dict[int | None, int] = {}
        self._wake = [threading.Semaphore(0) for _ in programs]
        self._yielded = threading.Semaphore(0)
        self.running = set(range(len(programs)))
        self._dead: set[int] = set()
        store.step = self._step
        self._threads = [threading.Thread(target=self._run, args=pair, daemon=True) for pair in enumerate(programs)]
        for number, thread in enumerate(self._threads):
            thread.start()
            self._names[thread.ident] = number

    def go(self, number: int, *, kill: bool = False) -> None:
        """Let one do its next request, and run on until the one after that."""
        if kill:
            self._dead.add(number)
        self._wake[number].release()
        self._yielded.acquire()

    def _run(self, number: int, program: Callable[[], object]) -> None:
        self._wake[number].acquire()
        try:
            self.results[number] = program()
        except KilledError:
            self.results[number] = "killed"
        except StoreError as error:
            self.results[number] = error
        self.running.discard(number)
        self._yielded.release()

    def _step(self, request: str) -> None:
        number = self._names.get(threading.get_ident())
        if number is None:
            return
        self._yielded.release()
        self._wake[number].acquire()
        if number in self._dead:
            raise KilledError


def every_order(
    scene: Callable[[], tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]],
    judge: Callable[[MemoryStore, list[object]], None],
    kills: int,
) -> int:
    """Play a scene in every order of its programs' requests, with up to so many kills, and judge each end.

    Args:
        scene: makes a store, the programs, and what other programs do to it in one step, each once, at any time.
        judge: looks at the store and what the programs returned.
        kills: so many of the programs may be killed, at any request.

    Returns:
        How many orders there were.
    """
    count, prefix = 0, list[int]()
    while True:
        choices = _play(scene, judge, kills, prefix)
        count += 1
        while choices and choices[-1][0] == choices[-1][1] - 1:
            choices.pop()
        if not choices:
            return count
        prefix = [taken for taken, _ in choices[:-1]] + [choices[-1][0] + 1]


def _play(
    scene: Callable[[], tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]],
    judge: Callable[[MemoryStore, list[object]], None],
    kills: int,
    prefix: list[int],
) -> list[tuple[int, int]]:
    """One order. Returns what was chosen at each point, of how many."""
    store, programs, others = scene()
    turns, choices = _Turns(programs, store), list[tuple[int, int]]()
    waiting = list(range(len(others)))
    for number in range(len(programs)):
        turns.go(number)  # up to its first request
    while turns.running:
        options: list[tuple[str, int]] = [("go", number) for number in sorted(turns.running)]
        options += [("other", number) for number in waiting]
        if kills:
            options += [("kill", number) for number in sorted(turns.running)]
        taken = prefix[len(choices)] if len(choices) < len(prefix) else 0
        choices.append((taken, len(options)))
        what, number = options[taken]
        if what == "other":
            waiting.remove(number)
            others[number]()
        else:
            kills -= what == "kill"
            turns.go(number, kill=what == "kill")
    store.step = lambda request: None
    judge(store, turns.results)
    return choices
