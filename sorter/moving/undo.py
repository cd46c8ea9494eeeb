"""Restores sorted photos: moves them back to where they came from, or removes the links to those that stayed there.

In: `Entry`s of the history. Out: for each, whether it was restored, or why it stayed. It promises what sorting does: an
intent is durable before its photo is touched, nothing is ever replaced, and after a crash and the next start each photo
has exactly one name. It works beside a running sorter, which leaves restored photos alone.
"""

import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sorter.errors import StorageError
from sorter.files import inodes
from sorter.files.atomic import StayedError, make_inner_folder, new_token
from sorter.files.photo import Identity, Photo, opened_folder
from sorter.history.reader import Entry
from sorter.history.store import SIDECAR, History, Move, Run
from sorter.moving import linker
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan

_BATCH = 100
_TAKEN = "another file has its old name"


@dataclass(frozen=True, slots=True)
class Undone:
    """The result for one photo.

    Attributes:
        problem: why it stayed where it is; empty if it was restored.
    """

    entry: Entry
    problem: str = ""


def check(entry: Entry, place: str = "", original: str = "") -> Identity:
    """Check that a photo can be restored; changes nothing.

    Args:
        entry: of the photo.
        place: where the photo is at present, if not where it went.
        original: where a linked photo itself is at present, if not where it was.

    Returns:
        The identity that the file has now.

    Raises:
        StayedError: it cannot be restored; the message says why.
    """
    if entry.linked:
        return linker.check(entry, place or entry.destination, original or entry.source)
    folder, base = os.path.split(place or entry.destination)
    try:
        with opened_folder(Path(folder), "") as descriptor:
            status = os.stat(base, dir_fd=descriptor, follow_symlinks=False)
    except OSError:
        raise StayedError("it is gone") from None
    # A sidecar changes whenever its owner edits the photo, and goes back as it is.
    alike = entry.kind == SIDECAR or entry.has_version(status)
    if not stat.S_ISREG(status.st_mode) or not alike:
        raise StayedError("it was changed or replaced since it was sorted")
    if not os.path.isdir(entry.root):
        raise StayedError(f"the folder it came from, {entry.root}, is gone")
    _check_folder(entry)
    if os.path.lexists(entry.source):
        raise StayedError(_TAKEN)
    return Identity.of(status)


def _check_folder(entry: Entry) -> None:
    """Check that a photo's old folder accepts it; a missing folder will be created."""
    try:
        with opened_folder(Path(entry.root), os.path.dirname(entry.name)) as descriptor:
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=descriptor):
                raise StayedError("no write permission on its original folder")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StayedError(f"its old folder cannot be used any more ({error.strerror})") from None


def planned_undo(entries: Iterable[Entry]) -> Iterator[Undone]:
    """What `Undo` would do; changes nothing."""
    stayed: set[int] = set()
    places: dict[str, str] = {}  # where photos would be back, and where they are
    for entry in entries:
        place = places.pop(entry.destination, entry.destination)  # one that was sorted twice goes back twice
        try:
            _check_follows(entry, stayed)
            check(entry, place, places.get(entry.source, ""))
            if entry.source in places and not entry.linked:
                raise StayedError(_TAKEN)
        except StayedError as error:
            stayed.add(entry.id)
            yield Undone(entry, str(error))
        else:
            if not entry.linked:
                places[entry.source] = place
            yield Undone(entry)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """A photo that was sorted twice goes back in two batches, since a batch is checked before anything in it moves.

    So does a photo that was moved after it was linked: its link is compared with it.
    """
    batch: list[Entry] = []
    sources: set[str] = set()
    for entry in entries:
        if len(batch) == _BATCH or entry.destination in sources or (entry.linked and entry.source in sources):
            yield batch
            batch, sources = [], set()
        batch.append(entry)
        sources.add(entry.source)
    if batch:
        yield batch


def _check_follows(entry: Entry, stayed: set[int]) -> None:
    """Check that an entry is not the sidecar of a photo that stays."""
    if entry.follows in stayed:
        raise StayedError("its photo stays too")


