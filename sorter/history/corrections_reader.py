"""Reads from the history what a correction has to know besides the photo: its sidecars, and what was said of it before.

In: the history file of an output. Out: `Entry`s, and the newest verdict on a photo.
"""

import os
from dataclasses import dataclass

from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR


@dataclass(frozen=True, slots=True)
class GivenVerdict:
    """The newest verdict on a photo.

    Attributes:
        id: of its row.
        how: as in `Judgement`.
        came_from: the path inside the output from where it moved the photo; None if it moved nothing.
    """

    id: int
    how: str
    came_from: str | None


class CorrectionsReader(HistoryReader):
    """An open history with the queries of corrections."""

    def sidecars(self, photo: Entry) -> list[Entry]:
        """The sidecars that followed a photo and were not restored."""
        return self._in_output(f" AND m.kind = '{SIDECAR}' AND m.follows = ? ORDER BY m.id", (photo.id,))

    def sidecar_at(self, place: str) -> Entry | None:
        """The sidecar that was moved to a path inside the output, last if there were several."""
        folder, _, name = place.partition("/")
        at = f" AND m.kind = '{SIDECAR}' AND m.now_name = ? AND CAST(m.now_folder AS BLOB) = ?"
        values = (os.fsencode(name), os.fsencode(folder))
        return next(iter(self._in_output(f"{at} ORDER BY m.placed_by DESC LIMIT 1", values)), None)

    def newest_verdict(self, photo: Entry) -> GivenVerdict | None:
        """The newest verdict on a photo that was not taken back."""
        query = (
            "SELECT v.id, v.how, c.source FROM verdicts v LEFT JOIN moves c ON c.id = v.correction "
            "WHERE v.move = ? ORDER BY v.id DESC LIMIT 1"
        )
        for id_, how, source in self._database.rows(query, (photo.id,)):
            return GivenVerdict(id_, how, None if source is None else os.fsdecode(source))
        return None
