"""Reads the history: which photos went where, in which run, and which of them can be restored.

In: the history file of an output. Out: `Entry`s. A sorter may be writing to the file meanwhile.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorter.errors import ConfigurationError
from sorter.files import FAILED, HISTORY, UNSURE
from sorter.files.photo import COARSE_NS, Photo, file_of
from sorter.files.state import state_folder
from sorter.history.database import ReadOnlyDatabase
from sorter.history.store import SIDECAR

_ENTRY = """
    SELECT m.id, m.run, m.done, m.root, m.source, m.target, m.now_folder, m.now_name, m.size, m.mtime_ns, m.kind,
        m.label, m.confidence, m.reason, m.detail, m.follows, m.linked, r.model,
        EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id AND u.done IS NOT NULL),
        (m.now_folder, m.now_name) <> (m.folder, m.name)
    FROM moves m JOIN runs r ON r.id = m.run
    WHERE m.done IS NOT NULL
"""

# Only a sorter's moves have no target: those of an undo and corrections have one.
UNDOABLE = " AND m.target IS NULL AND NOT EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id)"
PRESENT = f"{UNDOABLE} AND m.kind <> '{SIDECAR}'"
_PAGE_ROWS = 1000
_LARGEST_ID = (1 << 63) - 1
# Of photos in `unsure/` and `failed/`: it was sorted again since, out of that folder.
SORTED_AGAIN = """
    EXISTS (SELECT 1 FROM moves n WHERE n.root = CASE m.now_folder WHEN 'unsure' THEN ? WHEN 'failed' THEN ? END
        AND n.source = m.now_name AND n.id > m.placed_by AND n.done IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM moves u WHERE u.undoes = n.id AND u.done IS NOT NULL))
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One photo that was moved.

    Attributes:
        id: of its row; later moves have larger ones.
        done: when it was recorded as moved, in seconds since the epoch.
        source: the absolute path where it was.
        destination: the absolute path where it is now, with its corrections; where it was last, if it was restored.
        root, name: the two parts of `source`: the folder that was sorted, and the path inside it.
        place: the end of `destination`: the path inside the output, or inside the folder that an undo went back to.
        size: in bytes.
        mtime_ns: of the file, in nanoseconds since the epoch.
        kind: `sorted`, `unsure`, `failed`, `sidecar`, `undone`, `corrected`, `reverted` or `moved` (by hand).
        follows: the `id` of its photo, for a sidecar.
        linked: whether the file stayed at `source`, with a link or a copy at `destination`.
        undone: whether it was restored since.
        corrected: whether a person has put it into another place than it was sorted to.
    """

    id: int
    run: str
    done: float
    source: str
    destination: str
    root: str
    name: str
    place: str
    size: int
    mtime_ns: int
    kind: str
    label: str | None
    confidence: float | None
    reason: str | None
    detail: str | None
    follows: int | None
    linked: bool
    model: str
    undone: bool
    corrected: bool

    def has_version(self, status: os.stat_result) -> bool:
        """Whether a file still has the size and time that it was sorted with."""
        return status.st_size == self.size and abs(status.st_mtime_ns - self.mtime_ns) <= COARSE_NS


@dataclass(frozen=True, slots=True)
class Counts:
    """How many photos were moved.

    Attributes:
        folders: those that were not restored, by the folder they went to.
        undone: those that were restored.
    """

    folders: dict[str, int]
    undone: int

    @property
    def share_sorted(self) -> float | None:
        """The share of the classified photos that did not go to `unsure`; None if none were classified."""
        classified = sum(self.folders.values()) - self.folders.get(FAILED, 0)
        return (classified - self.folders.get(UNSURE, 0)) / classified if classified else None


class HistoryReader:
    """An open history; changes nothing on the disk, so that anyone who may read the file can use it.

    Args:
        output: the folder that has `cats/` and the others.
        state_dir: where the history is, if not in the output.
        beside_writer: this process also has the history open as a `History`.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """

    def __init__(self, output: Path, state_dir: Path | None = None, *, beside_writer: bool = False) -> None:
        self._output = Path(os.path.realpath(output))
        self._real_roots: dict[tuple[int, int] | None, bytes] = {}  # by device and inode
        self._database = ReadOnlyDatabase(state_folder(self._output, state_dir) / HISTORY, beside_writer=beside_writer)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._database.close()

    def entries(self, *, run: str | None = None, since: float | None = None, limit: int = -1) -> list[Entry]:
        """The photos that were moved, in that order.

        Args:
            run: only those of this run.
            since: only those moved at this time or later, in seconds since the epoch.
            limit: only the last so many; all if it is negative.
        """
        conditions, values = _moved("m", run, since)
        found = self._database.rows(f"{_ENTRY}{conditions} ORDER BY m.id DESC LIMIT ?", (*values, limit))
        return [self._entry(row) for row in reversed(found)]

    def undoable(
        self, *, run: str | None = None, since: float | None = None, path: str | None = None
    ) -> Iterator[Entry]:
        """The photos that can be restored, the last one first, and then their sidecars.

        They are read a page at a time: memory stays constant, and no lock is held while they are restored.

        Args:
            run: only those of this run.
            since: only those moved at this time or later, in seconds since the epoch.
            path: only what is or was at this path, or below it.
        """
        chosen, values = self._wanted("m", run, since, path)
        photo_chosen, _ = self._wanted("p", run, since, path)
        # A sidecar is restored with its photo, whichever run moved it.
        its_photo = f"SELECT 1 FROM moves p WHERE p.id = m.follows{photo_chosen}"  # noqa: S608
        for kind, values_ in (
            (f" AND m.kind <> '{SIDECAR}'{chosen}", values),
            (f" AND m.kind = '{SIDECAR}' AND ((TRUE{chosen}) OR EXISTS ({its_photo}))", values + values),
        ):
            query = f"{_ENTRY}{kind}{UNDOABLE} AND m.id < ?"
            last = _LARGEST_ID
            while rows := self._database.rows(f"{query} ORDER BY m.id DESC LIMIT ?", (*values_, last, _PAGE_ROWS)):
                last = rows[-1][0]
                yield from map(self._entry, rows)

    def _wanted(self, alias: str, run: str | None, since: float | None, path: str | None) -> tuple[str, list[object]]:
        """The condition of `undoable` for rows of `moves` under an alias, and its values."""
        chosen, values = _moved(alias, run, since)
        if path is None:
            return chosen, values
        at, where = self._at(alias, path)
        return chosen + at, [*values, *where]

    def _at(self, alias: str, path: str) -> tuple[str, list[bytes]]:
        """The condition for what is or was at a path or below it, and its values."""
        named = os.path.abspath(path)
        folder, base = os.path.split(named)
        # What has the photo's name by now may be a link, so only its folder is resolved. Older histories have folders
        # as they were named, through links too.
        real = os.path.realpath(path) if os.path.isdir(path) else os.path.join(os.path.realpath(folder), base)
        found: list[str] = []
        values: list[bytes] = []
        for wanted in map(Path, dict.fromkeys((real, named))):
            name = os.fsencode(wanted)
            found += [f"{alias}.root = ?", f"({alias}.root > ? AND {alias}.root < ?)"]  # "0" follows "/" in ASCII
            values += [name, name + b"/", name + b"0"]
            for root in wanted.parents:
                source = os.fsencode(wanted.relative_to(root))
                found.append(f"({alias}.root = ? AND {alias}.source = ?)")
                found.append(f"({alias}.root = ? AND {alias}.source > ? AND {alias}.source < ?)")
                values += [os.fsencode(root), source, os.fsencode(root), source + b"/", source + b"0"]
        if Path(real).is_relative_to(self._output):
            top, _, inner = os.path.relpath(real, self._output).partition("/")
            if top == ".":
                found.append("TRUE")
            elif not inner:
                found.append(f"CAST({alias}.now_folder AS BLOB) = ?")
                values.append(os.fsencode(top))
            else:
                name = os.fsencode(inner)
                for at in (f"{alias}.now_name = ?", f"{alias}.now_name > ? AND {alias}.now_name < ?"):
                    found.append(f"(CAST({alias}.now_folder AS BLOB) = ? AND {at})")
                values += [os.fsencode(top), name, os.fsencode(top), name + b"/", name + b"0"]
        return f" AND ({' OR '.join(found)})", values

    def photos(
        self, condition: str = "", values: Sequence[object] = (), *, order: str = "m.id", limit: int = -1
    ) -> list[Entry]:
        """The photos that are in the output: sorted, and neither restored nor sorted again since.

        `m.now_folder` and `m.now_name` say where a photo is; every query that asks for its place uses these two. A page
        of a folder, the least sure first, comes quickly with `ORDER BY m.confidence, m.id` and the condition
        `AND m.now_folder = ? AND (m.confidence, m.id) > (?, ?)`.

        Args:
            condition: more of it, on the rows `m` of `moves`, beginning with AND.
            values: of the condition.
            order: columns.
            limit: at most so many; all if it is negative.
        """
        query = f"{_ENTRY}{PRESENT}{condition} AND NOT {SORTED_AGAIN}"
        found = self._database.rows(f"{query} ORDER BY {order} LIMIT ?", (*values, *self._folders_sorted_again, limit))
        return [self._entry(row) for row in found]

    def count_photos(self, condition: str, values: Sequence[object], *, most: int) -> int:
        """How many photos `photos` would return, counted up to `most`."""
        some = (
            f"SELECT 1 FROM moves m WHERE m.done IS NOT NULL{PRESENT}{condition} "  # noqa: S608
            f"AND NOT {SORTED_AGAIN} LIMIT ?"
        )
        values = (*values, *self._folders_sorted_again, most)
        return int(self._database.rows(f"SELECT count(*) FROM ({some})", values)[0][0])  # noqa: S608

    def photo(self, id_: int) -> Entry | None:
        """The photo with this sorting move, if it is in the output."""
        return next(iter(self.photos(" AND m.id = ?", (id_,))), None)

    def _in_output(self, condition: str, values: Sequence[object]) -> list[Entry]:
        """The photos and sidecars that were sorted and not restored."""
        return self._moves(f"{UNDOABLE}{condition}", values)

    def _moves(self, condition: str, values: Sequence[object]) -> list[Entry]:
        """The moves that are done and that a condition holds for."""
        return [self._entry(row) for row in self._database.rows(f"{_ENTRY}{condition}", values)]

    def last_sorted(self, root: Path, names: Sequence[str], since: float) -> Entry | None:
        """The last photo with one of these names that was sorted, if it still is where it went.

        None if there is none, or if the history cannot be read at present.

        Args:
            root: the inbox.
            names: paths inside the inbox.
            since: only photos sorted at this time or later, in seconds since the epoch.
        """
        marks = ", ".join("?" * len(names))
        query = (
            f"{_ENTRY} AND m.source IN ({marks}) AND m.root = ? AND m.kind <> '{SIDECAR}' AND m.target IS NULL "
            "AND m.done >= ?"
        )
        try:
            values = (*map(os.fsencode, names), self._real(root), since)
            rows = self._database.rows(f"{query} ORDER BY m.id DESC LIMIT 1", values)
        except ConfigurationError:
            return None
        entry = next(map(self._entry, rows), None)
        return None if entry is None or entry.undone or not os.path.lexists(entry.destination) else entry

    def last_run(self) -> str | None:
        """The ID of the last run that sorted a photo which can be restored; None if there is none."""
        query = f"SELECT m.run FROM moves m WHERE m.done IS NOT NULL AND m.kind <> '{SIDECAR}'{UNDOABLE}"  # noqa: S608
        found = self._database.rows(f"{query} ORDER BY m.id DESC LIMIT 1", ())
        return str(found[0][0]) if found else None

    def has_run(self, run: str) -> bool:
        """Whether there was a run or an undo with this ID."""
        return bool(self._database.rows("SELECT 1 FROM runs WHERE id = ?", (run,)))

    def folders(self) -> set[str]:
        """The folders of the output that photos were ever sorted into."""
        return {
            folder for (folder,) in self._database.rows("SELECT DISTINCT folder FROM moves WHERE undoes IS NULL", ())
        }

    def photo_folders(self) -> set[str]:
        """The folders that photos are in, or were in until they were restored."""
        # One step in the index for each folder, however many photos it has.
        sorted_photos = f"moves m WHERE m.target IS NULL AND m.kind <> '{SIDECAR}'"
        query = (
            f"WITH RECURSIVE f (folder) AS (SELECT min(now_folder) FROM {sorted_photos} UNION ALL "  # noqa: S608
            f"SELECT (SELECT min(now_folder) FROM {sorted_photos} AND now_folder > f.folder) FROM f "
            "WHERE f.folder IS NOT NULL) SELECT folder FROM f WHERE folder IS NOT NULL"
        )
        return {folder for (folder,) in self._database.rows(query, ())}

    def last_failure(self) -> Entry | None:
        """The last photo that went to `failed` and was neither restored nor sorted again."""
        query = f"{_ENTRY} AND m.kind = '{FAILED}'{UNDOABLE} AND NOT {SORTED_AGAIN} ORDER BY m.id DESC LIMIT 1"
        found = self._database.rows(query, self._folders_sorted_again)
        return self._entry(found[0]) if found else None

    def counts(self, since: float = 0.0) -> Counts:
        """How many photos were moved at this time or later, in seconds since the epoch."""
        # A photo that was sorted twice counts where it is; back in `unsure/` or `failed/` it was not restored yet.
        query = (
            "SELECT now_folder, EXISTS (SELECT 1 FROM moves u WHERE u.undoes = m.id AND u.done IS NOT NULL) AS undone, "  # noqa: S608
            "count(*) FROM moves m WHERE done IS NOT NULL AND target IS NULL AND done >= ? AND kind <> ? "
            f"AND NOT {SORTED_AGAIN} AND NOT (undone AND m.root IN (?, ?)) GROUP BY now_folder, undone"
        )
        rows = self._database.rows(query, (since, SIDECAR, *self._folders_sorted_again, *self._folders_sorted_again))
        folders = {folder: count for folder, undone, count in rows if not undone}
        return Counts(folders, sum(count for _, undone, count in rows if undone))

    @property
    def _folders_sorted_again(self) -> tuple[bytes, bytes]:
        return os.fsencode(self._output / UNSURE), os.fsencode(self._output / FAILED)

    def was_restored(self, photo: Photo) -> bool:
        """Whether a photo in the inbox was restored by an undo and has not changed since.

        False if the history cannot be read at present: to sort the photo again loses nothing.
        """
        query = "SELECT size, mtime_ns FROM moves WHERE undoes IS NOT NULL AND target = ? AND name = ?"
        try:
            rows = self._database.rows(
                f"{query} ORDER BY id DESC LIMIT 1", (self._real(photo.root), os.fsencode(photo.name))
            )
        except ConfigurationError:
            return False
        return [(photo.identity.size, str(photo.identity.mtime_ns))] == rows

    def is_neither(self, photo: Photo) -> bool:
        """Whether a person said of a photo in `unsure/`, in this version, that it shows none of the classes.

        False if the history cannot be read at present.
        """
        if self._real(photo.root) != self._folders_sorted_again[0]:
            return False
        query = (
            "SELECT v.label FROM moves m JOIN verdicts v ON v.move = m.id WHERE m.now_folder = ? AND m.now_name = ? "  # noqa: S608
            f"AND m.size = ? AND m.mtime_ns = ? {UNDOABLE} ORDER BY v.id DESC LIMIT 1"
        )
        identity = photo.identity
        try:
            values = (UNSURE, os.fsencode(photo.name), identity.size, str(identity.mtime_ns))
            return self._database.rows(query, values) == [(None,)]
        except ConfigurationError:
            return False

    def last_link(self, file: Photo) -> Entry | None:
        """The last link that was made to a file of this name, in whatever version, unless it was undone.

        None if the history cannot be read at present: then nothing can be linked either.
        """
        query = f"{_ENTRY} AND m.root = ? AND m.source = ? AND m.linked AND m.undoes IS NULL ORDER BY m.id DESC LIMIT 1"
        try:
            rows = self._database.rows(query, (self._real(file.root), os.fsencode(file.name)))
        except ConfigurationError:
            return None
        entry = next(map(self._entry, rows), None)
        return None if entry is None or entry.undone else entry

    def _real(self, root: Path) -> bytes:
        """The path that the history has for an inbox; kept, because it is asked for each photo."""
        folder = file_of(root)
        if folder not in self._real_roots:
            self._real_roots = {folder: os.fsencode(os.path.realpath(root))}
        return self._real_roots[folder]

    def _entry(self, row: Sequence[Any]) -> Entry:
        id_, run, done, root, source, target, folder, name, size, mtime_ns, *why = row
        kind, label, confidence, reason, detail, follows, linked, model, undone, corrected = why
        root, source, name = (os.fsdecode(part) for part in (root, source, name))
        there = str(self._output) if target is None else os.fsdecode(target)
        return Entry(
            id=id_,
            run=run,
            done=done,
            source=os.path.join(root, source),
            destination=os.path.join(there, folder, name),
            root=root,
            name=source,
            place=os.path.join(folder, name),
            size=size,
            mtime_ns=int(mtime_ns),
            kind=kind,
            label=label,
            confidence=confidence,
            reason=reason,
            detail=detail,
            follows=follows,
            linked=bool(linked),
            model=model,
            undone=bool(undone),
            corrected=bool(corrected),
        )


def _moved(alias: str, run: str | None, since: float | None) -> tuple[str, list[object]]:
    """The condition for rows of `moves` under an alias by run and time, and its values."""
    wanted = [(f"{alias}.run = ?", run), (f"{alias}.done >= ?", since)]
    given = [(condition, value) for condition, value in wanted if value is not None]
    return "".join(f" AND {condition}" for condition, _ in given), [value for _, value in given]