class Undo:
    """Restores photos; used by one thread only.

    Args:
        output: the folder that they were sorted into.
        history: of the output.
        run: of this process.
        stopping: ends it after the current batch.
    """

    def __init__(self, output: Path, history: History, run: Run, stopping: threading.Event) -> None:
        self._output = Path(os.path.realpath(output))
        self._history, self._run, self._stopping = history, run, stopping
        self._movers: dict[str, Mover] = {}  # by the folder that photos go back to
        self._stayed: set[int] = set()  # IDs of the entries that could not be restored

    def restore(self, entries: Iterable[Entry]) -> Iterator[Undone]:
        """Restore photos, in batches that share their syncs.

        Raises:
            StorageError: the history cannot be written, or a folder cannot be synced; the next start finds what was
                moved and records it.
        """
        self._history.begin(self._run)
        for batch in _batches(entries):
            if self._stopping.is_set():
                break
            yield from self._batch(batch)
        self._history.finish()

    def _batch(self, entries: Sequence[Entry]) -> list[Undone]:
        results: list[Undone] = []
        planned: list[tuple[Entry, Plan, Move]] = []
        for entry in entries:
            try:
                _check_follows(entry, self._stayed)
                plan = self._plan(entry, check(entry))
                planned.append((entry, plan, self._intent(entry, plan)))
            except StayedError as error:
                results.append(self._stays(entry, str(error)))
        if not planned:
            return results
        self._history.intend([move for _, _, move in planned])
        done: list[Move] = []
        try:
            for entry, plan, move in planned:
                try:
                    _check_follows(entry, self._stayed)
                    self._move(entry, plan)
                # One folder may be full or away while the others are fine, so even then the next photo is tried.
                except (StayedError, StorageError) as error:
                    taken = not entry.linked and os.path.lexists(entry.source)
                    results.append(self._stays(entry, _TAKEN if taken else str(error)))
                else:
                    done.append(move)
                    results.append(Undone(entry))
        finally:
            # As in sorting: what was moved is recorded, what was not is withdrawn, and what is unresolved stays an
            # intent for recovery at the next start.
            kept = {move.token for move in done}
            kept |= {plan.token for entry, plan, _ in planned if self._movers[entry.root].is_unresolved(plan)}
            for root in {entry.root for entry, _, _ in planned}:
                self._movers[root].settle()
            self._history.settle(done, [move for _, _, move in planned if move.token not in kept])
        return results

    def _stays(self, entry: Entry, problem: str) -> Undone:
        self._stayed.add(entry.id)
        return Undone(entry, problem)

    def _plan(self, entry: Entry, identity: Identity) -> Plan:
        if entry.root not in self._movers:
            inodes.look((Path(entry.root),))
            self._movers[entry.root] = Mover(Path(entry.root))
        folder, base = os.path.split(entry.name)
        photo = Photo(self._output, os.path.relpath(entry.destination, self._output), identity, 0.0)
        return Plan(photo, folder, base, new_token(), "unlink" if entry.linked else "move")

    def _move(self, entry: Entry, plan: Plan) -> None:
        try:
            if not entry.linked:
                # Its owner may have removed it when it was empty.
                os.close(make_inner_folder(Path(entry.root), plan.folder))
        except OSError as error:
            raise StayedError(f"its folder cannot be made ({error.strerror})") from None
        self._movers[entry.root].move(plan)

    def _intent(self, entry: Entry, plan: Plan) -> Move:
        # A linked photo is what later runs find and leave alone; a copy of it may have other times.
        identity = linker.identity_of(entry.source) if entry.linked else plan.photo.identity
        return Move(
            token=plan.token,
            run=self._run.id,
            root=self._output,
            source=plan.photo.name,
            folder="",
            name=entry.name,
            identity=identity,
            kind="undone",
            label=entry.label,
            confidence=entry.confidence,
            target=Path(os.path.realpath(entry.root)),
            undoes=entry.id,
            linked=entry.linked,
        )
