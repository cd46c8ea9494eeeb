"""Reads from the history what people said of sorted photos, and which sorted photos nobody doubted.

In: the history file of an output. Out: `PhotoVerdict`s with the place of each photo, and `Entry`s.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR


@dataclass(frozen=True, slots=True)
class PhotoVerdict:
    """The newest verdict on a photo.

    Attributes:
        at: when it was given, in seconds since the epoch.
        path: where the photo is; where it was last, if it is not there any more.
        label: the class that the person sees; None for none of them.
        how: `corrected`, `confirmed`, `checked` or `moved`, which is by hand.
        digest: SHA-256 of the photo that the person saw.
        label_was: what the model said, with its confidence, 0 to 1, and its name.
    """

    at: float
    path: str
    label: str | None
    how: str
    digest: bytes
    label_was: str | None
    confidence: float | None
    model: str


class VerdictsReader(HistoryReader):
    """An open history with the queries of those who learn from verdicts."""

    def verdicts(self, *, run: str | None = None, since: float | None = None) -> list[PhotoVerdict]:
        """The newest verdict on each photo, in the order in which they were given.

        A photo is known by its bytes: of verdicts on copies of one photo, too, only the newest counts.

        Args:
            run: only those on photos that this run sorted.
            since: only those given at this time or later, in seconds since the epoch.
        """
        query = (
            "SELECT v.at, v.label, v.how, v.digest, v.label_was, v.confidence, v.model, v.move FROM verdicts v "
            "JOIN moves m ON m.id = v.move LEFT JOIN moves c ON c.id = v.correction "
            "WHERE (v.correction IS NULL OR c.done IS NOT NULL) AND (? IS NULL OR m.run = ?) "
            "AND v.at >= ? ORDER BY v.id DESC"
        )
        newest: dict[bytes, Sequence[Any]] = {}
        for row in self._database.rows(query, (run, run, since or 0.0)):
            newest.setdefault(row[3], row)
        return [
            PhotoVerdict(at, self._place(move), label, how, digest, label_was, confidence, model)
            for at, label, how, digest, label_was, confidence, model, move in reversed(newest.values())
        ]

    def confident(self, label: str, at_least: float, seed: int, limit: int) -> list[Entry]:
        """Photos that are where the model put them with at least this confidence, and without any verdict.

        Args:
            label: of all of them.
            at_least: 0 to 1.
            seed: of the draw; the same seed draws the same photos.
            limit: at most so many.
        """
        condition = (
            " AND m.kind = 'sorted' AND m.label = ? AND m.confidence >= ? AND m.corrected_by IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.move = m.id)"
        )
        # A multiplicative hash (Knuth) draws without reading a million rows into memory.
        order = f"(m.id + {seed}) * 2654435761 % 4294967296, m.id"
        return self.photos(condition, (label, at_least), order=order, limit=limit)

    def _place(self, move: int) -> str:
        """Where the photo of a sorting move is: perhaps it was restored, and perhaps sorted again after that."""
        (photo,) = self._sorted("m.id = ?", move)
        again = "(m.root, m.source) = (SELECT root, source FROM moves WHERE id = ?)"
        for entry in (photo, *self._sorted(again, move)):
            for path in (entry.source, entry.destination) if entry.undone else (entry.destination,):
                if _has(path, photo):
                    return path
        return photo.source if photo.undone else photo.destination

    def _sorted(self, condition: str, move: int) -> list[Entry]:
        """The sorting moves that a condition holds for, the last one first."""
        return self._moves(
            f" AND {condition} AND m.target IS NULL AND m.kind <> '{SIDECAR}' ORDER BY m.id DESC", (move,)
        )


def _has(path: str, photo: Entry) -> bool:
    """Whether a path has the version of a photo that was sorted."""
    try:
        return photo.has_version(os.lstat(path))
    except OSError:
        return False
