"""What there is to look at, and in which order.

In: the history of an output, and the files as they are now. Out: `Card`s, a page at a time; what was decided, restored
or sorted again since never comes back. A page costs the same however long the history is: each order has an index, and
the next page begins where the last one ended.
"""

import heapq
import json
import os
import random
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from pathlib import Path

from sorter.files import FAILED, UNSURE
from sorter.files.photo import Identity, Photo, opened_folder
from sorter.history.reader import Entry
from sorter.history.review_reader import ReviewReader

PAGE = 100
MOST_COUNTED = 5_000
"""More photos than this are not counted: to count a million takes seconds."""

_MOST_PAGES = 20  # that are read to fill one, where files are gone
_RUNS = 20
_DECIDED = "EXISTS (SELECT 1 FROM verdicts v WHERE v.move = m.id)"
_UNDECIDED = f" AND NOT {_DECIDED}"
_TO_SORT = " AND m.kind IN ('sorted', 'unsure')"

Key = Sequence[float]
"""Where a page ends: the values by which its view is ordered."""
# What follows a key, in which order; the key before the first photo; and that of a photo.
_Order = tuple[str, str, Key, Callable[[Entry], Key]]
_NEWEST: _Order = ("(m.done, m.id) < (?, ?)", "m.done DESC, m.id DESC", (1e300, 0), lambda e: (e.done, e.id))
_ORDERS: dict[str, _Order] = {
    "folder": ("(m.confidence, m.id) > (?, ?)", "m.confidence, m.id", (-1, 0), lambda e: (e.confidence or 0, e.id)),
    "run": ("m.id > ?", "m.id", (0,), lambda e: (e.id,)),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One photo to look at.

    Attributes:
        id: of the row of the history that sorted it.
        place: its path inside the output at present.
        label: the class that the model called likeliest; None if it was not classified.
        confidence: 0 to 1.
        why: why it is in `failed/`, or in `unsure/` for another reason than its confidence; empty if nothing is known.
        sorted: when, in seconds since the epoch.
        file: as it is now; for a photo in `failed/` None, because it is not shown.
        is_corrected: whether it is one of those that a person has put into another folder.
        said: the label that the person gave such a photo; None for none of the classes.
    """

    id: int
    place: str
    label: str | None
    confidence: float | None
    why: str
    sorted: float
    file: Photo | None
    is_corrected: bool = False
    said: str | None = None


class Deck:
    """The photos of one output, for many threads at a time.

    Args:
        output: the folder that has `cats/` and the others.
        state_dir: where the history is, if not in the output.

    Raises:
        ConfigurationError: there is no history, or it cannot be read.
    """

    def __init__(self, output: Path, state_dir: Path | None = None) -> None:
        self._output = Path(os.path.realpath(output))
        self._reader = ReviewReader(output, state_dir, beside_writer=True)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the history; idempotent."""
        self._reader.close()

    def folders(self) -> list[str]:
        """The folders that have photos to look at, `unsure` first."""
        with self._lock:
            found = self._reader.photo_folders()
        return sorted(found - {FAILED}, key=lambda folder: (folder != UNSURE, folder))

    def runs(self) -> list[tuple[str, float]]:
        """The last runs that sorted photos, the newest first: their IDs, and when they started."""
        with self._lock:
            return self._reader.sorting_runs(_RUNS)

    def page(self, view: str, after: str | None = None) -> tuple[list[Card], str | None]:
        """The next photos to look at.

        Args:
            view: `least-sure` (those in `unsure/` first, then by rising confidence), `folder:NAME` (by rising
                confidence), `newest`, `run:ID` (as they were sorted) or `day:YYYY-MM-DD` (the newest first); or
                `corrected`, those that are decided and were moved for it, the last one first.
            after: where the last page ended; None for the first page.

        Returns:
            About `PAGE` cards, and where they end; None after the last page.

        Raises:
            ValueError: the view is unknown, or no page could end there.
        """
        read = self._view(view)
        key: Key | None = None if after is None else _key(after)
        cards: list[Card] = []
        for _ in range(_MOST_PAGES):
            found = read(key)
            cards += filter(None, (self._look(entry) for entry, _ in found))
            key = found[-1][1] if len(found) == PAGE else None
            if key is None or len(cards) >= PAGE:
                break
        if view == "corrected":
            said = self.verdicts([card.id for card in cards])
            cards = [replace(card, is_corrected=True, said=said[card.id]) for card in cards if card.id in said]
        return cards, None if key is None else json.dumps(key)

    def left(self, view: str) -> int:
        """How many photos a view has, up to `MOST_COUNTED`, files that are gone included.

        Raises:
            ValueError: the view is unknown.
        """
        condition, values = self._condition(view)
        with self._lock:
            return self._reader.count_photos(condition, values, most=MOST_COUNTED)

    def failed(self, after: str | None = None) -> tuple[list[Card], str | None]:
        """The next photos in `failed/`, the newest first, without their files.

        Raises:
            ValueError: no page could end there.
        """
        (last,) = (1 << 62,) if after is None else _key(after)
        found = self._entries(" AND m.kind = 'failed' AND m.id < ?", [last], "m.id DESC")
        following = json.dumps([found[-1].id]) if len(found) == PAGE else None
        return [_card(entry, None) for entry in found], following

    def card(self, photo: int) -> Card | None:
        """One photo, decided or not; None if it is gone or not a photo that can be looked at."""
        found = self._entries(f"{_TO_SORT} AND m.id = ?", [photo], "m.id")
        return self._look(found[0]) if found else None

    def sample(self, number: int) -> list[Entry]:
        """Sorted photos at random, decided or not, whose files are there."""
        with self._lock:
            photos = self._reader.sorted_photos()
        random.shuffle(photos)
        found: list[Entry] = []
        for start in range(0, len(photos), PAGE):
            if len(found) >= number:
                break
            some = photos[start : start + PAGE]
            marks = ", ".join("?" * len(some))
            entries = {entry.id: entry for entry in self._entries(f" AND m.id IN ({marks})", some, "m.id")}
            # As they were drawn: the last ones may be too many.
            drawn = (entries[photo] for photo in some if photo in entries)
            found += [entry for entry in drawn if self._look(entry) is not None]
        return found[:number]

    def verdicts(self, photos: Sequence[int]) -> dict[int, str | None]:
        """The labels that a person gave photos, None for neither; photos without a verdict are missing."""
        with self._lock:
            return self._reader.verdicts(photos)

    def _view(self, view: str) -> "Callable[[Key | None], list[tuple[Entry, Key]]]":
        """What reads the photos of a view that follow a key, each with its own."""
        condition, values = self._condition(view)
        if view == "least-sure":
            return self._least_sure
        if view == "corrected":
            return self._corrected
        kind = view.partition(":")[0]
        bound, order, first, key_of = _ORDERS.get(kind, _NEWEST)

        def read(key: Key | None) -> list[tuple[Entry, Key]]:
            if key is not None and len(key) != len(first):
                raise ValueError(view)
            found = self._entries(f"{condition} AND {bound}", [*values, *(key or first)], order)
            return [(entry, key_of(entry)) for entry in found]

        return read

    def _condition(self, view: str) -> tuple[str, list[object]]:
        """What a view shows, on the rows `m` of `moves`, and its values."""
        kind, _, name = view.partition(":")
        to_look_at = _TO_SORT + _UNDECIDED
        if view in ("least-sure", "newest"):
            return to_look_at, []
        if view == "corrected":
            # Not IS NOT NULL, for which SQLite would not use the index.
            return f"{_TO_SORT} AND m.corrected_by > 0 AND {_DECIDED}", []
        if kind == "folder" and name:
            return f"{to_look_at} AND m.now_folder = ?", [name]
        if kind == "run" and name:
            return f"{to_look_at} AND m.run = ?", [name]
        if kind == "day":
            day = datetime.combine(date.fromisoformat(name), time())
            try:
                return f"{to_look_at} AND m.done >= ? AND m.done < ?", [
                    day.timestamp(),
                    (day + timedelta(1)).timestamp(),
                ]
            except OverflowError:
                pass
        raise ValueError(view)

    def _least_sure(self, key: Key | None) -> list[tuple[Entry, Key]]:
        """A page of `unsure/`, then of all other folders together."""
        is_after_unsure, *bound = key or (0, -1.0, 0)
        found: list[tuple[Entry, Key]] = []
        if not is_after_unsure:
            found = [(entry, (0, *end)) for entry, end in self._view(f"folder:{UNSURE}")(bound)]
            bound = [-1.0, 0]
        if len(found) < PAGE:
            others = [self._view(f"folder:{folder}")(bound) for folder in self.folders() if folder != UNSURE]
            merged = heapq.merge(*others, key=lambda one: tuple(one[1]))
            found += [(entry, (1, *end)) for entry, end in merged]
        return found[:PAGE]

    def _corrected(self, key: Key | None) -> list[tuple[Entry, Key]]:
        """A page of the photos that were corrected."""
        condition, _ = self._condition("corrected")
        (last,) = key or (1 << 62,)
        found = self._entries(f"{condition} AND m.corrected_by < ?", [last], "m.corrected_by DESC")
        with self._lock:
            ends = self._reader.corrections([entry.id for entry in found])
        return [(entry, (ends[entry.id],)) for entry in found]

    def _entries(self, condition: str, values: Sequence[object], order: str) -> list[Entry]:
        with self._lock:
            return self._reader.photos(condition, values, order=order, limit=PAGE)

    def _look(self, entry: Entry) -> Card | None:
        """An entry with its file; None if that is gone, or has changed since it was sorted."""
        folder, base = os.path.split(entry.place)
        try:
            with opened_folder(self._output, folder) as descriptor:
                status = os.stat(base, dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        # Nobody sorted this version: it is its owner's, and no verdict on it would be taken.
        if not entry.has_version(status):
            return None
        return _card(entry, Photo(self._output, entry.place, Identity.of(status), entry.done))


def shown(path: str) -> str:
    """A path as text that can be shown, whatever bytes it has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _card(entry: Entry, file: Photo | None) -> Card:
    why = ": ".join(filter(None, (entry.reason, entry.detail)))
    return Card(entry.id, entry.place, entry.label, entry.confidence, why, entry.done, file)


def _key(text: str) -> list[float]:
    try:
        key = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(key, list) or not all(isinstance(part, (int, float)) and abs(part) < 1 << 63 for part in key):
        raise ValueError(text)
    return key
