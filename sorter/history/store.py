"""Writes the history, `<output>/.sorter/history.sqlite3`: one row per photo, written before the photo moves.

In: `Move`s, first as intents, then as done. Out: the intents that a crash left unfinished.

An intent is durable before its photo is touched, and a row is marked done only after the folders are synced. So after a
crash exactly the photos whose rows are not done may have either name, and `recovery.py` looks at those.
"""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import sorter
from sorter.errors import ConfigurationError, SorterError, StorageError
from sorter.files import HISTORY, file_systems
from sorter.files.photo import Identity, file_of
from sorter.files.state import state_folder
from sorter.history import schema

SIDECAR: Final = "sidecar"
"""The kind of a move that follows a photo's."""

BUSY_SECONDS = 30.0

_COLUMNS = (
    "token, run, root, source, folder, name, device, inode, size, mtime_ns, kind, label, confidence, reason, detail, "
    "target, undoes, linked, corrects"
)
# The row of a sidecar's photo: the last one that took that name in that folder. NULL for anything but a sidecar.
_FOLLOWS = (
    "CASE WHEN :follows IS NOT NULL THEN (SELECT id FROM moves WHERE now_folder = :folder AND now_name = :follows "
    "AND kind <> 'sidecar' AND done IS NOT NULL AND target IS NULL ORDER BY placed_by DESC LIMIT 1) END"
)
_INSERT = (
    f"INSERT INTO moves ({_COLUMNS}, follows) "  # noqa: S608
    f"VALUES ({', '.join(f':{column}' for column in _COLUMNS.split(', '))}, {_FOLLOWS})"
)
# The sorting move knows where its photo is now.
_CORRECT = (
    "UPDATE moves SET (corrected_by, corrected_folder, corrected_name) = (c.id, c.folder, c.name) "
    "FROM (SELECT id, folder, name, corrects FROM moves WHERE token = ?) c WHERE moves.id = c.corrects"
)
_INSERT_VERDICT = (
    "INSERT INTO verdicts (at, move, label, how, digest, label_was, confidence, model, correction) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, (SELECT id FROM moves WHERE token = ?))"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One process with one model: from its start, or from a change of its model, to the next change or its end.

    Attributes:
        id: unique; moves name it.
        version: of the sorter.
        model: its name; empty for an undo and a review.
        kind: `run`, `undo` or `review`.
    """

    id: str
    version: str
    model: str
    kind: str = "run"

    @classmethod
    def new(cls, model: str = "", kind: str = "run") -> Self:
        """One with an ID that no other has, of this version of the sorter."""
        return cls(uuid4().hex[:12], sorter.__version__, model, kind)


@dataclass(frozen=True, slots=True)
class Move:
    """One file's move, planned or done.

    Attributes:
        token: unique; part of the hidden names that the move leaves behind if it is killed.
        run: the `id` of the run.
        root: the inbox.
        source: the path inside the inbox.
        folder: inside the output, such as `cats`.
        name: the path inside that folder, such as `a-1.jpg` or `2019/a.jpg`.
        identity: of the file that was classified; its ctime is not recorded, because a move changes it.
        kind: `sorted`, `unsure`, `failed`, `sidecar`, `undone`, `corrected` or `reverted`; `moved` by hand.
        label: the likeliest class; for a correction the one that a person sees.
        confidence: 0 to 1; None if it was not classified.
        reason: why it failed.
        detail: more about that, or why it is unsure.
        target: None for a move into the output by a sorter. For an undo the inbox: `root` is then the output, `folder`
            is empty, and `name` is a path inside `target`. For a correction the output, and so is `root`.
        undoes: the id of the row that an undo reverses.
        follows: the path that a sidecar's photo has in the same folder.
        linked: the photo stays at `source`, and gets a link or a copy in the folder; for an undo, that is removed.
        corrects: for a correction, the id of the row of the sorting move.
        takes_back: the id of the verdict that is deleted once this is done.
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
    linked: bool = False
    corrects: int | None = None
    takes_back: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a person said of a photo.

    Attributes:
        move: the id of the row of the photo's sorting move.
        label: the class that the person sees; None for none of them.
        how: `corrected`, `confirmed` or `checked` on the review page; `moved` by hand.
        digest: SHA-256 of the photo's bytes, by which it is known wherever it goes.
        label_was: the class that the model took it for, with its confidence and the name of the model.
        token: of the move that carries it out; None if the photo is in the right folder already.
    """

    move: int
    label: str | None
    how: str
    digest: bytes
    label_was: str | None
    confidence: float | None
    model: str
    token: str | None = None


class History:
    """A history that is open for writing, by one thread at a time.

    Args:
        output: the folder that has `cats/` and the others; a missing history is created, an older one upgraded.
        state_dir: where the history is, if not in the output.

    Raises:
        ConfigurationError: the file is damaged, another program's, a newer sorter's, or cannot be opened.
        StorageError: the disk is full or fails.
    """

    def __init__(self, output: Path, state_dir: Path | None = None) -> None:
        self.path = state_folder(output, state_dir) / HISTORY
        self._file: tuple[int, int] | None = None  # device and inode of the open file
        self._runs: list[Run] = []  # begun here, the present one last
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _connect(self) -> None:
        with contextlib.suppress(OSError):  # then SQLite says why it cannot be opened
            self.path.parent.mkdir(exist_ok=True)
        self._check_files()
        self._connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        self._file = file_of(self.path)

    def _check_files(self) -> None:
        """Refuse links, through which SQLite would write to another place."""
        for name in (HISTORY, f"{HISTORY}-wal", f"{HISTORY}-shm", f"{HISTORY}-journal"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.lstat(self.path.with_name(name))
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    raise ConfigurationError(f"{self.path.with_name(name)} is not a file of the sorter: move it away")

    def _prepare(self) -> None:
        schema.version_of(self._connection, self.path)  # refuses a file that is not ours before it is changed
        # WAL needs memory that all users of the file share, and two machines share none.
        wanted = "DELETE" if file_systems.is_network(self.path.parent) else "WAL"
        (mode,) = self._connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        self._writes_ahead = mode == "wal"  # SQLite answers with another mode if it cannot
        self._connection.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            schema.upgrade(self._connection, self.path)

    @contextlib.contextmanager
    def _transaction(self, *, durably: bool = True) -> Iterator[None]:
        # NORMAL does not wait for the disk. At a power cut, a write-ahead log then loses its last transactions and
        # nothing else, but a rollback journal may leave a damaged file.
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durably or not self._writes_ahead else 'NORMAL'}")
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
        """One transaction, in a new file if the old one was removed; any failure becomes a StorageError."""
        try:
            if self._file is None or self._file != file_of(self.path):
                # Its disk was away, or somebody removed the file: nobody would find what is written to the open one.
                self._connection.close()
                self._connect()
                for run in self._runs:
                    self._insert(run)
            with self._transaction(durably=durably):
                yield
        except (sqlite3.DatabaseError, ConfigurationError) as error:
            self._file = None
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def begin(self, run: Run) -> None:
        """Record that a run has started, which ends the one before; does nothing for a run that has begun already.

        Raises:
            StorageError: the history cannot be written.
        """
        if run in self._runs:
            return
        with self._writing():
            self._insert(run)
            self._end_present_run()
        self._runs.append(run)

    def _insert(self, run: Run) -> None:
        self._connection.execute(
            "INSERT OR IGNORE INTO runs (id, started, version, model, kind) VALUES (?, ?, ?, ?, ?)",
            (run.id, time.time(), run.version, run.model, run.kind),
        )

    def finish(self) -> None:
        """Record that the present run has ended, and was not killed.

        Raises:
            StorageError: the history cannot be written.
        """
        with self._writing():
            self._end_present_run()

    def _end_present_run(self) -> None:
        present = [(time.time(), run.id) for run in self._runs[-1:]]
        self._connection.executemany("UPDATE runs SET finished = ? WHERE id = ?", present)

    def intend(self, moves: Sequence[Move], judgements: Sequence[Judgement] = ()) -> None:
        """Record what is about to happen, and the verdicts that ask for it, durably, in one transaction.

        Raises:
            StorageError: the history cannot be written; nothing was recorded.
        """
        with self._writing():
            self._insert_moves(moves, judgements)

    def record(self, moves: Sequence[Move], judgements: Sequence[Judgement]) -> None:
        """Record moves that somebody else has made, and what they say of the photos, durably, in one transaction.

        Raises:
            StorageError: the history cannot be written; nothing was recorded.
        """
        with self._writing():
            self._insert_moves(moves, judgements)
            self._mark_done(moves)

    def _insert_moves(self, moves: Sequence[Move], judgements: Sequence[Judgement]) -> None:
        self._connection.executemany(_INSERT, map(_row, moves))
        self._connection.executemany(_INSERT_VERDICT, [(time.time(), *astuple(j)) for j in judgements])
        self._connection.executemany(
            "UPDATE verdicts SET reversal = (SELECT id FROM moves WHERE token = ?) WHERE id = ?",
            [(move.token, move.takes_back) for move in moves if move.takes_back is not None],
        )

    def _mark_done(self, moves: Sequence[Move]) -> None:
        now = time.time()
        self._connection.executemany("UPDATE moves SET done = ? WHERE token = ?", [(now, m.token) for m in moves])
        corrections = [(m.token,) for m in moves if m.corrects is not None]
        self._connection.executemany(_CORRECT, corrections)
        self._connection.executemany(
            "DELETE FROM verdicts WHERE reversal = (SELECT id FROM moves WHERE token = ?)", corrections
        )

    def delete_verdict(self, verdict: int) -> None:
        """Delete a verdict that moved nothing, durably.

        Raises:
            StorageError: the history cannot be written.
        """
        with self._writing():
            self._connection.execute("DELETE FROM verdicts WHERE id = ?", (verdict,))

    def settle(self, done: Sequence[Move], withdrawn: Sequence[Move]) -> None:
        """Record in one transaction which moves were done; those that were withdrawn leave no row, nor their verdicts.

        This becomes durable with the next intents. After a power cut before them, recovery looks at the photos again.

        Raises:
            StorageError: the history cannot be written; the moves are still intents.
        """
        with self._writing(durably=False):
            # The intents are missing if somebody has removed the history since.
            self._connection.executemany(f"{_INSERT} ON CONFLICT (token) DO NOTHING", map(_row, done))
            self._mark_done(done)
            self._connection.executemany(
                "DELETE FROM moves WHERE token = ? AND done IS NULL", [(m.token,) for m in withdrawn]
            )

    def unfinished(self) -> list[Move]:
        """The intents that were never marked done, oldest first.

        Raises:
            ConfigurationError: the file is damaged.
            StorageError: the disk is full or fails.
        """
        query = f"SELECT {_COLUMNS} FROM moves WHERE done IS NULL ORDER BY id"  # noqa: S608
        try:
            return [_move(row) for row in self._connection.execute(query)]
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _unwritable(self, error: Exception) -> StorageError:
        return StorageError(
            f"the history {self.path} cannot be written ({error}): free some space and check its folder, or, if its "
            "file system cannot hold a database, keep it on a local disk with --state-dir"
        )

    def _unusable(self, error: sqlite3.DatabaseError) -> SorterError:
        """The error to raise for a history that cannot be opened or read."""
        if is_disk_error(error):
            return self._unwritable(error)
        if isinstance(error, sqlite3.OperationalError):  # no permission, no such folder
            return ConfigurationError(
                f"the history {self.path} cannot be opened ({error}): check its folder and permissions"
            )
        return ConfigurationError(
            f"the history {self.path} is damaged ({error}): move it elsewhere and restart sorter, which does not "
            "affect the photos; if its file system cannot hold a database, use --state-dir"
        )


def is_disk_error(error: sqlite3.DatabaseError) -> bool:
    """Whether the disk is to blame, which is full or fails, and not the file."""
    # The low byte of SQLite's extended codes is the plain one. On a full disk the shared memory of a write-ahead log
    # cannot be created either, which is an IOERR.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _row(move: Move) -> dict[str, object]:
    return {
        "token": move.token,
        "run": move.run,
        "root": os.fsencode(move.root),
        "source": os.fsencode(move.source),
        "folder": move.folder,
        "name": os.fsencode(move.name),
        "device": _signed(move.identity.device),
        "inode": _signed(move.identity.inode),
        "size": move.identity.size,
        "mtime_ns": str(move.identity.mtime_ns),
        "kind": move.kind,
        "label": move.label,
        "confidence": move.confidence,
        "reason": move.reason,
        "detail": move.detail,
        "target": None if move.target is None else os.fsencode(move.target),
        "undoes": move.undoes,
        "linked": int(move.linked),
        "corrects": move.corrects,
        "follows": None if move.follows is None else os.fsencode(move.follows),
    }


def _move(row: Sequence[Any]) -> Move:
    value = dict(zip(_COLUMNS.split(", "), row, strict=True))
    identity = Identity(
        _unsigned(value["device"]), _unsigned(value["inode"]), value["size"], int(value["mtime_ns"]), ctime_ns=0
    )
    return Move(
        token=value["token"],
        run=value["run"],
        root=Path(os.fsdecode(value["root"])),
        source=os.fsdecode(value["source"]),
        folder=value["folder"],
        name=os.fsdecode(value["name"]),
        identity=identity,
        kind=value["kind"],
        label=value["label"],
        confidence=value["confidence"],
        reason=value["reason"],
        detail=value["detail"],
        target=None if value["target"] is None else Path(os.fsdecode(value["target"])),
        undoes=value["undoes"],
        linked=bool(value["linked"]),
        corrects=value["corrects"],
    )


# SQLite's integers are signed; some file systems use all 64 bits for inode numbers.
def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number + (1 << 64) if number < 0 else number
