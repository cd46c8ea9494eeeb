"""A job's files: what was listed, decided and moved, as immutable Parquet objects of about 1,000 rows.

In and out: rows. Each file is created once (PUT If-None-Match): whoever comes second reads what the first one wrote,
and goes by that. So all attempts at a shard, also those of nodes that were thought dead, agree on what is to happen.

    shards/00000.parquet      what was listed          `StoredObject`
    attempts/00000.1.parquet  somebody began           `Attempt`
    decisions/00000.parquet   what belongs where       `Decided`
    moves/00000.parquet       what became of each      `MovedRow`; the shard is finished
    undo/00000.parquet        what became of each      `MovedRow`, on the way back
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sorter.cluster.stores import Store, StoredObject

Table = Literal["decisions", "moves", "undo"]


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
class Attempt:
    """Who began with a shard, and when."""

    node: str
    started: datetime


class JobFiles:
    """The files of one job. Shards are named `00000`, `00001`; the halves of one that was split `00000-0`, `00000-1`.

    Args:
        store: the bucket of the output.
        folder: `<output prefix>.sorter/cluster/<job>/`.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder

    def shards(self) -> Iterator[str]:
        """The names of all shards, in order."""
        raise NotImplementedError

    def read_shard(self, name: str) -> list[StoredObject]:
        """What was listed, in the order of keys."""
        raise NotImplementedError

    def put_shard(self, name: str, rows: Sequence[StoredObject]) -> bool:
        """Create a shard. False if there is one with that name."""
        raise NotImplementedError

    def finished(self, table: Table = "moves") -> set[str]:
        """The names of the shards that have this file."""
        raise NotImplementedError

    def split(self, name: str) -> list[str]:
        """Give a shard up that kills whoever works on it, in favour of two halves. Call it again after any failure.

        A photo and its sidecars stay together. The shard's own decisions are then an empty list, and count: who still
        works on it learns from `put_decisions` that it is to do nothing.

        Returns:
            The names of the halves; empty if the shard cannot be split: it was decided after all, or is one photo.
        """
        raise NotImplementedError

    def put_decisions(self, name: str, rows: Sequence[Decided]) -> list[Decided]:
        """Create a shard's decisions, unless it has some. Returns those that count."""
        raise NotImplementedError

    def read_decisions(self, name: str) -> list[Decided] | None:
        """A shard's decisions; None before there are any."""
        raise NotImplementedError

    def put_moves(self, name: str, rows: Sequence[MovedRow], table: Literal["moves", "undo"] = "moves") -> bool:
        """Create a shard's moves. False if somebody else did."""
        raise NotImplementedError

    def read_moves(self, name: str, table: Literal["moves", "undo"] = "moves") -> list[MovedRow] | None:
        """A shard's moves; None before there are any."""
        raise NotImplementedError

    def begin_attempt(self, name: str, attempt: Attempt) -> int:
        """Record an attempt at a shard before it begins. Returns its number, from 1 on."""
        raise NotImplementedError
