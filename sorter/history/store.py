"""What went where and why, in `<output>/.sorter/history.sqlite3`: one row a photo, written before it moves.

In: `Move`s, first as intents, then as done. Out: the intents that a crash left unfinished, and later the full story.

An intent is durable before its photo is touched, and a row says done only after the folders are synced, so after any
crash the rows without done are exactly the photos whose place has to be looked at: `recovery.py` does that.
"""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sorter.errors import ConfigurationError, StorageError
from sorter.files import FOLDER, file_systems
from sorter.files.photo import Identity, file_of

NAME = "history.sqlite3"
FAILED, UNSURE = "failed", "unsure"
SIDECAR: Final = "sidecar"
"""Kinds of moves; the first two are folders too."""

_APPLICATION_ID = 0x736F7274  # "sort": tells our file from somebody else's
BUSY_SECONDS = 30.0

# One script for each version of the schema. A script that was released is never changed: add another.
_MIGRATIONS = (
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        started REAL NOT NULL, -- seconds since the epoch
        finished REAL,
        version TEXT NOT NULL,
        model TEXT NOT NULL
    ) STRICT;
    CREATE TABLE moves (
        id INTEGER PRIMARY KEY,
        token TEXT NOT NULL UNIQUE, -- in the hidden names that the move uses
        run TEXT NOT NULL REFERENCES runs (id),
        done REAL, -- seconds since the epoch; NULL is an intent
        root BLOB NOT NULL, -- the inbox; paths are bytes, they need not be UTF-8
        source BLOB NOT NULL, -- inside the inbox
        folder TEXT NOT NULL, -- inside the output
        name BLOB NOT NULL, -- inside the folder
        device INTEGER NOT NULL,
        inode INTEGER NOT NULL,
        size INTEGER NOT NULL, -- bytes
        mtime_ns TEXT NOT NULL, -- a number that may need more than 64 bits
        kind TEXT NOT NULL, -- sorted, unsure, failed
        label TEXT,
        confidence REAL,
        reason TEXT,
        detail TEXT
    ) STRICT;
    CREATE INDEX moves_unfinished ON moves (id) WHERE done IS NULL;
    """,
    """
    -- run, undo
    ALTER TABLE runs ADD COLUMN kind TEXT NOT NULL DEFAULT 'run';
    -- what the folder is inside of, where that is not the output
    ALTER TABLE moves ADD COLUMN target BLOB;
    ALTER TABLE moves ADD COLUMN undoes INTEGER REFERENCES moves (id);
    CREATE INDEX moves_source ON moves (source);
    CREATE INDEX moves_undone ON moves (target, name) WHERE undoes IS NOT NULL;
    CREATE UNIQUE INDEX moves_undone_once ON moves (undoes) WHERE undoes IS NOT NULL;
    """,
    """
    -- the photo that a companion went with
    ALTER TABLE moves ADD COLUMN follows INTEGER REFERENCES moves (id);
    CREATE INDEX moves_following ON moves (follows) WHERE follows IS NOT NULL;
    CREATE INDEX moves_companions ON moves (id) WHERE kind = 'companion';
    CREATE INDEX moves_place ON moves (name, folder);
    DROP INDEX moves_source;
    CREATE INDEX moves_source ON moves (root, source);
    """,
    """
    -- "sidecar" is the field's word for what was called a companion
    UPDATE moves SET kind = 'sidecar' WHERE kind = 'companion';
    DROP INDEX moves_companions;
    CREATE INDEX moves_sidecars ON moves (id) WHERE kind = 'sidecar';
    """,
)
VERSION = len(_MIGRATIONS)

_COLUMNS = (
    "token, run, root, source, folder, name, device, inode, size, mtime_ns, kind, label, confidence, reason, detail, "
    "target, undoes"
)
# The last photo of that name in that folder; asked for sidecars alone.
_FOLLOWS = (
    "CASE WHEN ? IS NOT NULL THEN (SELECT id FROM moves WHERE folder = ? AND name = ? AND kind <> 'sidecar' "
    "AND done IS NOT NULL AND undoes IS NULL ORDER BY id DESC LIMIT 1) END"
)
_INSERT = (
    f"INSERT INTO moves ({_COLUMNS}, follows) "  # noqa: S608
    f"VALUES ({', '.join('?' * len(_COLUMNS.split(',')))}, {_FOLLOWS})"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One process lifetime.

    Attributes:
        kind: `run` sorts; `undo` restores, and has no model.
    """

    id: str
    version: str
    model: str
    kind: str = "run"


