"""A job's files: what was listed, decided and moved, as immutable objects of about 1,000 rows, most of them Parquet.

In and out: rows. Each file is created once (PUT If-None-Match): whoever comes second reads what the first one wrote,
and goes by that. So all attempts at a shard, also those of nodes that were thought dead, agree on what is to happen.

    shards/00000.parquet      what was listed          `StoredObject`
    decisions/00000.parquet   what belongs where       `Decided`
    moves/00000.parquet       what became of each      `MovedRow`; the shard is finished
    problems/00000.jsonl      what failed or stayed    `Problem`, for people and `status`; only if there is something
    undo/00000.1.parquet      what became of each      `MovedRow`, on the way back: some stayed, and are tried again
    undo/00000.parquet        what became of the rest  `MovedRow`: all are back
    undoing/00000.1           its first undo begins    empty; finished once it has written the shard's first `undo` file
    moving/00000              somebody began to move   empty
    deaths/00000.<unique>     a node died              empty; written by the command, which saw it

Beside them lie `job.json`, which describes the job, and `lease/`, which says who works on it.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar
from uuid import uuid4

import pyarrow
from pyarrow import parquet

from sorter.cluster.families import families
from sorter.cluster.stores import Store, StoredObject, read_own
from sorter.errors import StoreError
from sorter.inbox.sidecars import SidecarNames

READERS = 16
"""So many of a job's files are read at a time."""

