"""What the history says, read only: photos and where they went, runs, and what may be taken back.

In: the history file of an output. Out: `Entry`s. A sorter may write it meanwhile.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorter.errors import ConfigurationError
from sorter.files import FOLDER
from sorter.files.photo import Photo, file_of
from sorter.history import store as history
from sorter.history.store import FAILED, NAME, SIDECAR, UNSURE, History

_ENTRY = """
    SELECT m.id, m.run, m.done, m.root, m.source, m.target, m.folder, m.name, m.size, m.mtime_ns, m.kind, m.label,
        m.confidence, m.reason, m.detail, m.follows, r.model,
        EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id AND u.done IS NOT NULL)
    FROM moves m JOIN runs r ON r.id = m.run
    WHERE m.done IS NOT NULL
"""

_UNDOABLE = " AND m.undoes IS NULL AND NOT EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id)"
_SOME, _ALL = 1000, (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One photo that was moved.

    Attributes:
        id: of its row; later ones are larger.
        done: when, in seconds since the epoch.
        source: where it was, a whole path.
        destination: where it went.
        root, name: of the source, the folder that was sorted and the path inside it.
        size: bytes.
        mtime_ns: of the file, nanoseconds since the epoch.
        kind: `sorted`, `unsure`, `failed`, `sidecar`, `undone`.
        follows: of a sidecar, its photo's `id`.
        undone: whether it was brought back since.
    """

    id: int
    run: str
    done: float
    source: str
    destination: str
    root: str
    name: str
    size: int
    mtime_ns: int
    kind: str
    label: str | None
    confidence: float | None
    reason: str | None
    detail: str | None
    follows: int | None
    model: str
    undone: bool


@dataclass(frozen=True, slots=True)
class Counts:
    """How many photos there are of each kind that were not brought back.

    Attributes:
        folders: by the folder they went to.
        undone: that were brought back.
    """

    folders: dict[str, int]
    undone: int

    @property
    def share_sorted(self) -> float | None:
        """Of the photos that were classified, those that did not go to `unsure`; None if there are none."""
        classified = sum(self.folders.values()) - self.folders.get(FAILED, 0)
        return (classified - self.folders.get(UNSURE, 0)) / classified if classified else None


