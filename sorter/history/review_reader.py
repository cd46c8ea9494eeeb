"""Reads from the history what the review page asks for besides its photos.

In: the history file of an output. Out: its folders and runs, and what a person said of its photos.
"""

from array import array
from collections.abc import Sequence

from sorter.history.reader import PRESENT, SORTED_AGAIN, HistoryReader

_AT_ONCE = 1000
_PAGE_ROWS = 20_000


class ReviewReader(HistoryReader):
    """An open history with the queries of the review page."""

    def verdicts(self, photos: Sequence[int]) -> dict[int, str | None]:
        """The last label that a person gave each of these photos, None for none of the classes, by the photo's ID."""
        found: dict[int, str | None] = {}
        for start in range(0, len(photos), _AT_ONCE):
            some = photos[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            found |= self._database.rows(f"SELECT move, label FROM verdicts WHERE move IN ({marks}) ORDER BY id", some)  # noqa: S608
        return found

    def corrections(self, photos: Sequence[int]) -> dict[int, int]:
        """The last correction of each of these photos, by the photo's ID."""
        marks = ", ".join("?" * len(photos))
        return dict(self._database.rows(f"SELECT id, corrected_by FROM moves WHERE id IN ({marks})", photos))  # noqa: S608

    def sorted_photos(self) -> "array[int]":
        """The IDs of all photos that were sorted into a class and are in the output; 8 bytes for each."""
        query = (
            "SELECT m.id FROM moves m WHERE m.id > ? AND m.done IS NOT NULL AND m.kind = 'sorted'"  # noqa: S608
            f"{PRESENT} AND NOT {SORTED_AGAIN} ORDER BY m.id LIMIT ?"
        )
        found = array("q")
        last = 0
        while rows := self._database.rows(query, (last, *self._folders_sorted_again, _PAGE_ROWS)):
            found.extend(id_ for (id_,) in rows)
            last = found[-1]
        return found

    def sorting_runs(self, limit: int) -> list[tuple[str, float]]:
        """The last runs that sorted photos, the newest first: their IDs, and when they started."""
        query = (
            "SELECT id, started FROM runs r WHERE kind = 'run' AND EXISTS (SELECT 1 FROM moves WHERE run = r.id) "
            "ORDER BY started DESC LIMIT ?"
        )
        return [(run, started) for run, started in self._database.rows(query, (limit,))]
