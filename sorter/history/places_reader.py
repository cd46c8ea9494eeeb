"""Reads from the history where every photo should be, to find those that somebody has moved since.

In: the history file of an output. Out: the recorded places, a page at a time, and what is known of single photos.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from sorter.history.corrections_reader import CorrectionsReader
from sorter.history.reader import SORTED_AGAIN, UNDOABLE, Entry

_PAGE_ROWS = 2000
_AT_ONCE = 1000
_SECONDS = "max(-2147483648, min(CAST(m.mtime_ns AS INTEGER) / 1000000000, 2147483647))"


class Place(NamedTuple):
    """Where the history has a photo or a sidecar.

    Attributes:
        id: of its sorting move.
        path: inside the output.
        device, inode, size: of the file that was sorted; the first two are those of the inbox, signed.
        seconds: its modification time in whole seconds, as far as 32 bits have them.
        is_photo: False for a sidecar, and while a sorter moves it there.
    """

    id: int
    path: bytes
    device: int
    inode: int
    size: int
    seconds: int
    is_photo: bool


class PlacesReader(CorrectionsReader):
    """An open history with the queries about places."""

    def places(self, after: int) -> list[Place]:
        """The next places of files that are in the output, or on their way there, by the `id` that they follow."""
        query = (
            "SELECT m.id, CAST(m.now_folder || '/' || m.now_name AS BLOB), m.device, m.inode, m.size, "  # noqa: S608
            f"{_SECONDS}, m.done IS NOT NULL AND m.kind <> 'sidecar' FROM moves m WHERE m.id > ?{UNDOABLE} "
            f"AND NOT {SORTED_AGAIN} ORDER BY m.id LIMIT ?"
        )
        rows = self._database.rows(query, (after, *self._folders_sorted_again, _PAGE_ROWS))
        return [Place(*row) for row in rows]

    def place_of(self, file: Entry) -> str | None:
        """Where in the output the history has a photo or sidecar by now; None if it was restored, or is on its way."""
        is_settled = "NOT EXISTS (SELECT 1 FROM moves c WHERE c.corrects = m.id AND c.done IS NULL)"
        condition = f" AND m.id = ? AND {is_settled} AND NOT {SORTED_AGAIN}"
        rows = self._in_output(condition, (file.id, *self._folders_sorted_again))
        return rows[0].place if rows else None

    def has_newer(self, place: str, after: int) -> bool:
        """Whether a sorter has moved a file to a place, or is about to, in a move that is newer than this one."""
        folder, _, name = place.partition("/")
        query = (
            "SELECT 1 FROM moves WHERE now_name = ? AND CAST(now_folder AS BLOB) = ? AND id > ? AND target IS NULL "
            "LIMIT 1"
        )
        return bool(self._database.rows(query, (os.fsencode(name), os.fsencode(folder), after)))

    def photos_of(self, moves: Sequence[int]) -> list[Entry]:
        """The photos with these sorting moves that are in the output."""
        found: list[Entry] = []
        for start in range(0, len(moves), _AT_ONCE):
            some = moves[start : start + _AT_ONCE]
            found += self.photos(f" AND m.id IN ({', '.join('?' * len(some))})", some)
        return found

    def digests(self, photo: Entry) -> frozenset[bytes]:
        """The SHA-256 of a photo's bytes, from the verdicts on it; empty if there is none."""
        rows = self._database.rows("SELECT DISTINCT digest FROM verdicts WHERE move = ?", (photo.id,))
        return frozenset(digest for (digest,) in rows)

    def labels(self) -> dict[str, str]:
        """By folder, the class whose photos were sorted into it."""
        query = (
            "SELECT label FROM moves m WHERE m.target IS NULL AND m.kind = 'sorted' AND m.now_folder = ? "
            "AND m.folder = m.now_folder LIMIT 1"
        )
        found = {folder: self._database.rows(query, (folder,)) for folder in self.photo_folders()}
        return {folder: str(rows[0][0]) for folder, rows in found.items() if rows}