class HistoryReader:
    """An open history; reads only.

    Args:
        output: the folder that has `cats/` and the others.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """

    def __init__(self, output: Path) -> None:
        self._output = Path(os.path.realpath(output))
        self.path = self._output / FOLDER / NAME
        self._real_roots: dict[tuple[int, int] | None, bytes] = {}  # by device and inode
        try:
            if not self.path.is_file():
                raise ConfigurationError(
                    f"{output} has no history: nothing was sorted into it yet, or name its --output"
                )
            self._open()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"the history {self.path} cannot be read ({error})") from None
        except OSError as error:
            raise ConfigurationError(
                f"the history {self.path} cannot be read ({error.strerror}): give this user permission to"
            ) from None

    def _open(self) -> None:
        self._connection = _opened(self.path)
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != history.VERSION:
            self._connection.close()
            History(self._output).close()  # migrates an older one, and refuses a newer one
            self._connection = _opened(self.path)
        self._file = file_of(self.path)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._connection.close()

    def entries(self, *, run: str | None = None, since: float | None = None, limit: int = -1) -> list[Entry]:
        """Photos in the order in which they were moved.

        Args:
            run: of this run only.
            since: moved at this time or later, seconds since the epoch.
            limit: the last so many; all where it is negative.
        """
        conditions, values = _moved("m", run, since)
        found = self._all(f"{_ENTRY}{conditions} ORDER BY m.id DESC LIMIT ?", (*values, limit))
        return [self._entry(row) for row in reversed(found)]

    def undoable(
        self, *, run: str | None = None, since: float | None = None, path: str | None = None
    ) -> Iterator[Entry]:
        """Photos that were sorted and not brought back, the last one first, and then what followed them.

        They are read some at a time, so that neither memory nor the file is held while they are brought back.

        Args:
            run: of this run only.
            since: moved at this time or later, seconds since the epoch.
            path: of where a photo is or was, or of a folder that it is or was in.
        """
        chosen, values = self._wanted("m", run, since, path)
        photo_chosen, _ = self._wanted("p", run, since, path)
        # A sidecar is restored with its photo, whichever run moved it.
        its_photo = f"SELECT 1 FROM moves p WHERE p.id = m.follows{photo_chosen}"  # noqa: S608
        for kind, values_ in (
            (f" AND m.kind <> '{SIDECAR}'{chosen}", values),
            (f" AND m.kind = '{SIDECAR}' AND ((TRUE{chosen}) OR EXISTS ({its_photo}))", values + values),
        ):
            query = f"{_ENTRY}{kind}{_UNDOABLE} AND m.id < ?"
            last = _ALL
            while rows := self._all(f"{query} ORDER BY m.id DESC LIMIT ?", (*values_, last, _SOME)):
                last = rows[-1][0]
                yield from map(self._entry, rows)

    def _wanted(self, alias: str, run: str | None, since: float | None, path: str | None) -> tuple[str, list[object]]:
        """The condition of `undoable` for a row of `moves` under an alias, and its values."""
        chosen, values = _moved(alias, run, since)
        if path is None:
            return chosen, values
        at, where = self._at(alias, path)
        return chosen + at, [*values, *where]

    def _at(self, alias: str, path: str) -> tuple[str, list[bytes]]:
        """A condition for what is or was at a path, or below it."""
        named = os.path.abspath(path)
        folder, base = os.path.split(named)
        # A photo may be a link by now, which was none when it was sorted. Older histories have names as they came.
        real = os.path.realpath(path) if os.path.isdir(path) else os.path.join(os.path.realpath(folder), base)
        found: list[str] = []
        values: list[bytes] = []
        for whole in map(Path, dict.fromkeys((real, named))):
            name = os.fsencode(whole)
            found += [f"{alias}.root = ?", f"({alias}.root > ? AND {alias}.root < ?)"]  # "0" follows "/" in ASCII
            values += [name, name + b"/", name + b"0"]
            for root in whole.parents:
                source = os.fsencode(whole.relative_to(root))
                found.append(f"({alias}.root = ? AND {alias}.source = ?)")
                found.append(f"({alias}.root = ? AND {alias}.source > ? AND {alias}.source < ?)")
                values += [os.fsencode(root), source, os.fsencode(root), source + b"/", source + b"0"]
        if Path(real).is_relative_to(self._output):
            parts = [os.fsencode(part) for part in Path(real).relative_to(self._output).parts]
            if len(parts) < 3:  # the output, a folder in it, a name in that
                equal = (f"CAST({alias}.folder AS BLOB) = ?", f"{alias}.name = ?")[: len(parts)]
                found.append(" AND ".join(["TRUE", *equal]))
                values += parts
        return f" AND ({' OR '.join(found)})", values

    def last_sorted(self, root: Path, names: Sequence[str], since: float) -> Entry | None:
        """The last photo with one of these names that was sorted since then and is where it was sorted to.

        None also if the history cannot be read at present.

        Args:
            root: the inbox.
            names: inside it.
            since: seconds since the epoch.
        """
        marks = ", ".join("?" * len(names))
        query = f"{_ENTRY} AND m.source IN ({marks}) AND m.root = ? AND m.kind <> '{SIDECAR}' AND m.done >= ?"
        try:
            values = (*map(os.fsencode, names), self._real(root), since)
            rows = self._all(f"{query} ORDER BY m.id DESC LIMIT 1", values)
        except ConfigurationError:
            return None
        entry = next(map(self._entry, rows), None)
        return None if entry is None or entry.undone or not os.path.lexists(entry.destination) else entry

    def last_run(self) -> str | None:
        """The last run of which a photo can be brought back."""
        query = f"SELECT m.run FROM moves m WHERE m.done IS NOT NULL AND m.kind <> '{SIDECAR}'{_UNDOABLE}"  # noqa: S608
        found = self._all(f"{query} ORDER BY m.id DESC LIMIT 1", ())
        return str(found[0][0]) if found else None

    def folders(self) -> set[str]:
        """The folders of the output that photos were ever sorted into."""
        return {folder for (folder,) in self._all("SELECT DISTINCT folder FROM moves WHERE undoes IS NULL", ())}

    def last_failure(self) -> Entry | None:
        """The last photo that could not be read and was not brought back."""
        found = self._all(f"{_ENTRY} AND m.kind = 'failed'{_UNDOABLE} ORDER BY m.id DESC LIMIT 1", ())
        return self._entry(found[0]) if found else None

    def counts(self, since: float = 0.0) -> Counts:
        """How many photos went where."""
        rows = self._all(
            "SELECT folder, EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id AND u.done IS NOT NULL) AS undone, "
            "count(*) FROM moves m WHERE done IS NOT NULL AND undoes IS NULL AND done >= ? "
            "AND kind <> ? GROUP BY folder, undone",
            (since, SIDECAR),
        )
        folders = {folder: count for folder, undone, count in rows if not undone}
        return Counts(folders, sum(count for _, undone, count in rows if undone))

    def was_put_back(self, photo: Photo) -> bool:
        """Tell whether a photo in the inbox is one that was brought back, and has not changed since.

        Where the history cannot be read at present it is not: sorting it again loses nothing.
        """
        query = "SELECT size, mtime_ns FROM moves WHERE undoes IS NOT NULL AND target = ? AND name = ?"
        try:
            rows = self._all(f"{query} ORDER BY id DESC LIMIT 1", (self._real(photo.root), os.fsencode(photo.name)))
        except ConfigurationError:
            return False
        return [(photo.identity.size, str(photo.identity.mtime_ns))] == rows

    def _real(self, root: Path) -> bytes:
        """An inbox as the history calls it, whichever way it was named now; asked for each photo, and so kept."""
        folder = file_of(root)
        if folder not in self._real_roots:
            self._real_roots = {folder: os.fsencode(os.path.realpath(root))}
        return self._real_roots[folder]

    def _all(self, query: str, values: Sequence[object]) -> list[Any]:
        try:
            if self._file != file_of(self.path):  # removed, perhaps recreated, or its disk is back
                self._connection.close()
                self._file = None
                self._open()
            return self._connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"the history {self.path} cannot be read ({error})") from None
        except OSError as error:
            raise ConfigurationError(f"the history {self.path} cannot be read ({error.strerror})") from None

    def _entry(self, row: Sequence[Any]) -> Entry:
        id_, run, done, root, source, target, folder, name, size, mtime_ns, *why = row
        kind, label, confidence, reason, detail, follows, model, undone = why
        root, source, name = (os.fsdecode(part) for part in (root, source, name))
        there = str(self._output) if target is None else os.fsdecode(target)
        return Entry(
            id_,
            run,
            done,
            os.path.join(root, source),
            os.path.join(there, folder, name),
            root,
            source,
            size,
            int(mtime_ns),
            kind,
            label,
            confidence,
            reason,
            detail,
            follows,
            model,
            bool(undone),
        )


def _moved(alias: str, run: str | None, since: float | None) -> tuple[str, list[object]]:
    """A condition for rows of `moves` by when they were moved, and its values."""
    wanted = [(f"{alias}.run = ?", run), (f"{alias}.done >= ?", since)]
    given = [(condition, value) for condition, value in wanted if value is not None]
    return "".join(f" AND {condition}" for condition, _ in given), [value for _, value in given]


def _opened(path: Path) -> sqlite3.Connection:
    with path.open("rb") as file:
        has_log = file.read(20)[18:20] == b"\2\2"  # sqlite.org/fileformat.html: how it is read and written
    # Without its log beside it nobody writes the file, and to read it nothing has to be made beside it.
    at_rest = "&immutable=1" if has_log and not path.with_name(f"{NAME}-wal").exists() else ""
    return sqlite3.connect(
        f"{path.as_uri()}?mode=ro{at_rest}", uri=True, timeout=history.BUSY_SECONDS, check_same_thread=False
    )