Table = Literal["decisions", "moves", "undo"]
_SECOND = pyarrow.timestamp("s", tz="UTC")
_TEXT, _WHOLE = pyarrow.string(), pyarrow.int64()
_LISTED = pyarrow.schema({"key": _TEXT, "size": _WHOLE, "etag": _TEXT, "modified": _SECOND, "storage_class": _TEXT})
_DECIDED = pyarrow.schema(
    {
        "key": _TEXT,
        "kind": _TEXT,
        "destination": _TEXT,
        "label": _TEXT,
        "confidence": pyarrow.float64(),
        "follows": _TEXT,
        "reason": _TEXT,
        "detail": _TEXT,
    }
)
_MOVED = pyarrow.schema({"key": _TEXT, "kind": _TEXT, "destination": _TEXT, "etag": _TEXT, "reason": _TEXT})
_DEATHS = "deaths/"
_UNDOING = "undoing/"
_NAME = re.compile(r"\d+(?:-[01])*")
_UNDO_NAME = re.compile(rf"{_NAME.pattern}(?:\.\d+)?\.parquet")
_UNDOING_NAME = re.compile(rf"({_NAME.pattern})\.(\d+)")
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Decided:
    """What is to become of one object of a shard.

    Attributes:
        key: of the object.
        kind: `sorted`, `unsure`, `failed` and `sidecar` are to be moved; the others stay.
        destination: the key it should have, without a number for a name that is taken; None if it stays. Of a sidecar:
            its own name in its photo's folder.
        label: the likeliest class, None if it was not classified.
        confidence: that class's probability, 0 to 1.
        follows: for a sidecar, the key of its photo.
        reason: the code of a failure, as in `failed/`.
        detail: why, for a person.
    """

    key: str
    kind: Literal["sorted", "unsure", "failed", "sidecar", "skipped", "left", "changed"]
    destination: str | None = None
    label: str | None = None
    confidence: float | None = None
    follows: str | None = None
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class MovedRow:
    """What became of one object of a shard: `Moved`, with the key that it had.

    Attributes:
        key: that it had before.
        kind: as in `Moved`, or `stayed` for what was not to be moved.
        destination: where it is now.
        etag: of what is there.
        reason: why it was not moved.
    """

    key: str
    kind: Literal["moved", "changed", "left", "stayed"]
    destination: str | None = None
    etag: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A photo that failed, or an object that stays although it is to be moved.

    Attributes:
        key: that it had when it was listed.
        kind: `failed`, `left`, or `changed`: replaced or deleted since it was listed.
        reason: for a person.
        etag: as it was listed; None if that does not matter.
    """

    key: str
    kind: Literal["failed", "left", "changed"]
    reason: str
    etag: str | None = None


class JobFiles:
    """The files of one job. Shards are `00000`, `00001`; the halves of one that was split `00000-0`, `00000-1`.

    Args:
        store: the bucket of the output.
        folder: `<output prefix>.sorter/cluster/<job>/`.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder

    def shards(self) -> list[str]:
        """The names of all shards, in order."""
        return list(self.written("shards"))

    def read_shard(self, name: str) -> list[StoredObject]:
        """What was listed, in the order of keys.

        Raises:
            StoreError: the shard does not exist.
        """
        rows = self._read("shards", name, StoredObject)
        if rows is None:
            raise StoreError(f"{self._key('shards', name)} is gone from {self.store.url}: start a new job")
        return rows

    def put_shard(self, name: str, rows: Sequence[StoredObject]) -> bool:
        """Create a shard. False if there is one with that name."""
        return self._put("shards", name, rows, _LISTED)

    def finished(self, table: Table = "moves") -> set[str]:
        """The names of the shards that have this file."""
        return set(self.written(table))

    def written(self, table: Literal["shards"] | Table) -> dict[str, datetime]:
        """When each file of a table was written, by the shards' names, in order."""
        folder, found = f"{self.folder}{table}/", dict[str, datetime]()
        for item in self.store.list(folder):
            name = item.key.removeprefix(folder).removesuffix(".parquet")
            if is_shard_name(name) and item.key == self._key(table, name):
                found[name] = item.modified
        return {name: found[name] for name in sorted(found, key=_position)}

    def split(self, name: str, sidecars: SidecarNames) -> list[str]:
        """Give a shard up that kills whoever works on it, in favour of two halves. Call it again after any failure.

        The shard's own decisions are then an empty list, and count: who still works on it learns from `put_decisions`
        that it is to do nothing.

        Args:
            name: of the shard.
            sidecars: which sidecar belongs to which photo: they stay together.

        Returns:
            The names of the halves; empty if the shard cannot be split: it was decided after all, or is one photo.
        """
        together = families(self.read_shard(name), sidecars)
        if len(together) < 2 or self.put_decisions(name, []):
            return []
        middle = len(together) // 2
        halves = [f"{name}-0", f"{name}-1"]
        for half, members in zip(halves, (together[:middle], together[middle:]), strict=True):
            self.put_shard(half, sorted((row for family in members for row in family), key=lambda row: row.key))
        self.put_moves(name, [])
        return halves

    def put_decisions(self, name: str, rows: Sequence[Decided]) -> list[Decided]:
        """Create a shard's decisions, unless it has some. Returns those that count."""
        self._put("decisions", name, rows, _DECIDED)
        first = self.read_decisions(name)  # also if they seem to be ours: not every store lets only one be the first
        assert first is not None, "a file of the job is never deleted"
        return first

    def read_decisions(self, name: str) -> list[Decided] | None:
        """A shard's decisions; None before there are any."""
        return self._read("decisions", name, Decided)

    def put_moves(self, name: str, rows: Sequence[MovedRow]) -> bool:
        """Create a shard's moves. False if somebody else did."""
        return self._put("moves", name, rows, _MOVED)

    def read_moves(self, name: str) -> list[MovedRow] | None:
        """A shard's moves; None before there are any."""
        return self._read("moves", name, MovedRow)

    def put_problems(self, name: str, rows: Sequence[Problem]) -> None:
        """Record what failed or stayed of a shard, before its moves; of two attempts at it the first one counts."""
        lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        self.store.put_new(f"{self.problems_folder}{name}.jsonl", lines.encode())

    def problems(self) -> Iterator[list[Problem]]:
        """What failed or stayed, shard by shard."""

        def parse(data: bytes) -> list[Problem]:
            return [Problem(**json.loads(line)) for line in data.splitlines()]

        keys = [item.key for item in self.store.list(self.problems_folder) if item.key.endswith(".jsonl")]
        with ThreadPoolExecutor(READERS) as pool:
            for rows in pool.map(lambda key: read_own(self.store, key, parse), keys):
                yield rows or []

    @property
    def problems_folder(self) -> str:
        """Prefix of the files that say what failed or stayed, one line of JSON for each."""
        return f"{self.folder}problems/"

    def begin_undo(self, name: str, number: int) -> None:
        """Record that objects of a shard may be back from now on, although no file says which.

        Args:
            name: of the shard.
            number: 1 for the undo that writes the shard's first file in `undo/`, 2 for the next one.
        """
        self.store.put_new(f"{self.folder}{_UNDOING}{name}.{number}", b"")

    def half_undone(self) -> set[str]:
        """The names of the shards of which an undo has begun, and has not written down what is back."""
        folder = f"{self.folder}{_UNDOING}"
        # Before the undos: one that ends meanwhile is then finished.
        found = [_UNDOING_NAME.fullmatch(item.key.removeprefix(folder)) for item in self.store.list(folder)]
        undos = self.undos() if found else {}
        return {match[1] for match in filter(None, found) if int(match[2]) > len(undos.get(match[1], ()))}

    def put_undo(self, name: str, rows: Sequence[MovedRow]) -> None:
        """Record what an undo made of the objects of a shard that were not back before."""
        if all(row.kind == "moved" for row in rows):
            self._put("undo", name, rows, _MOVED)
            return
        number = 1
        while not self._put("undo", f"{name}.{number}", rows, _MOVED):
            number += 1

    def undos(self) -> dict[str, list[str]]:
        """The files that undos wrote, by shard: a shard may have several."""
        folder, files = f"{self.folder}undo/", dict[str, list[str]]()
        for item in self.store.list(folder):
            if _UNDO_NAME.fullmatch(item.key.removeprefix(folder)):
                file = item.key.removeprefix(folder).removesuffix(".parquet")
                files.setdefault(file.partition(".")[0], []).append(file)
        return files

    def read_undos(self, files: Iterable[str]) -> dict[str, MovedRow]:
        """What became of each object of a shard in all its undos, by the key that it was sorted to.

        That it is back counts, whichever of them says so.

        Args:
            files: of the shard, from `undos`.
        """
        found: dict[str, MovedRow] = {}
        for row in (row for file in files for row in self._read("undo", file, MovedRow) or ()):
            if row.key not in found or found[row.key].kind != "moved":
                found[row.key] = row
        return found

    def add_death(self, name: str, *, alone: bool) -> None:
        """Record that a node died while it worked on a shard.

        Args:
            name: of the shard.
            alone: the node had no other shard in hand. Deaths of nodes that had one count once, however many there are:
                the other shard may have been the reason.
        """
        self.store.put_new(f"{self.folder}{_DEATHS}{name}.{uuid4().hex if alone else 'beside-another'}", b"")

    def deaths(self, name: str) -> int:
        """How many deaths of nodes count against a shard."""
        return sum(1 for _ in self.store.list(f"{self.folder}{_DEATHS}{name}."))

    def _key(self, table: str, name: str) -> str:
        return f"{self.folder}{table}/{name}.parquet"

    def _put(self, table: str, name: str, rows: Sequence[Any], schema: pyarrow.Schema) -> bool:
        return self.store.put_new(self._key(table, name), _encoded(rows, schema))

    def _read(self, table: str, name: str, kind: type[_Row]) -> list[_Row] | None:
        def parse(data: bytes) -> list[_Row]:
            # Arrow's threads are not worth their start for so few rows, and may abort a process that ends.
            file = parquet.ParquetFile(io.BytesIO(data), pre_buffer=False)
            return [kind(**row) for row in file.read(use_threads=False).to_pylist()]

        return read_own(self.store, self._key(table, name), parse)


def is_shard_name(name: str) -> bool:
    """Whether a file may be a shard's by its name: some programs leave empty objects that stand for folders."""
    return _NAME.fullmatch(name) is not None


def _position(name: str) -> tuple[int, str]:
    """The place of a shard among all of them."""
    number, dash, halves = name.partition("-")
    return int(number), dash + halves


def _encoded(rows: Sequence[Any], schema: pyarrow.Schema) -> bytes:
    columns = [pyarrow.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, schema=schema), file, compression="zstd")
    return file.getvalue()
