"""Finds sorted photos that a person has moved between the folders by hand, and records that.

In: the history of an output, and its folders as they are now. Out: `HandMove`s, which the history then has like any
correction: undo, review and learning follow the photo. No file is touched.

`strays.py` finds files that nobody expects, `matching.py` says which of them is which photo. A photo that is still at
its place, or that was changed, is not looked for.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from sorter.files import FAILED, UNSURE
from sorter.files.atomic import new_token
from sorter.files.photo import Identity, Photo, open_file
from sorter.history.places_reader import PlacesReader
from sorter.history.reader import Entry
from sorter.history.store import SIDECAR, History, Judgement, Move, Run
from sorter.inbox.sidecars import FolderListing, SidecarNames
from sorter.moving.matching import Row, match
from sorter.moving.strays import KnownPlaces, Stray

_AT_ONCE = 500  # files that are compared with photos
_BATCH = 100  # photos in one transaction


class HandMove(NamedTuple):
    """A photo or a sidecar that a person has moved.

    Attributes:
        entry: of it; what it says of the place is out of date.
        stray: the file that it is now.
    """

    entry: Entry
    stray: Stray

    def followed(self, output: Path) -> Entry:
        """The entry with the place where the file is now."""
        destination = os.path.join(os.path.realpath(output), self.stray.place)
        return replace(self.entry, place=self.stray.place, destination=destination)


class HandMoves:
    """The search of one output.

    Args:
        output: the folder that has `cats/` and the others.
        reader: of its history.
        labels: by folder, of the model; folders of other models are known from the history.
        sidecars: says which files belong to a photo.
    """

    def __init__(
        self, output: Path, reader: PlacesReader, labels: Mapping[str, str], sidecars: SidecarNames | None = None
    ) -> None:
        self._output = Path(os.path.realpath(output))
        self._reader, self._sidecars = reader, sidecars or SidecarNames()
        self._labels: dict[str, str | None] = {**reader.labels(), **labels, UNSURE: None}
        self._labels.pop(FAILED, None)
        self._newest = 0  # the last move that the search knew of

    def find(self) -> list[HandMove]:
        """The photos that were moved, and the sidecars that were moved along; changes nothing.

        Raises:
            ConfigurationError: the history cannot be read.
        """
        known = KnownPlaces(self._reader)
        self._newest = known.newest
        strays = [stray for folder in sorted(self._labels) for stray in known.strays(self._output, folder, self._takes)]
        if not strays:
            return []
        found: list[HandMove] = []
        for some in _by_size(strays):
            files, common = known.candidates(some)
            entries = self._reader.photos_of([*files])
            rows = [Row(entry, *files[entry.id], self._reader.digests(entry)) for entry in entries]
            found += [HandMove(row.entry, stray) for row, stray in match(rows, some, self._digest, common)]
        found.sort(key=lambda move: move.entry.id)
        taken: set[str] = set()
        return [each for move in found for each in (move, *self._moved_along(move, taken))]

    def record(self, moves: Sequence[HandMove], history: History) -> int:
        """Record what was found, and the verdicts that lie in it; what is not so any more is left out.

        The caller holds the lock of undo.

        Returns:
            How many photos were moved, without sidecars.

        Raises:
            ConfigurationError: the history cannot be read.
            StorageError: it cannot be written.
        """
        run = Run.new(kind="review")
        has_begun, count = False, 0
        for start in range(0, len(moves), _BATCH):
            batch = moves[start : start + _BATCH]
            recorded: list[Move] = []
            judgements: list[Judgement] = []
            for move in filter(self._is_so, batch):
                try:
                    intent, judgement = self._judged(move, run)
                except OSError:  # gone, or written to, meanwhile
                    continue
                recorded.append(intent)
                judgements += [] if judgement is None else [judgement]
            if recorded:
                if not has_begun:
                    history.begin(run)
                has_begun = True
                history.record(recorded, judgements)
            count += sum(move.kind != SIDECAR for move in recorded)
        if has_begun:
            history.finish()
        return count

    def _digest(self, stray: Stray) -> bytes:
        """SHA-256 of a file.

        Raises:
            OSError: it cannot be read, or has changed since it was found.
        """
        identity = Identity.of(stray.status)
        with open(open_file(Photo(self._output, stray.place, identity, 0.0)), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            if Identity.of(os.fstat(file.fileno())) != identity:
                raise OSError(f"{stray.place} has changed")
        return digest

    def _takes(self, name: str) -> bool:
        return not self._sidecars.is_sidecar(name)

    def _moved_along(self, photo: HandMove, taken: set[str]) -> Iterator[HandMove]:
        """The sidecars of a photo that are beside it again; those that stayed behind are where the history has them."""
        folder, base = os.path.split(photo.stray.place)
        for sidecar in self._reader.sidecars(photo.entry):
            own = _base(sidecar.place)
            names = [self._sidecars.renamed(own, _base(photo.entry.place), base)]
            names += [own] if self._sidecars.rank(own, base) is not None else []
            found = filter(None, (self._look(f"{folder}/{name}") for name in names))
            stray = next((stray for stray in found if stray.place not in taken), None)
            if stray is None or os.path.lexists(sidecar.destination):
                continue
            # Its owner's programs write to it; then it is the photo's if no other photo there could own it.
            owners = FolderListing(self._output, folder, self._sidecars).photos(stray.base)
            if sidecar.has_version(stray.status) or owners == [base]:
                taken.add(stray.place)
                yield HandMove(sidecar, stray)

    def _look(self, place: str) -> Stray | None:
        """A file that the history has never had at its place."""
        try:
            status = os.lstat(self._output / place)
        except OSError:
            return None
        is_new = stat.S_ISREG(status.st_mode) and not self._reader.has_newer(place, 0)
        return Stray(place, status, is_unrecorded=True) if is_new else None

    def _is_so(self, move: HandMove) -> bool:
        """Whether a file is still where it was found, and the history has nothing newer of it."""
        try:
            is_same = Identity.of(os.lstat(self._output / move.stray.place)) == Identity.of(move.stray.status)
        except OSError:
            return False
        is_known_there = self._reader.place_of(move.entry) == move.entry.place
        # In this order: what a sorter has put there meanwhile was recorded before.
        return is_same and is_known_there and not self._reader.has_newer(move.stray.place, self._newest)

    def _judged(self, move: HandMove, run: Run) -> tuple[Move, Judgement | None]:
        """The move, and what it says of the photo.

        Raises:
            OSError: the photo cannot be read, or has changed.
        """
        entry, identity = move.entry, Identity.of(move.stray.status)
        folder, _, name = move.stray.place.partition("/")
        recorded = Move(
            token=new_token(),
            run=run.id,
            root=self._output,
            source=entry.place,
            folder=folder,
            name=name,
            identity=identity,
            kind=SIDECAR if entry.kind == SIDECAR else "moved",
            label=None if entry.kind == SIDECAR else self._labels[folder],
            target=self._output,  # never None, which would make it a sorter's move
            corrects=entry.id,
        )
        if entry.kind in (SIDECAR, FAILED) or folder == _top(entry.place):
            return recorded, None
        before = self._reader.newest_verdict(entry)
        if before is not None and before.how == "moved" and _top(before.came_from or "") == folder:
            # Moved there and back: the same as if nobody had looked in between.
            return replace(recorded, takes_back=before.id), None
        digest = self._digest(move.stray)
        judgement = Judgement(
            entry.id, self._labels[folder], "moved", digest, entry.label, entry.confidence, entry.model, recorded.token
        )
        return recorded, judgement


def _by_size(strays: Sequence[Stray]) -> Iterator[list[Stray]]:
    """Some files at a time, those of one size together."""
    some: list[Stray] = []
    for _, same in groupby(sorted(strays, key=lambda stray: stray.status.st_size), lambda stray: stray.status.st_size):
        some += same
        if len(some) >= _AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _base(place: str) -> str:
    return place.rpartition("/")[2]


def _top(place: str) -> str:
    return place.partition("/")[0]