@dataclass(frozen=True, slots=True)
class Move:
    """One photo's way, planned or done.

    Attributes:
        token: names the hidden files that the move may leave behind when it is killed.
        root: the inbox.
        source: the path inside it.
        folder: inside the output, `cats`.
        name: inside that folder, `a-1.jpg`.
        identity: of the file that was classified; its ctime is not kept, a move changes that.
        kind: `sorted`, `unsure`, `failed`, `sidecar`, or `undone`.
        confidence: 0 to 1, None if it was not classified; `reason` and `detail` then say why.
        target: None for the output. The inbox for a photo that is brought back: `root` is the output then, `folder` is
            empty, and `name` is a path inside the target.
        undoes: the row of the move that it takes back.
        follows: of a sidecar, the name that its photo has in the same folder.
    """

    token: str
    run: str
    root: Path
    source: str
    folder: str
    name: str
    identity: Identity
    kind: str
    label: str | None = None
    confidence: float | None = None
    reason: str | None = None
    detail: str | None = None
    target: Path | None = None
    undoes: int | None = None
    follows: str | None = None


class History:
    """An open history; one process writes it, and there one thread at a time.

    Args:
        output: the folder that has `cats/` and the others; the history is made where it is missing.

    Raises:
        ConfigurationError: the file is damaged, somebody else's, of a newer sorter, or cannot be opened.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / FOLDER / NAME
        self._file: tuple[int, int] | None = None  # device and inode of what is open
        self._run: Run | None = None
        try:
            self._connect()
        except sqlite3.OperationalError as error:  # no permission, no space, no such folder
            raise ConfigurationError(
                f"the history {self.path} cannot be opened ({error}): check its folder and permissions"
            ) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _connect(self) -> None:
        with contextlib.suppress(OSError):  # then SQLite says why it cannot be opened
            self.path.parent.mkdir(exist_ok=True)
        self._check_files()
        self._connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._on_network = file_systems.is_network(self.path.parent)
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        self._file = file_of(self.path)

    def _check_files(self) -> None:
        """Refuse links, which would have us write somewhere else."""
        for name in (NAME, f"{NAME}-wal", f"{NAME}-shm", f"{NAME}-journal"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.lstat(self.path.with_name(name))
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    raise ConfigurationError(f"{self.path.with_name(name)} is not a file of the sorter: move it away")

    def _prepare(self) -> None:
        # WAL needs memory shared between its users, which machines on a network do not have.
        self._connection.execute(f"PRAGMA journal_mode = {'DELETE' if self._on_network else 'WAL'}")
        self._connection.execute("PRAGMA foreign_keys = ON")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (owner,) = self._connection.execute("PRAGMA application_id").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if owner != _APPLICATION_ID and tables:
            raise ConfigurationError(f"{self.path} is another program's database: move it elsewhere and restart sorter")
        if version > len(_MIGRATIONS):
            raise ConfigurationError(f"the history {self.path} was written by a newer sorter: upgrade this one")
        for number in range(version, len(_MIGRATIONS)):
            with self._transaction():
                for statement in _MIGRATIONS[number].split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {number + 1}")

    @contextlib.contextmanager
    def _transaction(self, *, durably: bool = True) -> Iterator[None]:
        # Only a write-ahead log may lose its end and nothing else; NORMAL spares it the wait for the disk.
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durably or self._on_network else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _writing(self, *, durably: bool = True) -> Iterator[None]:
        """One transaction, in a new file if the old one was removed."""
        try:
            if self._file is None or self._file != file_of(self.path):
                # Its disk was away, or somebody removed the file: the open one would be written for nobody.
                self._connection.close()
                self._connect()
                if self._run is not None:
                    self._insert(self._run)
            with self._transaction(durably=durably):
                yield
        except (sqlite3.DatabaseError, ConfigurationError) as error:
            self._file = None
            raise StorageError(
                f"the history {self.path} cannot be written ({error}): free some space and check its folder"
            ) from error

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def begin(self, run: Run) -> None:
        """Record that a run has started.

        Raises:
            StorageError: the disk refused.
        """
        with self._writing():
            self._insert(run)
        self._run = run

    def _insert(self, run: Run) -> None:
        self._connection.execute(
            "INSERT OR IGNORE INTO runs (id, started, version, model, kind) VALUES (?, ?, ?, ?, ?)",
            (run.id, time.time(), run.version, run.model, run.kind),
        )

    def finish(self, run: Run) -> None:
        """Record that a run has ended without a crash.

        Raises:
            StorageError: the disk refused.
        """
        with self._writing():
            self._connection.execute("UPDATE runs SET finished = ? WHERE id = ?", (time.time(), run.id))

    def intend(self, moves: Sequence[Move]) -> None:
        """Record what is about to happen, durably, in one transaction.

        Raises:
            StorageError: the disk refused; nothing was recorded.
        """
        with self._writing():
            self._connection.executemany(_INSERT, map(_row, moves))

    def settle(self, done: Sequence[Move], withdrawn: Sequence[Move]) -> None:
        """Record what happened, in one transaction; withdrawn moves leave no row.

        It is durable with the next intents; after a power cut before them, recovery looks at the photos again.

        Raises:
            StorageError: the disk refused; the moves are still intents.
        """
        now = time.time()
        with self._writing(durably=False):
            # Somebody may have removed the history since the intents were written.
            self._connection.executemany(f"{_INSERT} ON CONFLICT (token) DO NOTHING", map(_row, done))
            self._connection.executemany("UPDATE moves SET done = ? WHERE token = ?", [(now, m.token) for m in done])
            self._connection.executemany(
                "DELETE FROM moves WHERE token = ? AND done IS NULL", [(m.token,) for m in withdrawn]
            )

    def unfinished(self) -> list[Move]:
        """The intents that were never marked done, oldest first.

        Raises:
            ConfigurationError: the file is damaged.
        """
        query = f"SELECT {_COLUMNS} FROM moves WHERE done IS NULL ORDER BY id"  # noqa: S608
        try:
            return [_move(row) for row in self._connection.execute(query)]
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: sqlite3.DatabaseError) -> ConfigurationError:
        return ConfigurationError(
            f"the history {self.path} is damaged ({error}): move it elsewhere and restart sorter; that does not "
            "affect the photos"
        )


def _row(move: Move) -> tuple[object, ...]:
    device, inode, size, mtime_ns, _ = move.identity
    follows = None if move.follows is None else os.fsencode(move.follows)
    return (
        move.token,
        move.run,
        os.fsencode(move.root),
        os.fsencode(move.source),
        move.folder,
        os.fsencode(move.name),
        _signed(device),
        _signed(inode),
        size,
        str(mtime_ns),
        move.kind,
        move.label,
        move.confidence,
        move.reason,
        move.detail,
        None if move.target is None else os.fsencode(move.target),
        move.undoes,
        follows,
        move.folder,
        follows,
    )


def _move(row: Sequence[Any]) -> Move:
    token, run, root, source, folder, name, device, inode, size, mtime_ns, *why = row
    kind, label, confidence, reason, detail, target, undoes = why
    identity = Identity(_unsigned(device), _unsigned(inode), size, int(mtime_ns), 0)
    return Move(
        token,
        run,
        Path(os.fsdecode(root)),
        os.fsdecode(source),
        folder,
        os.fsdecode(name),
        identity,
        kind,
        label,
        confidence,
        reason,
        detail,
        target=None if target is None else Path(os.fsdecode(target)),
        undoes=undoes,
    )


# SQLite's integers have a sign; some file systems number their files with all 64 bits.
def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number + (1 << 64) if number < 0 else number
